"""Settings of the whole test run."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

# The tests' tensors are tiny: a second thread only waits, three times as long when processes share the cores.
torch.set_num_threads(1)

# torch.export logs whole graphs here; pytest would record and keep every one of them.
logging.getLogger("torch.__trace").propagate = False

SLOW = Path(__file__).parent / "slow.txt"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases of slow.txt as slow, before `-m` chooses."""
    slow = {line for line in SLOW.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")}
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
    if not any("::" in argument for argument in config.args):  # whole files were collected: what they lack is not there
        files = {item.nodeid.split("::")[0] for item in items}
        gone = sorted(line for line in slow - {item.nodeid for item in items} if line.split("::")[0] in files)
        if gone:
            raise pytest.UsageError(f"{SLOW.name} names tests that are not there: {', '.join(gone[:5])}")
