"""Calls of other sizes than the example's, and the largest that a memory budget holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.errors import CallError
from fxopt.runtime.memory import Allocations
from fxopt.runtime.plan import Plan, size

LARGEST = 1 << 20  # samples or tokens that are tried


def resized(tensors: Sequence[torch.Tensor], symbolic: Sequence[Sequence[Any]], batch: int | None = None, length: int | None = None) -> list[torch.Tensor]:
    """The tensors of a call with another number of samples or another length; their values are repeated.

    Args:
        symbolic: their shapes as captured; a fixed size is an int. The samples lie along the first dimensions, the length along the second.
        batch, length: 1 or more; None keeps the present one.

    Raises:
        CallError: the size is fixed in the captured graph, or no size.
    """
    found = list(tensors)
    for dim, (wanted, name) in enumerate(((batch, "batch"), (length, "length"))):
        if wanted is None:
            continue
        if not isinstance(wanted, int) or wanted < 1:
            raise CallError(f"{name} is {wanted!r}", do="give a whole number of 1 or more")
        # a second dimension that is another size than the others' (a vocabulary, an image's channels) is no length
        sizes = [t.shape[dim] for t, shape in zip(tensors, symbolic) if len(shape) > dim and not isinstance(shape[dim], int)]
        if not sizes:
            raise CallError(f"the captured graph has no {name} that could be another", do="capture with two samples or more, and several tokens")
        for at, (tensor, shape) in enumerate(zip(found, symbolic)):
            if len(shape) > dim and not isinstance(shape[dim], int) and tensors[at].shape[dim] == sizes[0]:
                found[at] = tensor.index_select(dim, torch.arange(wanted, device=tensor.device) % tensor.shape[dim])
    return found


def largest(plan: Callable[[int], Plan], limit: int) -> tuple[int, Plan]:
    """The largest size whose plan stays within a limit of bytes, by doubling and halving; needs grow with the size.

    Raises:
        CallError: even size 1 needs more, or the limit is no number.
    """
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise CallError(f"the memory is {limit!r}, which is no number of bytes", do="write for example 6 << 30")

    def fits(number: int) -> Plan | None:
        try:
            found = plan(number)
        except CallError:
            return None
        return found if found.peak.total <= limit else None

    low, best = 1, fits(1)
    if best is None:
        raise CallError(f"{size(limit)} cannot hold a step of size 1", do="give more memory, or a pass that saves some: memory, quantize")
    high = 2
    while high <= LARGEST and (found := fits(high)) is not None:
        low, best, high = high, found, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        found = fits(middle)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return low, best


@dataclass(frozen=True)
class Measured:
    """A step that was run: its peak in bytes, counted as a plan does, and the seconds of its forward and backward."""

    peak: int
    seconds: float

    def beside(self, plan: Plan) -> str:
        """Predicted and measured in two lines."""
        return (f"peak: predicted {size(plan.peak.total)}, measured {size(self.peak)} ({plan.peak.total / self.peak - 1:+.1%})\n"
                f"time: predicted {plan.seconds:.3g} s, measured {self.seconds:.3g} s ({plan.seconds / self.seconds - 1:+.1%})")


def measure(run: Callable[[], torch.Tensor], plan: Plan, parameters: Sequence[torch.Tensor], repeats: int = 3) -> Measured:
    """Run a step and its backward: once to warm up, once with the allocator watched, `repeats` times with the clock (the least counts).

    Args:
        run: gives the loss. plan: of the step; what it counts beside the activations is added to what the allocator saw.
        parameters: whose gradients are dropped before each run.

    Raises:
        CallError: there is none, so that no step can be run.
    """
    if not parameters:
        raise CallError("no parameter takes a gradient, so there is no step to measure", do="unfreeze some, or add adapters: --passes \"lora(rank=8) | ...\"")
    device = parameters[0].device

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        run().backward()

    step()
    for parameter in parameters:
        parameter.grad = None
    with Allocations(device) as allocations:
        run().backward()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    there = sum(plan.peak.parts.get(part, 0) for part in ("weights", "optimizer", "inputs"))
    return Measured(there + allocations.peak, min(times))
