"""How fast this machine is, measured: what predicted times are made from."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fxopt.ir import meta
from fxopt.ir.program import Program
from fxopt.runtime.dry_run import Work

PRODUCT = 512  # rows and columns of the matrix products that are timed, at least


@dataclass(frozen=True)
class Machine:
    """Rates of a device with the present number of threads.

    Attributes:
        flops: floating point operations a second in matrix products, by dtype; "attention float32" in attention.
        bytes: read and written a second by operations on tensors larger than the caches.
        near: the same for tensors that fit into the caches.
        call: seconds that an operation costs beside.
        host: bytes a second from the device's memory to the host's, beside other work; 0 where they are one memory.
    """

    flops: dict[str, float]
    bytes: float
    near: float
    call: float
    host: float = 0.0

    def seconds(self, work: Work) -> float:
        """Time of some operations: products at their rate, others by the bytes that they move, and a cost of each call."""
        plain = self.flops["float32"]
        return sum(count / self.flops.get(kind, plain) for kind, count in work.flops.items()) + work.moved / self.bytes + work.near / self.near + work.calls * self.call


def _best(run: Callable[[], object], seconds: float) -> float:
    """The shortest time of one run, within about `seconds`."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def measured(device: str = "cpu", threads: int | None = None, seconds: float = 0.6) -> Machine:
    """Measure the machine once; `seconds` is about the time it takes in all.

    Args:
        device: "cpu" or "cuda". threads: the number of torch's threads that the numbers are for (None: whatever it is now).
    """
    del threads  # a key of the cache: other numbers hold for other numbers of threads
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    each = seconds / 7

    def timed(run: Callable[[], object]) -> float:
        return _best(lambda: (run(), wait()), each)

    generator = torch.Generator(device).manual_seed(0)  # a plan may be made in the middle of a step, whose random numbers it must not draw

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32, generator=generator)

    flops: dict[str, float] = {}
    with torch.no_grad(), torch.autocast(device, enabled=False):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a = drawn(PRODUCT, 1024).to(dtype)
            b = drawn(1024, 1024).to(dtype)
            flops[str(dtype).removeprefix("torch.")] = 2 * a.numel() * 1024 / timed(lambda a=a, b=b: a @ b.t())
        q = drawn(1, 8, PRODUCT, 64)
        name = "attention float32"
        flops[name] = 4 * 8 * PRODUCT * PRODUCT * 64 * 0.5 / timed(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
        x, y = drawn(1 << 23), torch.empty(1 << 23, device=device, dtype=torch.float32)
        moved = 2 * x.numel() * x.element_size() / timed(lambda: torch.mul(x, 2.0, out=y))
        x, y = drawn(1 << 17), torch.empty(1 << 17, device=device, dtype=torch.float32)
        near = 2 * x.numel() * x.element_size() / timed(lambda: torch.mul(x, 2.0, out=y))
        small = torch.ones(8, device=device)
        call = timed(lambda: small + small)
        host = 0.0
        if device == "cuda":
            y = torch.empty(1 << 23, dtype=torch.float32, pin_memory=True)
            x = drawn(1 << 23)
            host = x.numel() * x.element_size() / timed(lambda: y.copy_(x, non_blocking=True))
    return Machine(flops, moved, near, call, host)


def present(device: str = "cpu") -> Machine:
    """A device ("cpu" or "cuda") with its present number of threads; measured at the first call."""
    return measured(device, torch.get_num_threads())


def of(program: Program) -> Machine:
    """The machine that a program was captured for: that of its inputs."""
    devices = (value.device.type for node in program.placeholders if (value := meta.tensor(node)) is not None)
    return present(next(devices, "cpu"))
