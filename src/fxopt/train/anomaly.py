"""Where a number stopped being finite: the first node of the graph whose value is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxopt.ir.capture import Call
from fxopt.runtime.binding import live_state
from fxopt.runtime.locate import locate
from fxopt.torch_private import pytree
from fxopt.train.batch import Batch, call
from fxopt.train.randomness import isolated
from fxopt.train.task import changing_buffers


def _bad(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any() or (leaf == torch.inf).any()) for leaf in pytree.tree_leaves(value))


def first_not_finite(model: nn.Module, batch: Batch) -> str:
    """The operation (of an optimized model) or the module (of another) that first makes NaN or infinity of a batch out of finite numbers,
    with its place in the user's code; empty if none does. Nothing is changed."""
    if _bad(batch):
        return "its inputs"
    buffers = {name: buffer.clone() for name, buffer in changing_buffers(model).items()}  # running statistics
    try:
        with isolated():
            return _in_graph(model, batch) if callable(getattr(type(model), "prepare", None)) else _in_modules(model, batch)
    finally:
        with torch.no_grad():
            held = dict(model.named_buffers())
            for name, buffer in buffers.items():
                held[name].copy_(buffer)


def _in_graph(model: Any, batch: Batch) -> str:
    program = model.prepare(batch)
    if program is None:  # it runs in parts
        return _in_modules(model.model, batch)
    given = Call.of((), dict(batch)) if isinstance(batch, dict) else Call.of(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})
    found = locate(program, given.tensors, live_state(model.model, [name for name in program.slots if name not in program.constants]))
    return "" if found is None else f"`{found.node}` in the {found.phase}" + (f" ({found.source})" if found.source else "")


def _in_modules(model: nn.Module, batch: Batch) -> str:
    found: list[str] = []

    def hook(path: str) -> Any:
        def see(module: nn.Module, given: Any, output: Any) -> None:
            if not found and _bad(output) and not _bad(given):
                found.append(f"{path or '(the model)'}: {type(module).__name__}")
        return see

    handles = [module.register_forward_hook(hook(path)) for path, module in model.named_modules()]
    try:
        with torch.no_grad():
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""
