"""A checkpoint of n processes goes on with m."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fxopt
from fxopt.errors import DataError
from fxopt.train import snapshot
from fxopt.train.averaging import Averaged
from fxopt.train.callbacks import Callback, State
from fxopt.train.saver import Checkpoints
from fxopt.train.sharded import wholes
from fxopt.train.stopping import EarlyStopping
from tests.train.processes import together
from tests.train.test_fsdp import Model, samples, supervised


class Seen(Callback):
    """The samples that a rank trained on."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def on_batch_start(self, state: State, batch: Any, index: int) -> None:
        self.samples += batch["number"].tolist()


class Numbered(Model):
    def forward(self, x: torch.Tensor, labels: torch.Tensor, number: torch.Tensor) -> Any:
        return super().forward(x, labels)


def data() -> list[dict[str, torch.Tensor]]:
    rows = [{name: value[i] for name, value in batch.items()} for batch in samples(8) for i in range(2)]
    return [row | {"number": torch.tensor(i)} for i, row in enumerate(rows)]


def going_on(folder: Path, strategy: str, steps: int, resume: bool | Path = True, optimizer: str = "adamw", **more: Any) -> dict[str, Any]:
    """Train up to so many steps, from a checkpoint if there is one."""
    seen, average, stopping = Seen(), Averaged(0.5, replace=False), EarlyStopping("loss", restore=False, patience=99)
    settings = {"steps": steps, "epochs": None, "lr": 1e-2, "seed": 0, "progress": False, "count": supervised, "output_dir": folder, "strategy": strategy,
                "checkpoints": Checkpoints(unit="step"), "schedule": "constant", "optimizer": optimizer} | more
    result = fxopt.Trainer(callbacks=[seen, average, stopping], **settings).fit(model := Numbered(), fxopt.Loader(data(), 2, shuffle=True), resume=resume)
    return {"samples": seen.samples, "losses": result.losses, "weights": {name: value.detach().numpy().copy() for name, value in model.named_parameters()},
            "first": result.first_step, "checkpoint": str(result.checkpoint)}


def on(world: int, *arguments: Any, **more: Any) -> list[dict[str, Any]]:
    return together(world, lambda rank: going_on(*arguments, **more)) if world > 1 else [going_on(*arguments, **more)]


def state_of(checkpoint: str | Path) -> Any:
    """All that a checkpoint says of weights, optimizers and callbacks, whole."""
    found = snapshot.read(Path(checkpoint))
    return wholes([found.weights, found.shared["optimizers"], found.shared["callbacks"]])


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    return len(one) == len(other) and all(map(equal, one, other)) if isinstance(one, (list, tuple)) else one == other


KINDS = [(("fsdp", 2), ("single", 1)), (("single", 1), ("fsdp", 2)), (("ddp", 2), ("single", 1))]
MORE = [(("fsdp", 2), ("fsdp", 4)), (("fsdp", 4), ("fsdp", 2)), (("fsdp", 4), ("ddp", 2)), (("single", 1), ("ddp", 4)), (("ddp", 2), ("fsdp", 2))]


@pytest.mark.parametrize("first, second", KINDS + [pytest.param(*kind, marks=pytest.mark.slow) for kind in MORE], ids=str)
def test_a_run_goes_on_with_another_number(tmp_path: Path, first: tuple[str, int], second: tuple[str, int]) -> None:
    begun = on(first[1], tmp_path / "run", first[0], 4 // first[1])
    # read, and written again with nothing trained in between
    again = on(second[1], tmp_path / "again", second[0], 4 // first[1], resume=Path(begun[0]["checkpoint"]))
    assert equal(state_of(begun[0]["checkpoint"]), state_of(again[0]["checkpoint"]))
    rest = on(second[1], tmp_path / "run", second[0], 4 // first[1] + 4 // second[1])
    assert sorted(sample for each in (*begun, *rest) for sample in each["samples"]) == list(range(16)), "every sample of the epoch once"
    for each in rest:
        assert each["first"] == 4 // first[1]
        assert all(np.array_equal(each["weights"][name], value) for name, value in rest[0]["weights"].items())


def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """With as many processes: bit by bit, also in the middle of a step, with averages of 8 bits, whose scales are a rank's own."""
    more = {"optimizer": "adamw_8bit", "accumulate": 2, "checkpoints": Checkpoints(unit="batch", keep=99)}
    (whole, *_) = on(2, tmp_path / "whole", "fsdp", 4, **more)
    for name in ("step-00000001-epoch-0000", "step-00000001-epoch-0000-batch-001"):
        (rest, *_) = on(2, tmp_path / name, "fsdp", 4, resume=tmp_path / "whole" / "checkpoints" / name, **more)
        assert rest["losses"] == whole["losses"][1:]
        assert all(np.array_equal(rest["weights"][key], value) for key, value in whole["weights"].items())


def test_what_another_number_cannot_take_over_is_said(tmp_path: Path) -> None:
    """The middle of a step; batches that do not divide; averages of 8 bits; a damaged piece, for which the checkpoint before it is taken."""
    more = {"accumulate": 2, "checkpoints": Checkpoints(unit="batch", keep=99)}
    on(2, tmp_path / "run", "fsdp", 2, optimizer="adamw_8bit", **more)
    paths = snapshot.checkpoints(tmp_path / "run" / "checkpoints")
    middle = next(path for path in paths if path.name.endswith("batch-001"))
    with pytest.raises(DataError, match="the middle of a step of 2 processes"):
        going_on(tmp_path / "a", "single", 2, resume=middle, optimizer="adamw_8bit", **more)
    with pytest.raises(DataError, match="laid out for 2 processes"):
        going_on(tmp_path / "b", "single", 2, resume=paths[-1], optimizer="adamw_8bit", **more)
    going_on(tmp_path / "odd", "single", 3)
    with pytest.raises(AssertionError, match="3 batches were used by 1 ranks"):
        on(2, tmp_path / "odd", "fsdp", 4)
    piece = paths[-1] / "pieces-1.safetensors"
    data = bytearray(piece.read_bytes())
    data[-1] ^= 1
    piece.write_bytes(data)
    found = snapshot.newest_good(tmp_path / "run" / "checkpoints")
    assert found is not None and found[0] == paths[-2]
