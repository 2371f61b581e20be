"""The trainer costs what the bare loop costs."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxopt.runtime.optim import AdamW
from fxopt.train.schedule import make_schedule
from fxopt.train.trainer import Trainer

STEPS, ROUNDS = 20, 40
# Of a step of 4 ms on one thread; larger steps hide more.
ALLOWED = 0.02


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.body(x), y)


def bare(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    optimizer, factor, losses = AdamW(list(model.parameters()), lr=1e-3, weight_decay=0.0), make_schedule("cosine", len(data)), []
    for step, (x, y) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor(step)
        optimizer.zero_grad(set_to_none=True)
        loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    return Trainer(epochs=1, lr=1e-3, progress=False).fit(model, data).losses


def test_the_bare_loop_gives_the_same_losses() -> None:
    data = [(torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,))) for _ in range(5)]
    assert bare(Net(), data) == trained(Net(), data)


@pytest.mark.slow
def test_the_trainer_costs_what_the_bare_loop_costs() -> None:
    """Processor time, the least of some rounds in turn: others may use the machine meanwhile."""
    data = [(torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))) for _ in range(STEPS)]
    times: dict[Callable[..., object], list[float]] = {bare: [], trained: []}
    for _ in range(ROUNDS):
        for loop, found in times.items():
            model, began = Net(), time.process_time()
            loop(model, data)
            found.append(time.process_time() - began)
    assert min(times[trained]) <= (1 + ALLOWED) * min(times[bare]), {loop.__name__: min(found) / STEPS for loop, found in times.items()}
