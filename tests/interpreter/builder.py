"""The operations of a kernel on NumPy arrays, as a GPU does them where Triton's interpreter does not.

* bfloat16 is stored as its bits (uint16); Triton's interpreter adds, compares and multiplies the bits, and truncates where a
  GPU rounds to nearest even. Here its arithmetic is that of fp32, rounded.
* A masked-off lane of a load without `other` is undefined on a GPU; Triton's interpreter gives zero. Here it is NaN (for
  integers: a large number), so that a kernel that depends on it fails.
* fp32 `tl.dot` in its default precision drops 13 bits of the operands (tf32); Triton's interpreter keeps them all.
* `tl.dot` on a GPU wants at least 16 in each dimension. A sum of 16-bit floats rounds at every step on a GPU, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as stock

Handle = stock.TensorHandle

FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
SMALLEST_DOT = 16
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


class NotImitated(AssertionError):
    """A kernel does something that has no defined or no imitated result; the message says what to do."""


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bits; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; overflow to infinity, NaN to NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 with the 10 mantissa bits of tf32, rounded to nearest."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def undefined(shape: tuple[int, ...], dtype: np.dtype, element: tl.dtype) -> np.ndarray:
    """What a lane holds that nothing was loaded into."""
    if element.is_floating():
        return np.full(shape, 0x7FC0 if element == tl.bfloat16 else 0x7F if dtype.itemsize == 1 else np.nan, dtype=dtype)
    return np.full(shape, True if dtype == np.bool_ else np.iinfo(dtype).max // 3, dtype=dtype)


def widened(handle: Any) -> np.ndarray:
    """The values of a handle; those of bfloat16 as fp32."""
    return bf16_to_fp32(handle.data) if handle.dtype.scalar == tl.bfloat16 else handle.data


def narrowed(values: np.ndarray, dtype: tl.dtype) -> Any:
    """A handle of this dtype with these values."""
    if dtype == tl.bfloat16:
        return Handle(fp32_to_bf16(values), dtype)
    return Handle(np.asarray(values).astype(stock._get_np_dtype(dtype), copy=False), dtype)


class Builder(stock.InterpreterBuilder):
    """What `tl` functions are made of; `memory` serves the loads, stores and atomics of the running program."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: Any = None
        self.codegen_fns["min_dot_size"] = lambda left, right: (SMALLEST_DOT,) * 3

    def get_bf16(self, value: float) -> Any:
        return Handle(fp32_to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)

    # -- casts

    def cast_impl(self, source: Any, target: tl.dtype) -> Any:
        have, want = source.dtype.scalar, target.scalar
        if have in FP8:
            wide = torch.from_numpy(source.data.copy()).view(FP8[have]).float().numpy()
            return narrowed(wide, want)
        if want in FP8:
            raise NotImitated("a cast to an 8-bit float depends on the device: quantize in PyTorch")
        if tl.bfloat16 in (have, want):
            return narrowed(widened(source), want)
        return super().cast_impl(source, target)

    def create_fp_to_fp(self, source: Any, target: tl.dtype, rounding: Any) -> Any:
        if rounding not in (None, stock._ir.ROUNDING_MODE.RTNE):
            raise NotImitated(f"rounding mode {rounding}")
        return self.cast_impl(source, target)

    # -- arithmetic

    def binary_op(self, left: Any, right: Any, op: Callable) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return super().binary_op(left, right, op)
        result = op(widened(left), widened(right))
        return Handle(result, tl.int1) if op in _COMPARISONS else narrowed(result, tl.bfloat16)

    # A GPU's minnum and maxnum give the other operand for a NaN.
    def create_minnumf(self, left: Any, right: Any) -> Any:
        return self.binary_op(left, right, np.fmin)

    def create_maxnumf(self, left: Any, right: Any) -> Any:
        return self.binary_op(left, right, np.fmax)

    def unary_op(self, arg: Any, op: Callable) -> Any:
        return narrowed(op(widened(arg)), arg.dtype.scalar)

    def create_clampf(self, arg: Any, low: Any, high: Any, propagate_nans: Any) -> Any:
        return narrowed(np.clip(widened(arg), widened(low), widened(high)), arg.dtype.scalar)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        return narrowed(widened(x) * widened(y) + widened(z), z.dtype.scalar)

    def create_rsqrt(self, arg: Any) -> Any:
        return narrowed(1 / np.sqrt(widened(arg)), arg.dtype.scalar)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = widened(a), widened(b)
        if a.dtype.scalar in FP8 or b.dtype.scalar in FP8:
            raise NotImitated("tl.dot of 8-bit floats: cast the operands to bfloat16 or float16 first")
        if left.dtype == np.float16:
            left, right = left.astype(np.float32), right.astype(np.float32)
        elif a.dtype.scalar == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            left, right = to_tf32(left), to_tf32(right)
        elif left.dtype.kind in "iu":
            left, right = left.astype(d.data.dtype), right.astype(d.data.dtype)
        return narrowed(np.matmul(left, right) + widened(d), d.dtype.scalar)

    # -- memory

    def create_load(self, pointer: Any, cache: Any, eviction: Any, volatile: Any) -> Any:
        return self.create_masked_load(pointer, Handle(np.True_, tl.int1), None, cache, eviction, volatile)

    def create_store(self, pointer: Any, value: Any, cache: Any, eviction: Any) -> None:
        self.create_masked_store(pointer, value, Handle(np.True_, tl.int1), cache, eviction)

    def create_masked_load(self, pointer: Any, mask: Any, other: Any, cache: Any, eviction: Any, volatile: Any) -> Any:
        element = pointer.get_element_ty()
        dtype, shape = stock._get_np_dtype(element), pointer.data.shape
        result = undefined(shape, dtype, element) if other is None else np.array(np.broadcast_to(other.data, shape), dtype=dtype)
        chosen = np.broadcast_to(mask.data, shape)
        result[chosen] = self.memory.load(pointer.data[chosen], dtype, self.grid_idx)
        return Handle(result, element)

    def create_masked_store(self, pointer: Any, value: Any, mask: Any, cache: Any, eviction: Any) -> None:
        dtype, shape = stock._get_np_dtype(pointer.get_element_ty()), pointer.data.shape
        chosen = np.broadcast_to(mask.data, shape)
        values = np.broadcast_to(value.data, shape)[chosen].astype(dtype, copy=False)
        self.memory.store(pointer.data[chosen], values, self.grid_idx)

    def create_atomic_rmw(self, kind: Any, pointer: Any, value: Any, mask: Any, semantics: Any, scope: Any) -> Any:
        element, shape = pointer.get_element_ty(), pointer.data.shape
        dtype = stock._get_np_dtype(element)
        old, chosen = np.zeros(shape, dtype), np.broadcast_to(mask.data, shape)
        values = np.broadcast_to(value.data, shape)[chosen]
        old[chosen] = self.memory.update(str(kind).rpartition(".")[2], element, pointer.data[chosen], values, self.grid_idx)
        return Handle(old, element)

    def create_atomic_cas(self, pointer: Any, compare: Any, value: Any, semantics: Any, scope: Any) -> Any:
        raise NotImitated("tl.atomic_cas: programs run one after the other here, a lock would prove nothing")


