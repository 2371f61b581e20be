"""The one way to start a Triton kernel, and what its configuration may depend on.

A launcher (`kernels/*/triton.py`) picks block sizes and warps by plain Python from shapes, dtypes and `target()`, never by
timing and never from tensor values, so that the configurations that ship can be listed, compiled and checked without a GPU.
Tests put a runner in place of the GPU: an interpreter, or a recorder of what would have been started.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Target:
    """What a launcher may know of the device.

    Attributes:
        backend: "cuda" or "hip". arch: 80, 90, 100 (compute capability times ten), or "gfx942".
        shared: bytes of shared memory that one program may use.
        processors: streaming multiprocessors (compute units).
        warp: threads in a warp.
    """

    backend: str
    arch: int | str
    shared: int
    processors: int
    warp: int = 32


# What `make kernels` compiles for. Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability" (163 KB, 227 KB); AMD CDNA3 ISA (64 KB of LDS). Processors of A100, H100 SXM, B200, MI300X.
TARGETS = (
    Target("cuda", 80, 163 * 1024, 108),
    Target("cuda", 90, 227 * 1024, 132),
    Target("cuda", 100, 227 * 1024, 148),
    Target("hip", "gfx942", 64 * 1024, 304, 64),
)


class Runner(Protocol):
    """Starts `kernel` with `grid` programs in place of the GPU."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], meta: dict[str, Any]) -> None: ...


_STACK: list[tuple[Runner, Target]] = []


@contextlib.contextmanager
def running(runner: Runner, target: Target) -> Iterator[None]:
    """Inside, kernels go to `runner` and launchers see `target`. Not for threads."""
    _STACK.append((runner, target))
    try:
        yield
    finally:
        _STACK.pop()


def target() -> Target:
    """The target of the current device, or the one that a test set."""
    return _STACK[-1][1] if _STACK else _of_device(torch.cuda.current_device())


@functools.cache
def _of_device(index: int) -> Target:
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Target("hip", found.gcnArchName.partition(":")[0], 64 * 1024, found.multi_processor_count, found.warp_size)
    shared = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    return Target("cuda", found.major * 10 + found.minor, shared, found.multi_processor_count)


def launch(kernel: Any, grid: Sequence[int], *args: Any, **meta: Any) -> None:
    """Start a `@triton.jit` kernel; an empty grid starts nothing.

    Args:
        kernel: the jitted function. grid: programs in up to three dimensions.
        args: positional arguments: tensors, ints, floats. meta: constexprs, num_warps, num_stages.
    """
    if math.prod(grid) == 0:
        return
    if _STACK:
        _STACK[-1][0](kernel, tuple(grid), args, meta)
        return
    first = next(arg for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device(first.device):
        kernel[tuple(grid)](*args, **meta)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, int(n) - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
