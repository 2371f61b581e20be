"""The loggers of other programs write what those programs read: the losses of a run, bit for bit, and its settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from fxopt.train.loggers import TensorBoard
from tests.train.small import batches, run


def test_tensorboard(tmp_path: Path) -> None:
    result, _ = run(val=batches(2), loggers=[TensorBoard(SummaryWriter(str(tmp_path)))])
    held = EventAccumulator(str(tmp_path))
    held.Reload()
    assert [event.step for event in held.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in held.Scalars("loss")] == pytest.approx(result.losses)
    assert [event.step for event in held.Scalars("val_loss")] == [6]
    (text,) = held.Tensors("settings/text_summary")
    assert b"lr: 0.05" in text.tensor_proto.string_val[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_wandb_and_mlflow(name: str, tmp_path: Path) -> None:
    """Needs `pip install fxopt[loggers]`, and fails without it."""
    done = subprocess.run([sys.executable, "-m", f"tests.train.{name}_run", str(tmp_path)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["found"] == [[step, loss] for step, loss in enumerate(said["losses"], 1)] and len(said["losses"]) == 6 and said["lr"] == 0.05
    assert name == "wandb" or said["status"] == "FINISHED" and said["artifacts"] == ["report.html"]
