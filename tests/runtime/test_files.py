"""A file is whole or absent, also when the process is killed in the middle."""

from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest
import torch

from fxopt.errors import DataError
from fxopt.runtime.files import replace_file
from fxopt.runtime.store import Adapter, read_adapters, write_adapters

WRITER = """
import sys, torch
from fxopt.runtime.store import Adapter, write_adapters
number = 0
while True:
    number += 1
    value = torch.full((8, 4096), float(number))
    write_adapters(sys.argv[1], [Adapter(f"layers.{i}.proj", value, value.T, 8.0) for i in range(8)])
    print(number, flush=True)
"""


@pytest.mark.parametrize("pause", [0.0, 0.003, 0.007, 0.011, 0.017, 0.023])
def test_kill_during_saving_leaves_a_whole_adapter(tmp_path: Path, pause: float) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        for _ in range(3):
            assert process.stdout is not None and process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
    adapters = read_adapters(tmp_path)
    values = {float(value) for adapter in adapters for value in (*adapter.a.unique(), *adapter.b.unique())}
    assert len(adapters) == 8 and len(values) == 1 and values.pop() >= 3
    write_adapters(tmp_path, [Adapter("layers.0.proj", torch.ones(2, 4), torch.ones(4, 2), 8.0)])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_folder_in_the_way_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(DataError, match="could not be written"):
        replace_file(tmp_path / "file", b"x")
    (tmp_path / "plain").write_text("")
    with pytest.raises(DataError, match="could not be made"):
        write_adapters(tmp_path / "plain" / "folder", [Adapter("p", torch.ones(1, 1), torch.ones(1, 1), 1.0)])


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(b"kept")
    (tmp_path / "file.tmp").symlink_to(target)
    with pytest.raises(DataError):
        replace_file(tmp_path / "file", b"x")
    assert target.read_bytes() == b"kept"
