"""What a captured program takes for granted of the model's Python side."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch.nn as nn

from fxopt.ir import regions


_KIND = attrgetter("requires_grad", "dtype", "shape")


class Snapshot:
    """Values that are looked up at every call and seldom change: as long as they do not, one object stands for them, hashed once."""

    __slots__ = ("values", "_hash")

    def __init__(self, values: list[Any]) -> None:
        self.values, self._hash = values, hash(tuple(values))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or isinstance(other, Snapshot) and self.values == other.values


class Watched:
    """What of a model's Python side a captured program depends on: submodules, plain attributes, parameters, hooks.

    All of it is read at every call. Of 300 parameters in 227 modules that takes 0.13 ms; a walk through `model.parameters()` alone
    takes 0.5.
    """

    def __init__(self, model: nn.Module, called: str = "") -> None:
        """`called`: path of the module whose call runs the program, hooks included; "" for the model itself."""
        modules = list(model.named_modules())
        blocks = {"", called, *regions.repeated_blocks(model)}
        self.children = [(m._modules, name, child, f"{path}.{name}".strip(".")) for path, m in modules for name, child in m._modules.items()]
        self.plain = [(m.__dict__, name) for _, m in modules for name, value in m.__dict__.items()
                      if name == "training" or (not name.startswith("_") and isinstance(value, (bool, int, float, str)))]
        self.stores = [m._parameters for _, m in modules]
        self._attributes = self._parameters = Snapshot([])
        self._find_parameters()
        self.hooked = [(path, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)) for path, m in modules if path not in blocks]

    def stale(self) -> str:
        """The path of a submodule that was replaced since, or ""."""
        return next((path for store, name, child, path in self.children if store.get(name) is not child), "")

    def attributes(self) -> Snapshot:
        """The present values of the plain attributes (a dropout's p, a scale, the mode of every module)."""
        values = [found.get(name) for found, name in self.plain]
        if values != self._attributes.values:
            self._attributes = Snapshot(values)
        return self._attributes

    def parameters(self) -> Snapshot:
        """Of every parameter: whether it takes a gradient, its dtype and its shape."""
        if sum(map(len, self.stores)) != self.count or any(store.get(name) is not None for store, name in self.absent):
            self._find_parameters()
        try:
            values = [_KIND(store[name]) for store, name in self.present]
        except (KeyError, AttributeError):  # one is gone
            self._find_parameters()
            values = [_KIND(store[name]) for store, name in self.present]
        if values != self._parameters.values:
            self._parameters = Snapshot(values)
        return self._parameters

    def _find_parameters(self) -> None:
        """Where parameters are, and where a module has a name for one and none."""
        places = [(store, name, value is not None) for store in self.stores for name, value in store.items()]
        self.count = len(places)
        self.present = [(store, name) for store, name, there in places if there]
        self.absent = [(store, name) for store, name, there in places if not there]

    def hooks(self, note: Callable[[str], None]) -> None:
        """Say which hooks will not run."""
        for path, kinds in self.hooked:
            if any(kinds):
                note(f"hooks of {path} do not run with the graph: put them on a block, or on parameters")
