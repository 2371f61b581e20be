"""A small classifier, its batches, a run of it, and a callback that writes down every event."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxopt.train.callbacks import EVENTS, Callback
from fxopt.train.trainer import fit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.drop = nn.Linear(4, 6), nn.Linear(6, 3), nn.Dropout(0.1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.b(self.drop(self.a(x).relu()))
        return logits if y is None else {"loss": nn.functional.cross_entropy(logits, y), "logits": logits}


def batches(number: int = 6, size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)) for _ in range(number)]


def run(model: nn.Module | None = None, data: Any = None, val: Any = None, **more: Any) -> tuple[Any, nn.Module]:
    model = model or Net()
    return fit(model, data or batches(), val, **{"epochs": 1, "lr": 0.05, "progress": False, "seed": 0, **more}), model


class Everything(Callback):
    """Every event by name, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []


for _event in EVENTS:
    setattr(Everything, _event, lambda self, state, *rest, _event=_event: self.calls.append(_event.removeprefix("on_")))
