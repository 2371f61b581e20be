"""torch.export with every size dynamic, or where that is too much, with those of images fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from fxopt.ir.torch_patches import LARGEST_SIZE, bounded_sizes
from fxopt.torch_private import buffer_hooks


def traced(model: nn.Module, examples: tuple[torch.Tensor, ...], note: Callable[[str], None]) -> Any:
    """The exported program of a model for tensors like these.

    Windows of an image that is padded to whole ones, and halved from stage to stage, have sizes whose expressions double with each step: one such
    model took more than 15 minutes. There the dimensions behind the second one of floating point tensors are fixed to the example's, which is
    noted: another size is captured on its own.
    """
    with bounded_sizes() as grew:
        try:
            return _export(model, examples, fixed=False)
        except Exception:
            if not grew:
                raise
    note(f"image sizes are fixed to those of the call: expressions of them grow beyond {LARGEST_SIZE} terms; each other size is captured on its own")
    return _export(model, examples, fixed=True)


def _export(model: nn.Module, examples: tuple[torch.Tensor, ...], fixed: bool) -> Any:
    sizes = tuple({d: torch.export.Dim.AUTO for d in range(min(t.dim(), 2) if fixed and t.is_floating_point() else t.dim())} for t in examples)
    places, hooks = [(module, dict(module._buffers)) for module in model.modules() if module._buffers], dict(buffer_hooks)
    try:
        return torch.export.export(model, examples, dynamic_shapes=(sizes,), strict=False)
    finally:
        # An export that fails under torch 2.11 leaves fake tensors where the code has put others in a buffer's place, and its hook on all
        # modules, which refuses real ones.
        for module, held in places:
            module._buffers.update(held)
        buffer_hooks.clear()
        buffer_hooks.update(hooks)
