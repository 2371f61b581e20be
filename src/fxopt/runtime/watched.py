"""What a captured program takes for granted of the model's Python side."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Container
from dataclasses import is_dataclass
from operator import attrgetter, is_
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn

from fxopt.ir import regions
from fxopt.torch_private import tensor_guards

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
    """What of a model's Python side a captured program depends on: submodules, plain attributes, settings (see `_settings`), parameters, hooks.

    All of it is read at every call, by loops that run in C: of 300 parameters in 242 modules with 632 plain attributes that takes 0.08 ms.
    To read the kinds of the parameters one by one alone takes 0.19, a walk through `model.parameters()` 0.5.
    """

    def __init__(self, model: nn.Module, called: str = "", ignored: Container[str] = ()) -> None:
        """`called`: path of the module whose call runs the program, hooks included; "" for the model itself. `ignored`: paths of plain
        attributes that no program depends on."""
        modules = list(model.named_modules())
        blocks = {"", called, *regions.repeated_blocks(model)}
        settings = [(m.__dict__, name, value, f"{path}.{name}".strip(".")) for path, m in modules for name, value in m.__dict__.items()
                    if not name.startswith("_") and _settings(value)]
        self.children = [(m._modules, name, child, f"{path}.{name}".strip(".")) for path, m in modules for name, child in m._modules.items()] + settings
        self.present_children = [child for _, _, child, _ in self.children]
        self.places = [store for store, _, _, _ in self.children], [name for _, name, _, _ in self.children]
        plain = [(m.__dict__, name) for path, m in modules for name, value in m.__dict__.items()
                 if name == "training" or (not name.startswith("_") and isinstance(value, (bool, int, float, str)) and f"{path}.{name}".strip(".") not in ignored)]
        fields = {id(value): vars(value) for _, _, value, _ in settings}
        plain += [(held, name) for held in fields.values() for name, value in held.items() if value is None or isinstance(value, (bool, int, float, str))]
        self.plain = [found for found, _ in plain], [name for _, name in plain]
        self.stores = [m._parameters for _, m in modules]
        self._attributes = self._parameters = Snapshot([])
        self._find_parameters()
        self.hooked = [(path, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)) for path, m in modules if path not in blocks]
        self.hooks_of_all = [store for _, kinds in self.hooked for store in kinds]

    def stale(self) -> str:
        """The path of a submodule, or of an object with settings, that was replaced since, or ""."""
        if all(map(is_, map(dict.get, *self.places), self.present_children)):
            return ""
        return next((path for store, name, child, path in self.children if store.get(name) is not child), "")

    def attributes(self) -> Snapshot:
        """The present values of the plain attributes (a dropout's p, a scale, the mode of every module) and of the settings."""
        values = list(map(dict.get, *self.plain))
        if values != self._attributes.values:
            self._attributes = Snapshot(values)
        return self._attributes

    def parameters(self) -> Snapshot:
        """Of every parameter: whether it takes a gradient, its dtype and its shape."""
        if sum(map(len, self.stores)) != self.count or any(value is not None for value in map(dict.get, *self.absent)):
            self._find_parameters()
        tensors = list(map(dict.get, *self.present))
        if self._unchanged(tensors):
            return self._parameters
        if not all(isinstance(t, torch.Tensor) for t in tensors):  # one is gone
            self._find_parameters()
            tensors = list(map(dict.get, *self.present))
        values = list(map(_KIND, tensors))
        if values != self._parameters.values:
            self._parameters = Snapshot(values)
        self._unchanged = _unchanged(tensors)
        return self._parameters

    def _find_parameters(self) -> None:
        """Where parameters are, and where a module has a name for one and none."""
        self._unchanged: Callable[[list[Any]], bool] = lambda tensors: False
        places = [(store, name, value is not None) for store in self.stores for name, value in store.items()]
        self.count = len(places)
        self.present, self.absent = (([store for store, _, there in places if there is wanted], [name for _, name, there in places if there is wanted]) for wanted in (True, False))

    def hooks(self, note: Callable[[str], None]) -> None:
        """Say which hooks will not run."""
        for path, kinds in self.hooked if any(self.hooks_of_all) else ():
            if any(kinds):
                note(f"hooks of {path} do not run with the graph: put them on a block, or on parameters")


def _settings(value: Any) -> bool:
    """Whether an attribute is an object whose own plain attributes say what a model does: a dataclass, a namespace, or what has a `to_dict`
    (the configurations of transformers and diffusers)."""
    kinds = isinstance(value, (Namespace, SimpleNamespace)) or is_dataclass(value) or hasattr(type(value), "to_dict")
    return kinds and not isinstance(value, (type, nn.Module)) and hasattr(value, "__dict__")


def _unchanged(tensors: list[Any]) -> Callable[[list[Any]], bool]:
    """Whether later tensors in the same places are of the same kinds (see `Watched.parameters`), asked in C; False may mean that it is not known.

    A tensor that is in several places (tied weights) is asked about once, and must be in all of them.
    """
    first: dict[int, int] = {}
    places = [first.setdefault(id(t), i) for i, t in enumerate(tensors)]
    check = tensor_guards([tensors[i] for i in first.values()])
    if len(first) == len(tensors):
        return lambda now: check(*now)
    alone, tied = list(first.values()), [(i, at) for i, at in enumerate(places) if i != at]
    return lambda now: check(*[now[i] for i in alone]) and all(now[i] is now[at] for i, at in tied)
