"""The memory that a launch sees: its tensor arguments and nothing else.

Every tensor argument is a region with addresses of its own, far from all others, so that a pointer says which argument it
was made from. An access must hit an element of that argument (not of its neighbour in the same storage). Two programs run in
any order on a GPU, or at once: an address that one writes no other may read or write, except through atomics; and floats
added by the atomics of two programs add up in any order, so that is no deterministic kernel either.

With `virtual`, regions have addresses and no contents: loads give zeros. Tensors of more than 2^31 elements cost nothing
then, and an offset that wrapped around in int32 is an access outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl

from interpreter.builder import NotImitated, bf16_to_fp32, fp32_to_bf16

Program = tuple[int, int, int]

# Address = region number, then an offset of up to 2^47 bytes to either side.
_SHIFT, _MIDDLE = np.uint64(48), 1 << 47
_MANY, _ATOMIC = -1, -2


class KernelFault(AssertionError):
    """A kernel accessed memory that it must not access, or in an order that it must not rely on."""


_UPDATES: dict[str, Callable] = {
    "ADD": np.add, "FADD": np.add, "MAX": np.maximum, "MIN": np.minimum, "AND": np.bitwise_and, "OR": np.bitwise_or,
    "XOR": np.bitwise_xor, "XCHG": lambda old, new: new, "UMAX": np.maximum, "UMIN": np.minimum,
}  # fmt: skip


@dataclass
class Cells:
    """The bytes of one storage, and which program touched each."""

    bytes: np.ndarray
    writer: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)
    order: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.writer, self.reader, self.order = (np.zeros(self.bytes.size, np.int32) for _ in range(3))


@dataclass
class Region:
    """One tensor argument: byte offsets count from its first element."""

    name: str
    size: int
    start: int
    allowed: np.ndarray | None
    cells: Cells | None


class Memory:
    """Serves one launch.

    Args:
        kernel: name, for messages. virtual: regions have no contents. racy: the kernel is declared to use float atomics, or
            memory that programs pass to each other.
    """

    def __init__(self, kernel: str, virtual: bool = False, racy: bool = False) -> None:
        self.kernel, self.virtual, self.racy = kernel, virtual, racy
        self.regions: list[Region] = []
        self._storages: dict[int, Cells] = {}
        self._programs: dict[Program, int] = {}

    def place(self, name: str, tensor: torch.Tensor) -> int:
        """The address of a tensor argument."""
        width = tensor.element_size()
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        allowed, cells, start = None, None, 0
        if not self.virtual:
            storage, start = tensor.untyped_storage(), tensor.storage_offset() * width
            if storage._cdata not in self._storages:
                raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                self._storages[storage._cdata] = Cells(raw.numpy())
            cells = self._storages[storage._cdata]
            if tensor.numel() < span:  # Strided: the gaps are not the argument's.
                flags = torch.zeros(span, dtype=torch.bool)
                flags.as_strided(tensor.shape, tensor.stride()).fill_(True)
                allowed = flags.numpy()
        self.regions.append(Region(name, span * width, start, allowed, cells))
        return (len(self.regions) << int(_SHIFT)) + _MIDDLE

    def load(self, addresses: np.ndarray, dtype: np.dtype, program: Program) -> np.ndarray:
        """The elements at these addresses."""
        result = np.zeros(addresses.shape, dtype)
        for region, chosen, offsets in self._resolve("load", addresses, dtype.itemsize, program):
            if region.cells is None:
                continue
            at, me = offsets + region.start, self._me(program)
            written, read = region.cells.writer[at], region.cells.reader[at]
            self._forbid((written != 0) & (written != me), region, "loads what another program stores", program)
            region.cells.reader[at] = np.where((read == 0) | (read == me), me, _MANY)
            result[chosen] = self._as(region, dtype)[at // dtype.itemsize]
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, program: Program) -> None:
        """Put values at these addresses."""
        width = values.dtype.itemsize
        for region, chosen, offsets in self._resolve("store", addresses, width, program):
            if region.cells is None:
                continue
            at, me, cells = offsets + region.start, self._me(program), region.cells
            written, read = cells.writer[at], cells.reader[at]
            self._forbid((written != 0) & (written != me), region, "stores where another program stored", program)
            self._forbid((read != 0) & (read != me), region, "stores where another program loads", program)
            cells.writer[at] = me
            lanes = np.arange(at.size, dtype=np.int32)
            cells.order[at] = lanes
            self._forbid(cells.order[at] != lanes, region, "stores twice to one address at once", program)
            self._as(region, values.dtype)[at // width] = values[chosen]

    def update(self, kind: str, element: tl.dtype, addresses: np.ndarray, values: np.ndarray, program: Program) -> np.ndarray:
        """An atomic read-modify-write; gives the old values."""
        old, width = np.zeros(values.shape, values.dtype), values.dtype.itemsize
        if kind not in _UPDATES:
            raise NotImitated(f"atomic {kind}")
        for region, chosen, offsets in self._resolve("update", addresses, width, program):
            if region.cells is None:
                continue
            at, me, cells = offsets + region.start, self._me(program), region.cells
            written, read = cells.writer[at], cells.reader[at]
            self._forbid((written > 0) & (written != me), region, "updates where another program stored", program)
            self._forbid((read != 0) & (read != me), region, "updates where another program loads", program)
            if element.is_floating() and kind in ("ADD", "FADD"):
                self._forbid((written < 0) & (written != _ATOMIC - me), region, "adds floats in an order that varies", program)
            cells.writer[at] = _ATOMIC - me
            for lane, place in zip(np.flatnonzero(chosen), at // width, strict=True):
                old[lane] = self._as(region, values.dtype)[place]
                self._as(region, values.dtype)[place] = _combine(kind, element, old[lane : lane + 1], values[lane : lane + 1])[0]
        return old

    def _resolve(self, what: str, addresses: np.ndarray, width: int, program: Program) -> Iterator[tuple[Region, np.ndarray, np.ndarray]]:
        """(region, which of the addresses, their byte offsets) for each region that these addresses name."""
        if not addresses.size:
            return
        numbers = (addresses >> _SHIFT).astype(np.int64) - 1
        offsets = (addresses & np.uint64(2 * _MIDDLE - 1)).astype(np.int64) - _MIDDLE
        for number in (numbers[:1] if (numbers == numbers[0]).all() else np.unique(numbers)).tolist():
            if not 0 <= number < len(self.regions):
                self._fail(what, "a pointer that was made from no argument", program)
            region, chosen = self.regions[number], numbers == number
            own = offsets[chosen]
            inside = (own >= 0) & (own <= region.size - width)
            if region.allowed is not None and inside.any():
                inside[inside] = region.allowed[own[inside] // width]
            if not inside.all():
                first = int(own[~inside][0])
                self._fail(what, f"{int((~inside).sum())} of {own.size} addresses outside {region.name} (byte {first} of {region.size})", program)
            if (own % width).any():
                self._fail(what, f"misaligned addresses in {region.name}", program)
            yield region, chosen, own

    def _me(self, program: Program) -> int:
        return self._programs.setdefault(program, len(self._programs) + 1)

    def _as(self, region: Region, dtype: np.dtype) -> np.ndarray:
        cells = region.cells.bytes
        return cells[: cells.size // dtype.itemsize * dtype.itemsize].view(dtype)

    def _forbid(self, wrong: np.ndarray, region: Region, why: str, program: Program) -> None:
        if not self.racy and wrong.any():
            raise KernelFault(f"{self.kernel}, program {program}: {why}, {int(wrong.sum())} elements of {region.name}")

    def _fail(self, what: str, why: str, program: Program) -> None:
        raise KernelFault(f"{self.kernel}, program {program}: {what} with {why}")


def _combine(kind: str, element: tl.dtype, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    op = _UPDATES[kind]
    if element == tl.bfloat16:
        return fp32_to_bf16(op(bf16_to_fp32(old), bf16_to_fp32(new)))
    return op(old, new)
