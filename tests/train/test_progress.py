"""The progress line: what it says is what was measured, and where the plan is asked its numbers are the plan's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.runtime.machine import present
from fxopt.train import progress
from fxopt.train.callbacks import State, Step
from fxopt.train.progress import Progress, clock
from fxopt.train.saver import Checkpoints
from fxopt.train.utilization import elements, work
from tests.train.small import Net, batches, run


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)).square().mean()


def state_of(model: nn.Module, step: int, seconds: float, **more: Any) -> State:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return State(model, optimizer, 100, [Step(0.5, 0.1, 1.0, 300, 4, seconds)] * step, optimizers=[optimizer], **more)


def test_the_flops_are_those_of_the_products() -> None:
    batch = (torch.randn(32, 64),)
    opt = fxopt.optimize(Two(), inputs=batch)
    opt(*batch)
    state = state_of(opt, 8, 0.5)
    found = work(opt, state.optimizers, batch)
    products = 2 * 32 * (64 * 128 + 128 * 64)  # of the forward; the backward has two for each but the input's of the first
    assert found.flops * elements(batch) == 3 * products - 2 * 32 * 64 * 128 and found.peak == present().flops["float32"]
    shown = Progress()
    shown.on_fit_start(state)
    shown.work = found
    shown.elements.extend([elements(batch)] * 8)
    assert f"MFU {found.flops * elements(batch) / 0.5 / found.peak:.1%}" in shown.line(state)
    plain = work(Two(), [], batch)
    assert plain.flops is None and plain.says(1, 4, 2.0) == f"{plain.moved * 2 / 1e9:.3g} GB/s" and plain.moved == 4 * sum(p.nbytes for p in Two().parameters())


@pytest.mark.parametrize(("saves", "seconds"), [(None, None), (Checkpoints(every=10, unit="step"), 2), (Checkpoints(every=2), 2 + 10), (Checkpoints(every=7, unit="batch"), 3)])
def test_the_next_checkpoint(saves: Checkpoints | None, seconds: int | None) -> None:
    state = state_of(Two(), 0, 1.0, batches=10)
    shown = Progress(saves=saves)
    shown.on_fit_start(state)
    state.history, state.batch = [Step(0.5, 0.1, 1.0, 0, 4, 1.0)] * 8, 8
    if saves is not None and saves.unit == "batch":
        state.batch = 4
        state.history = state.history[:4]
    line = shown.line(state)
    assert ("save in" in line) == (seconds is not None) and (seconds is None or f"save in {clock(seconds)}" in line), line
    assert f"{clock(100 - state.step)} left" in line and "steps/s" in line


def test_lines_are_plain_where_nobody_watches(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "ASKED", 0.0)
    opt = fxopt.optimize(Net(), inputs=batches(1)[0])
    run(opt, progress=True, output_dir=tmp_path)
    told = capfd.readouterr().err
    assert re.search(r"memory: predicted .+, measured .+", told) and "MFU" in told and "\x1b" not in told
    assert re.search(r"step 6/6 · loss \d\.\d{4} · [\d,.]+ steps/s · MFU .+% · peak .+ GiB · 0:00 left", told)
