"""How much of a model runs as graphs: its programs by module path, and the shares of its parameters and of its matrix products."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from fxopt.api import Optimized
from fxopt.ir.program import Program
from fxopt.runtime.flops import flops
from tests.zoo.entry import Batch, call_of


def programs(opt: Optimized) -> dict[str, Program]:
    """The program of each captured module, by its path: one, of the root, if the model was captured whole. Of a part that has programs for
    several kinds of its calls, the first."""
    return {part.name: part.programs[0] for part in opt.parts if part.captured} if opt.parts else {"": opt.program}


def captures(opt: Optimized) -> int:
    """How many programs the model has, or the part that has most."""
    return max(len(part.programs) for part in opt.parts) if opt.parts else sum(map(len, opt.dispatcher.entries.values()))


def left_out(opt: Optimized) -> str:
    """Why the model was not captured whole, with the lines that forced it; "" if it was."""
    found = {f"{part.reason} ({part.where})" if part.where else part.reason: part.name or "the model itself" for part in opt.parts if not part.captured}
    return "; ".join(f"{name}: {relative(reason)}" for reason, name in found.items())


def relative(text: str) -> str:
    """Without the folders that packages were installed in."""
    return re.sub(r"/[^ :]*/(site-packages|fxopt|tests)/", lambda found: "tests/" if found[1] == "tests" else "", text)


def shares(opt: Optimized, model: nn.Module, batch: Batch) -> tuple[float, float]:
    """The shares of the elements of all parameters, and of the operations of all matrix products of a forward, that are in graphs."""
    return _parameters(model, programs(opt)), _flops(model, batch, programs(opt))


def _parameters(model: nn.Module, captured: Mapping[str, Any]) -> float:
    inside = {id(p) for path in captured for p in model.get_submodule(path).parameters()}
    sizes = {id(p): p.numel() for p in model.parameters()}
    return sum(size for key, size in sizes.items() if key in inside) / max(1, sum(sizes.values()))


def _flops(model: nn.Module, batch: Batch, captured: Mapping[str, Any]) -> float:
    args, kwargs = call_of(batch)
    found, total = flops(model, lambda: model(*args, **kwargs))
    inside = [found.get(model.get_submodule(path)) for path in captured]
    return sum(share.inside for share in inside if share is not None) / max(1, total)
