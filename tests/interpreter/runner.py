"""The interpreter in place of the GPU: a runner for `fxopt.kernels.launch`, and ops that start their Triton kernels on CPU tensors."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as stock
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.jit import JITFunction

from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.launch import Target, running
from fxopt.kernels.op import NAMESPACE, FusedOp, Kernel
from gate.build import check_types
from gate.record import Launch, with_kernels
from interpreter.memory import Memory
from interpreter.twins import BUILDER, interpreted_language, twin

# Few processors: kernels whose programs loop over rows do loop on small tensors.
SMALL = Target("cuda", 90, 227 * 1024, 3)
_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion"}


class Interpreter:
    """Runs launches in the interpreter.

    Args:
        virtual: tensors have addresses only (fake tensors do); the first, middle and last programs of each axis run.
        racy: names of kernels that declare float atomics, or memory that programs pass to each other.

    Attributes:
        launches: how often each kernel was started.
    """

    def __init__(self, virtual: bool = False, racy: Iterable[str] = ()) -> None:
        self.virtual, self.racy = virtual, frozenset(racy)
        self.launches: Counter[str] = Counter()

    def __call__(self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], meta: dict[str, Any]) -> None:
        if not isinstance(kernel, JITFunction):
            raise TypeError(f"{kernel!r} is no @triton.jit function: heuristics and autotuning are done in the launcher")
        name = kernel.fn.__name__
        self.launches[name] += 1
        memory = Memory(name, self.virtual, name in self.racy)
        bound = inspect.signature(kernel.fn).bind(*args, **{key: value for key, value in meta.items() if key not in _OPTIONS})
        bound.apply_defaults()
        parameters = {parameter.name: parameter for parameter in kernel.params}
        with _disable_current_modes():
            check_types(Launch(kernel, grid, tuple(args), meta, frozenset()), SMALL)
        with interpreted_language(), _disable_current_modes(), np.errstate(all="ignore"):
            values = {key: value if parameters[key].is_constexpr else _argument(memory, key, value, parameters[key].do_not_specialize)
                      for key, value in bound.arguments.items()}  # fmt: skip
            full = (*grid, 1, 1)[:3]
            function, before = twin(kernel).rewrite(), BUILDER.memory
            BUILDER.set_grid_dim(*full)
            BUILDER.memory = memory
            try:
                for program in itertools.product(*(_corners(size) if self.virtual else range(size) for size in full)):
                    BUILDER.set_grid_idx(*program)
                    function(**values)
            finally:
                BUILDER.memory = before


def _corners(size: int) -> list[int]:
    return sorted({0, size // 2, size - 1})


def _argument(memory: Memory, name: str, value: Any, general: bool) -> Any:
    """What the kernel gets, by the rules of a launch: a float is fp32, an int 1 is a constant, a tensor is its address."""
    if isinstance(value, torch.Tensor):
        kind = tl.pointer_type(_ELEMENTS[value.dtype])
        return tl.tensor(stock.TensorHandle(np.array([memory.place(name, value)], dtype=np.uint64), kind), kind)
    if isinstance(value, bool):
        return tl.tensor(stock.TensorHandle(np.array([value]), tl.int1), tl.int1)
    if isinstance(value, float):
        return tl.tensor(stock.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    if isinstance(value, int) and (value != 1 or general):
        return stock._implicit_cvt(value)
    if value is None or value == 1:
        return value
    raise TypeError(f"{name}={value!r}: kernels take tensors, numbers and None; anything else is a tl.constexpr")


_ELEMENTS = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5, torch.int64: tl.int64, torch.int32: tl.int32,
    torch.int16: tl.int16, torch.int8: tl.int8, torch.uint8: tl.uint8, torch.bool: tl.int1,
}  # fmt: skip


@dataclass
class Calls:
    """What ops did while they were interpreted."""

    runner: Interpreter
    calls: Counter[tuple[str, str, torch.dtype | None]] = field(default_factory=Counter)
    """Calls of (op, operator, dtype that it computes in) that had anything to compute."""
    started: Counter[tuple[str, str, torch.dtype | None]] = field(default_factory=Counter)
    """Those of them that started a kernel."""

    def idle(self, operators: bool) -> list[str]:
        """Ops (or each of their operators) that were called and never started a kernel, fp64 aside."""

        def names(counts: Counter[tuple[str, str, torch.dtype | None]]) -> set[str]:
            return {f"{operator} in {dtype}" if operators else op for (op, operator, dtype), count in counts.items() if count and dtype != torch.float64}

        return sorted(names(self.calls) - names(self.started))


def launcher(kernel: Kernel) -> Callable:
    """The function that starts the operator's Triton kernels."""
    assert kernel.cuda is not None
    module, _, function = kernel.cuda.partition(":")
    return getattr(importlib.import_module(module), function)


@contextlib.contextmanager
def interpreted(
    ops: Iterable[FusedOp] = CATALOG, target: Target = SMALL, racy: Iterable[str] = (), must_start: str = "ops"
) -> Iterator[Calls]:
    """Inside, these ops run their Triton kernels on CPU tensors; at the end, each that was called must have started one.

    Memory that a launcher allocates holds NaN (integers: their maximum) until a kernel writes it. The ATen body of an op
    may be called for fp64 only.

    Args:
        must_start: which of what was called must have started a kernel in at least one of the calls: "operators" (forward and
            backward, in each dtype), "ops", or "nothing" where there may be nothing to compute.
    """
    library = torch.library.Library(NAMESPACE, "IMPL")
    record = Calls(Interpreter(racy=racy))
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(running(record.runner, target))
            for op in ops:
                for kernel in op.kernels:
                    if kernel.cuda is not None:
                        library.impl(kernel.name, _watched(record, op, kernel), "CPU")
                        stack.enter_context(_no_body(kernel))
            yield record
    finally:
        library._destroy()
    idle = [] if must_start == "nothing" else record.idle(must_start == "operators")
    assert not idle, f"called, but no Triton kernel was started: {', '.join(idle)}"


def _watched(record: Calls, op: FusedOp, kernel: Kernel) -> Callable:
    start = launcher(kernel)

    def call(*args: Any) -> Any:
        before = record.runner.launches.total()
        with _poisoned_memory():
            results = start(*args)
        tensors = [part for part in (results if isinstance(results, (tuple, list)) else (results,)) if part is not None]
        if any(part.numel() for part in tensors):
            key = (op.name, kernel.name, dtype_of(args))
            record.calls[key] += 1
            record.started[key] += record.runner.launches.total() > before
        return results

    return call


def dtype_of(args: Iterable[Any]) -> torch.dtype | None:
    """The dtype that a call computes in: fp64 if any argument says so, else that of the first floating tensor."""
    flat = [part for arg in args for part in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    given = [arg if isinstance(arg, torch.dtype) else getattr(arg, "dtype", None) for arg in flat]
    return torch.float64 if torch.float64 in given else next((dtype for dtype in given if dtype and dtype.is_floating_point), None)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors of torch.empty hold NaN: a test would not notice reads of memory that happens to be zero."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def _no_body(kernel: Kernel) -> Iterator[None]:
    """The ATen body raises when it is called for anything but fp64: a launcher that hands over to it is no kernel."""
    module, name = inspect.getmodule(kernel.body), kernel.body.__name__

    def refuse(*args: Any) -> Any:
        if dtype_of(args) != torch.float64:
            raise AssertionError(f"the launcher of {kernel.name} called the ATen body in {dtype_of(args)}")
        return kernel.body(*args)

    setattr(module, name, refuse)
    try:
        yield
    finally:
        setattr(module, name, kernel.body)
