"""What the code of a model keeps on its modules from call to call, beside parameters and buffers: counters, caches, results put aside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

_NUMBERS = (bool, int, float)


def numbers(model: nn.Module) -> dict[tuple[int, str], Any]:
    """The plain numbers on modules, by the identity of the module's attributes and their name."""
    return {(id(module.__dict__), name): value for module in model.modules() for name, value in module.__dict__.items() if type(value) in _NUMBERS}


@contextlib.contextmanager
def kept_numbers(model: nn.Module) -> Iterator[None]:
    """Plain numbers on modules are behind the block what they were before it."""
    before = numbers(model)
    try:
        yield
    finally:
        for module in model.modules():
            for name, value in list(module.__dict__.items()):
                if type(value) in _NUMBERS and before.get((id(module.__dict__), name), value) is not value:
                    module.__dict__[name] = before[id(module.__dict__), name]


class Changed:
    """The attributes that calls changed so far, as `module.name`: plain numbers, and others (tensors, and containers that grew)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.numbers: set[str] = set()
        self.others: set[str] = set()
        self._before: dict[tuple[str, str], Any] = {}

    def _now(self) -> dict[tuple[str, str], Any]:
        return {(path, name): (value, len(value)) if isinstance(value, (list, dict, set)) else (value, None)
                for path, module in self.model.named_modules() for name, value in module.__dict__.items() if not name.startswith("_") or type(value) in _NUMBERS}

    def begin(self) -> None:
        """Remember what there is."""
        self._before = self._now()

    def end(self) -> None:
        """Compare with what was there at `begin`."""
        for (path, name), (value, length) in self._now().items():
            old, held = self._before.get((path, name), (None, None))
            said = f"{path}.{name}".lstrip(".")
            if type(value) in _NUMBERS and type(old) in _NUMBERS:
                self.numbers |= {said} if value != old else set()
            elif isinstance(value, torch.Tensor) and value is not old or length is not None and length != held:
                self.others.add(said)


@contextlib.contextmanager
def changed(model: nn.Module) -> Iterator[Changed]:
    """What calls of the model inside of the block change."""
    found = Changed(model)
    handles = [model.register_forward_pre_hook(lambda module, args: found.begin()), model.register_forward_hook(lambda module, args, output: found.end())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
