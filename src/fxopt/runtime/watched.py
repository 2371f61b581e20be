"""What a captured program takes for granted of the model's Python side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn as nn

from fxopt.ir import regions


class Watched:
    """What of a model's Python side a captured program depends on: submodules, plain attributes, hooks."""

    def __init__(self, model: nn.Module, called: str = "") -> None:
        """`called`: path of the module whose call runs the program, hooks included; "" for the model itself."""
        modules = list(model.named_modules())
        blocks = {"", called, *regions.repeated_blocks(model)}
        self.children = [(m._modules, name, child, f"{path}.{name}".strip(".")) for path, m in modules for name, child in m._modules.items()]
        self.plain = [(m.__dict__, name) for _, m in modules for name, value in m.__dict__.items()
                      if name == "training" or (not name.startswith("_") and isinstance(value, (bool, int, float, str)))]
        self.hooked = [(path, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)) for path, m in modules if path not in blocks]

    def stale(self) -> str:
        """The path of a submodule that was replaced since, or ""."""
        return next((path for store, name, child, path in self.children if store.get(name) is not child), "")

    def attributes(self) -> tuple[Any, ...]:
        """The present values of the plain attributes (a dropout's p, a scale, the mode of every module)."""
        return tuple([found.get(name) for found, name in self.plain])

    def hooks(self, note: Callable[[str], None]) -> None:
        """Say which hooks will not run."""
        for path, kinds in self.hooked:
            if any(kinds):
                note(f"hooks of {path} do not run with the graph: put them on a block, or on parameters")
