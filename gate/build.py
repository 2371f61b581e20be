"""Compiles one kernel start for one target and says what it costs. No GPU is needed: Triton brings the assemblers."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fxopt.kernels.launch import Target
from gate.record import Launch

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MMA = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


class _Driver:
    """As much of a GPU driver as compiling needs."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(target.backend, target.arch, target.warp)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Inside, Triton sees this target."""
    before = driver._active if hasattr(driver, "_active") else None
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True)
class Pointer:
    """What a compiler may know of a tensor argument: its dtype, its alignment, and whether it is under 2 GiB."""

    dtype: torch.dtype
    offset: int
    size: int

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return self.size


@dataclass(frozen=True)
class Job:
    """A kernel start in plain values, for another process."""

    module: str
    kernel: str
    args: tuple[Any, ...]
    meta: tuple[tuple[str, Any], ...]
    target: Target
    key: str

    @property
    def place(self) -> str:
        """Backend and architecture."""
        return f"{self.target.backend}:{self.target.arch}"


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs.

    Attributes:
        registers: of a thread. shared: bytes of a program. spills: loads and stores of registers in memory, or bytes of stack
            that no spill explains. mma: tensor-core instructions. narrow: whether the kernel has a tl.dot of 16 bits or fewer,
            which must use them.
    """

    registers: int
    shared: int
    spills: int
    mma: int
    narrow: bool


def job(launch: Launch, target: Target) -> Job:
    """The work of compiling a launch; its key names all that the result depends on, but the target."""
    args = tuple(_plain(arg) for arg in launch.args)
    function = launch.kernel.fn
    with compiling_for(target):
        launch.kernel.device_caches.clear()
        _, _, _, _, binder = launch.kernel.device_caches[0]
        _, specialization, _ = binder(*args, **launch.meta, debug=False, instrumentation_mode="")
    launch.kernel.device_caches.clear()
    types = [_type(*found) for found, parameter in zip(specialization, launch.kernel.params, strict=True) if not parameter.is_constexpr]
    types = ", ".join(f"{kind} x{count}" if (count := len(list(run))) > 1 else kind for kind, run in itertools.groupby(types))
    constants = " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in sorted(launch.meta.items()))
    return Job(function.__module__, function.__qualname__, args, tuple(launch.meta.items()), target, f"{function.__name__}({types}) {constants}")


_TYPED: set[str] = set()


def check_types(launch: Launch, target: Target) -> None:
    """Translate a launch to Triton's IR, as far as its types go: what an interpreter does not see (an int 1 is a constant and
    has no methods, a loop must not change a type). Each specialization once in a process.

    Raises:
        triton.compiler.errors.CompilationError: with the line of the kernel.
    """
    kernel = launch.kernel
    meta = launch.meta | {"debug": False, "instrumentation_mode": ""}
    with compiling_for(target):
        kernel.device_caches.clear()
        _, _, gpu, backend, binder = kernel.device_caches[0]
        kernel.device_caches.clear()
        bound, specialization, options = binder(*map(_plain, launch.args), **meta)
        key = f"{kernel.fn.__module__}.{kernel.fn.__qualname__} {[kind if value == 'D' else (kind, value) for kind, value in specialization]} {launch.meta}"
        if key in _TYPED:
            return
        options, signature, constants, attributes = kernel._pack_args(backend, meta, bound, specialization, options)
        source = kernel.ASTSource(kernel, signature, constants, attributes)
        context = triton._C.libtriton.ir.context()
        triton._C.libtriton.ir.load_dialects(context)
        backend.load_dialects(context)
        source.make_ir(gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
        _TYPED.add(key)


def _type(kind: str, value: Any) -> str:
    """An argument in a key: "*bf16:D" is a pointer to 16-byte aligned bfloat16, "=1" an int that became a constant.

    AMD's mark of tensors under 2 GiB (S) is left out: all of these are.
    """
    mark = value.replace("S", "") if isinstance(value, str) else value
    return f"={value}" if kind == "constexpr" else f"{kind}:{mark}" if mark else kind


def _plain(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        width = arg.element_size()
        span = sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True)) + 1
        return Pointer(arg.dtype, arg.storage_offset() * width % 16, span * width)
    return arg


def kernel_of(work: Job) -> Any:
    """The jitted function of a job."""
    return getattr(importlib.import_module(work.module), work.kernel)


def build(work: Job) -> dict[str, Any]:
    """Compile a job: the fields of `Resources`, or {"failed": the compiler's words}."""
    kernel = kernel_of(work)
    with compiling_for(work.target):
        kernel.device_caches.clear()
        try:
            compiled = kernel.warmup(*work.args, grid=(1,), **dict(work.meta))
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is this kernel's failure
            return {"failed": f"{type(error).__name__}: {str(error).strip()[-600:]}"}
        finally:
            kernel.device_caches.clear()
    return asdict(_nvidia(compiled) if work.target.backend == "cuda" else _amd(compiled))


def _nvidia(compiled: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        registers, stack, local = map(int, found.groups())
        spills = 0
        if stack or local:  # Disassembling takes 70 times as long as asking for the sizes.
            spills = len(re.findall(r"\b(?:STL|LDL)\b", _tool("nvdisasm", "-c", file.name))) or stack + local
    ptx = compiled.asm["ptx"]
    return Resources(registers, compiled.metadata.shared, spills, sum(ptx.count(name) for name in _MMA), _has_narrow_dot(compiled))


def _amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    registers = number("vgpr_count") + number("agpr_count")
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return Resources(registers, compiled.metadata.shared, spills, len(re.findall(r"\bv_mfma", text)), _has_narrow_dot(compiled))


def _has_narrow_dot(compiled: Any) -> bool:
    operands = re.findall(r"tt\.dot\b.*: tensor<(?:\d+x)+(\w+)>", compiled.asm["ttir"])
    return any(operand not in ("f32", "f64") for operand in operands)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def written(launch: Launch, target: Target) -> set[str]:
    """Which arguments the kernel writes to, by torch's own analysis of its IR. Unknown means all."""
    names = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.meta
    stand_ins = {name: torch.empty(2, dtype=value.dtype) if isinstance(value, torch.Tensor) else value for name, value in names.items()}
    options = ("num_warps", "num_stages", "num_ctas", "maxnreg")
    with compiling_for(target):
        given = launch.kernel, {k: v for k, v in stand_ins.items() if k not in options}, {}
        if hasattr(triton_kernel_wrap, "identify_mutated_tensors"):  # up to torch 2.11
            return set(triton_kernel_wrap.identify_mutated_tensors(*given))
        return {dependence.name for dependence in triton_kernel_wrap.identify_accessed_tensors(*given).read_writes.writes}
