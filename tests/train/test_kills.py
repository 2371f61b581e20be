"""Runs that are killed at random moments resume byte by byte: 20 moments here, 200 for each scenario with `make kill-test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from house import ROOT


def killed(tmp_path: Path, *arguments: str) -> list[dict]:
    """The lines of `tests.train.kills` with some arguments."""
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.kills", "--out", str(tmp_path / "lines"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False, timeout=1500)
    assert (tmp_path / "lines").exists(), done.stderr
    found = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert done.returncode == 0, f"{found}\n{done.stderr}"
    return found


def test_kills_at_random_moments(tmp_path: Path) -> None:
    (line,) = killed(tmp_path, "--points", "20", "--scenario", "images")
    assert line["kills"] + line["sigterm"] >= 20 and line["different"] == [] and line["resumed_runs"] >= 2
    assert line["in_the_middle_of_a_save"] >= 1, "some moments lie in a save"


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["adapters", "workers", "shards"])
def test_kills_of_other_runs(tmp_path: Path, scenario: str) -> None:
    (line,) = killed(tmp_path, "--points", "30", "--scenario", scenario)
    assert line["kills"] + line["sigterm"] >= 30 and line["different"] == []
