"""A part of a model under its full name: what is captured of a module is named as from the root."""

from __future__ import annotations

import contextlib
from typing import Any

import torch.nn as nn

_CLASSES: dict[type, type[Shell]] = {}


class Shell(nn.Module):
    """A module that holds one part of a model at the part's path, and whose call is the part's forward.

    So parameters, adapters and quantized weights of the part have the names that they have in the model. Hooks of the part are left
    to those who call it. Each call runs inside of `around()`, a context. Where a tensor of the part is tied to one outside, the module that holds the other one is in the shell too.
    """

    def __init__(self, root: nn.Module, path: str) -> None:
        super().__init__()
        part = root.get_submodule(path)
        self.__dict__["part"], self.__dict__["path"] = part, path  # not a submodule: that is at its path
        self.__dict__["around"] = contextlib.nullcontext
        inside = {id(m) for m in part.modules()}
        held = {id(t) for t in (*part.parameters(), *part.buffers())}
        for name, module in root.named_modules():
            tied = id(module) not in inside and any(id(t) in held for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
            if module is part or tied and name and part not in set(module.modules()):
                self._mount(name, module)

    def _mount(self, path: str, module: nn.Module) -> None:
        holder: nn.Module = self
        *parents, last = path.split(".")
        for name in parents:
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder._modules[name]  # type: ignore[assignment]
        if last not in holder._modules:
            holder.add_module(last, module)

    @classmethod
    def of(cls, root: nn.Module, path: str) -> Shell:
        """The shell of a part, whose class is called like the part's."""
        kind = type(root.get_submodule(path))
        if kind not in _CLASSES:
            _CLASSES[kind] = type(kind.__name__, (cls,), {"__module__": __name__})
        return _CLASSES[kind](root, path)

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The part's mode."""
        return bool(self.__dict__["part"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # nn.Module.__init__ sets it; the part keeps its own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The part's own code."""
        part = self.__dict__["part"]
        with self.__dict__["around"]():
            return type(part).forward(part, *args, **kwargs)
