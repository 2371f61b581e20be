"""How much each module of a model multiplies, in one call of the original code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from fxopt.torch_private import TorchDispatchMode

_ATTENTION_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # which torch 2.13 does not count


class _Counter(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _ATTENTION_CPU:
            self.total += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@dataclass
class Share:
    """FLOPs of products (matrices, convolutions, attention, as torch counts them): inside a module's calls, and in the model's call
    before the first and behind the last of them. Units: FLOPs, one multiplication and one addition are two."""

    inside: int = 0
    before: int = 0
    behind: int = 0


def flops(model: nn.Module, run: Callable[[], Any]) -> tuple[dict[nn.Module, Share], int]:
    """The share of every module that `run` calls, and the total. Runs once, in the caller's grad mode: a model may ask autograd for derivatives."""
    counter = _Counter()
    found: dict[nn.Module, Share] = {}
    begun: list[tuple[nn.Module, int]] = []
    handles = []

    def enter(module: nn.Module, args: Any) -> None:
        begun.append((module, counter.total))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        now = counter.total
        while begun:
            who, then = begun.pop()
            if who is module:
                share = found.setdefault(module, Share(before=then))
                if not any(other is module for other, _ in begun):
                    share.inside += now - then
                share.behind = now
                break

    for module in model.modules():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with counter:
            run()
    finally:
        for handle in handles:
            handle.remove()
    total = counter.total
    for share in found.values():
        share.behind = total - share.behind
    return found, total
