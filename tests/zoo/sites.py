"""Places in a model where a fused op could stand, counted while the model's own Python code runs.

The count knows nothing of graphs or patterns. A norm is a module that behaves like one; a gated MLP is a module that
holds the projections of one; rotations and losses are calls of the functions that compute them.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tests.zoo.entry import Batch, call_of

KINDS = ("RMSNorm", "LayerNorm", "gated MLP", "RoPE", "loss")
Sites = dict[str, Counter[str]]
"""For each kind, how many places there are in each module, by its path."""

_PAIRS = (("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"))
_MERGED = (("gate_up_proj", "down_proj"), ("Wi", "Wo"), ("input_linear", "output_linear"))
_ROTATION = re.compile(r"_?apply_(multimodal_)?rotary")
_SAME = 0.1  # what a probe of a norm may change by in 16 bits; anything else changes by about 1


def count(model: nn.Module, batch: Batch) -> Sites:
    """The places that one training step of `model` goes through."""
    sites: Sites = {kind: Counter() for kind in KINDS}
    names = {module: name for name, module in model.named_modules()}
    running: list[str] = []
    calls: list[tuple[nn.Module, tuple[Any, ...]]] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(names[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()
        if is_gated(module):
            sites["gated MLP"][names[module]] += 1
        if args and not list(module.children()) and _same_type(args[0], output) and all(p.shape == output.shape[-1:] for p in module.parameters()):
            calls.append((module, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)))

    def rotated(tensors: int) -> None:
        sites["RoPE"][running[-1]] += tensors

    def lost() -> None:
        sites["loss"][running[-1]] += 1

    handles = [hook for module in names for hook in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))]
    try:
        with _rotations(model, rotated), _Losses(lost):
            args, kwargs = call_of(batch)
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for module, args in calls:
        kind = norm(module, args)
        if kind is not None:
            sites[kind][names[module]] += 1
    return sites


def _same_type(a: Any, b: Any) -> bool:
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_floating_point() and a.dim() > 1 and a.shape == b.shape


def norm(module: nn.Module, args: tuple[Any, ...]) -> str | None:
    """Which norm of the last dimension a module computes, if any: the size of a row does not matter to a norm, and to a
    layer norm its mean does not either."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args[0].shape, generator=generator)
    factors = 2.0 ** torch.randint(0, 4, (*x.shape[:-1], 1), generator=generator)

    def change(other: torch.Tensor) -> float:
        with torch.no_grad():
            was, now = (module(given.to(args[0].dtype), *args[1:]).float() for given in (x, other))
        return float((was - now).norm() / was.norm().clamp_min(1e-9))

    if not float(change(-x)) > _SAME or change(x * factors) > _SAME:
        return None
    return "LayerNorm" if change(x + 3) <= _SAME else "RMSNorm"


def is_gated(module: nn.Module) -> bool:
    """Whether a module holds two projections of one input, of which one gates the other, apart or in one matrix."""
    parts = {**module._modules, **module._parameters}
    if any(parts.get(a) is not None and parts.get(b) is not None for a, b in _PAIRS):
        return True
    for merged, down in _MERGED:
        wide, narrow = (getattr(parts.get(name), "weight", parts.get(name)) for name in (merged, down))
        if isinstance(wide, torch.Tensor) and isinstance(narrow, torch.Tensor) and not set(wide.shape).isdisjoint(2 * size for size in narrow.shape[-2:]):
            return True
    return False


@contextlib.contextmanager
def _rotations(model: nn.Module, found: Callable[[int], None]) -> Iterator[None]:
    """Say how many tensors each rotation of queries and keys returns; the outermost function counts."""
    depth = 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                out = function(*args, **kwargs)
            finally:
                depth -= 1
            if not depth:
                found(sum(isinstance(x, torch.Tensor) for x in (out if isinstance(out, tuple) else (out,))))
            return out

        return call

    files = {sys.modules[type(module).__module__] for module in model.modules()}
    saved = [(file, name, value) for file in files for name, value in vars(file).items() if inspect.isfunction(value) and _ROTATION.match(name)]
    try:
        for file, name, value in saved:
            setattr(file, name, watched(value))
        yield
    finally:
        for file, name, value in saved:
            setattr(file, name, value)


class _Losses(TorchFunctionMode):
    """Says when a cross entropy is computed."""

    def __init__(self, found: Callable[[], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.cross_entropy:
            self.found()
        return func(*args, **(kwargs or {}))