def checked_reduce(input: Any, axis: int | None, combine: Any, keep_dims: bool = False, **more: Any) -> Any:
    """`tl.reduce`: sums of 16-bit floats are refused, maxima take no NaN (as on a GPU), bfloat16 is compared by value."""
    parts = input if isinstance(input, tuple) else (input,)
    low = [part.dtype.scalar in (tl.bfloat16, tl.float16) for part in parts]
    if combine == tl.standard._sum_combine and any(low):
        raise NotImitated(f"tl.sum of {parts[0].dtype}: cast to tl.float32 first, statistics are kept in fp32")
    largest = {tl.standard._elementwise_max: np.fmax, tl.standard._elementwise_min: np.fmin}
    if combine in largest and parts[0].dtype.scalar.is_floating():
        handle = parts[0].handle
        result = largest[combine].reduce(widened(handle), axis=axis, keepdims=keep_dims)
        data = narrowed(np.atleast_1d(result), handle.dtype.scalar).data
        shape = list(np.shape(result))
        kind = tl.block_type(handle.dtype.scalar, shape) if shape else handle.dtype.scalar
        return tl.core.tensor(Handle(data, handle.dtype.scalar), kind)
    if any(part.dtype.scalar == tl.bfloat16 for part in parts):
        raise NotImitated("tl.reduce of bfloat16: cast to tl.float32 first")
    return stock.ReduceOps(axis, combine, keep_dims).apply(input)


def checked_scan(input: Any, axis: int, combine: Any, reverse: bool = False, **more: Any) -> Any:
    """`tl.associative_scan`: refused in 16-bit floats."""
    parts = input if isinstance(input, tuple) else (input,)
    if any(part.dtype.scalar in (tl.bfloat16, tl.float16) for part in parts):
        raise NotImitated("a scan of 16-bit floats: cast to tl.float32 first")
    return stock.ScanOps(axis, combine, reverse).apply(input)
