"""What launchers start: ops are called with fake tensors, and every kernel launch is noted instead of run."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.launch import Runner, Target, running
from fxopt.kernels.op import Case, FusedOp, Kernel


@dataclass(frozen=True)
class Launch:
    """One kernel start.

    Attributes:
        kernel: the jitted function. grid, args, meta: as given to `launch`; tensors are fake.
        inputs: names of the kernel's arguments that are memory of the caller, which must not be written.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]
    inputs: frozenset[str]


class _Operators(TorchDispatchMode):
    """Notes the calls of some operators with their arguments."""

    def __init__(self, op: FusedOp) -> None:
        super().__init__()
        self.kernels = {kernel.overload: kernel for kernel in op.kernels}
        self.calls: list[tuple[Kernel, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function in self.kernels:
            self.calls.append((self.kernels[function], args))
        return function(*args, **(kwargs or {}))


def rows(op: FusedOp) -> Iterator[tuple[str, Case]]:
    """The representative calls of an op."""
    return importlib.import_module(f"{op.folder}.cases").rows()


def cast(case: Case, dtype: torch.dtype) -> Case:
    """An fp32 case in another dtype, strides kept. What the case says is fixed, and the scales in lists that hold codes (a
    quantized weight), stay in fp32."""
    kept = {place for start, stop in case.lists if any(_coded(arg) for arg in case.args[start:stop]) for place in range(start, stop)} | set(case.fixed)

    def changed(arg: Any) -> Any:
        if isinstance(arg, torch.Tensor) and arg.dtype == torch.float32:
            cells = arg.as_strided((arg.untyped_storage().nbytes() // arg.element_size(),), (1,), 0)
            return cells.to(dtype).as_strided(arg.shape, arg.stride(), arg.storage_offset())
        return dtype if arg is torch.float32 else arg

    args = tuple(arg if place in kept else changed(arg) for place, arg in enumerate(case.args))
    return dataclasses.replace(case, args=args)


def _coded(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) and arg.element_size() == 1


def fake_calls(op: FusedOp, case: Case, mode: FakeTensorMode) -> list[tuple[Kernel, tuple[Any, ...]]]:
    """The operator calls, forward and backward, that one call of the op makes."""
    with mode, _Operators(op) as operators:
        leaves = [_leaf(mode, arg, place in case.grads) for place, arg in enumerate(case.args)]
        outputs = [out for out in op(*case.packed(leaves)) if isinstance(out, torch.Tensor) and out.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    return operators.calls


def _leaf(mode: FakeTensorMode, arg: Any, trained: bool) -> Any:
    if not isinstance(arg, torch.Tensor):
        return arg
    fake = arg if isinstance(arg, torch._subclasses.FakeTensor) else mode.from_tensor(arg)
    return fake.detach().requires_grad_(trained)


def run_launchers(
    op: FusedOp, case: Case, target: Target, runner: Callable[[Kernel, tuple[Any, ...]], Runner], mode: FakeTensorMode | None = None
) -> None:
    """Call the launchers that a call of the op on a device would call.

    Args:
        runner: (operator, its arguments) to what takes the place of the GPU during that call.
        mode: of the case's tensors where they are fake already.
    """
    mode = mode or FakeTensorMode()
    for kernel, args in fake_calls(op, case, mode):
        if kernel.cuda is not None:
            module, _, function = kernel.cuda.partition(":")
            start = getattr(importlib.import_module(module), function)
            with torch.no_grad(), mode, running(runner(kernel, args), target):
                start(*args)


def launches(op: FusedOp, case: Case, target: Target) -> list[Launch]:
    """Every kernel start of one forward and backward."""
    found: list[Launch] = []

    def runner(operator: Kernel, arguments: tuple[Any, ...]) -> Runner:
        inputs = _storages(operator, arguments)

        def record(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], meta: dict[str, Any]) -> None:
            theirs = frozenset(name for name, arg in zip(kernel.arg_names, args, strict=False) if _storage(arg) in inputs)
            found.append(Launch(kernel, grid, tuple(args), dict(meta), theirs))

        return record

    run_launchers(op, case, target, runner)
    return found


def _storages(operator: Kernel, arguments: tuple[Any, ...]) -> set[int]:
    """The memory of the caller that the operator's schema does not declare to be written."""
    found: set[int] = set()
    for argument, value in zip(operator.overload._schema.arguments, arguments, strict=True):
        if argument.alias_info is None or not argument.alias_info.is_write:
            found |= {_storage(part) for part in (value if isinstance(value, (list, tuple)) else (value,))} - {0}
    return found


def _storage(arg: Any) -> int:
    return arg.untyped_storage()._cdata if isinstance(arg, torch.Tensor) else 0


def with_kernels() -> tuple[FusedOp, ...]:
    """The ops of the catalog that have Triton kernels."""
    return tuple(op for op in CATALOG if any(kernel.cuda and kernel.cuda.partition(":")[0].endswith(".triton") for kernel in op.kernels))


def without_kernels() -> tuple[FusedOp, ...]:
    """The others: torch's own kernels run them on a GPU."""
    return tuple(op for op in CATALOG if op not in with_kernels())
