"""NF4 dequantization from ATen calls, block by block: a 256-entry table of pairs of levels.

A byte selects two fp32 levels at once: the table is viewed as 256 float64, so that `index_select`
moves 8 bytes an index. Measured on [2048, 2048] to fp32, one thread: 1.1 ms; a 65,536-entry table
of four levels 1.1 to 1.2 ms; the C++ of bitsandbytes 0.43 ms.
"""

from __future__ import annotations

import functools
import math

import torch

from fxopt.errors import CheckError
from fxopt.kernels.blocks import BLOCK as _ELEMENTS
from fxopt.kernels.nf4.reference import BLOCK, LEVELS


@functools.lru_cache(maxsize=16)
def _pairs(device: torch.device) -> torch.Tensor:
    """[256] float64, each the bits of two fp32 levels. Read only: shared by all calls."""
    levels, byte = torch.tensor(LEVELS, dtype=torch.float32), torch.arange(256)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), dim=1).view(torch.float64).view(-1).to(device)


def _check(packed, absmax, shape):
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or absmax.dtype not in (torch.float32, torch.float64):
        raise CheckError(
            f"NF4 needs uint8 codes and fp32 scales, not {packed.dtype} and {absmax.dtype}",
            do="undo a nested quantization of the scales first",
        )
    torch._check(packed.numel() == (count + 1) // 2, lambda: f"{packed.numel()} bytes for {count} elements")
    scales = (count + BLOCK - 1) // BLOCK
    torch._check(absmax.numel() == scales, lambda: f"{absmax.numel()} scales for {count} elements")
    return count


def dequantize(packed, absmax, shape, dtype):
    """Weights from NF4 codes: level[code] * absmax[block], in fp32, rounded once to dtype.

    Args:
        packed: uint8, (n + 1) // 2 elements in any shape; high nibble first.
        absmax: fp32 [ceil(n / 64)].
        shape: of the result; n = product.
        dtype: fp16, bf16, fp32 or fp64.

    Returns:
        weight: shape, dtype, contiguous.

    Raises:
        CheckError, RuntimeError: wrong dtypes, wrong number of codes or scales.

    Source: Dettmers et al., 2023, https://arxiv.org/abs/2305.14314.
    """
    count = _check(packed, absmax, shape)
    codes, scales, table = packed.reshape(-1), absmax.reshape(-1), _pairs(packed.device)
    if dtype == torch.float64:
        # fp64 only serves as a truth to compare with: fp32 levels, one product in fp64.
        values = table.index_select(0, codes.int()).view(torch.float32)[:count].double()
        return values.mul_(scales.double().repeat_interleave(BLOCK)[:count]).view(shape)
    scales = scales.to(torch.float32)
    out = torch.empty(count, dtype=dtype, device=packed.device)
    index = torch.empty(min(_ELEMENTS // 2, codes.numel()), dtype=torch.int32, device=packed.device)
    room = None
    for start in range(0, count, _ELEMENTS):
        part = out[start : start + _ELEMENTS]
        many = part.numel()
        chosen = index[: (many + 1) // 2].copy_(codes[start // 2 : (start + many + 1) // 2])
        direct = dtype == torch.float32 and many % 2 == 0
        if not direct and room is None:
            room = torch.empty(2 * index.numel(), dtype=torch.float32, device=packed.device)
        values = part if direct else room[: 2 * chosen.numel()]
        torch.index_select(table, 0, chosen, out=values.view(torch.float64))
        values = values[:many]
        whole = many // BLOCK * BLOCK
        first = start // BLOCK
        values[:whole].view(-1, BLOCK).mul_(scales[first : first + whole // BLOCK].unsqueeze(1))
        if whole < many:
            values[whole:].mul_(scales[first + whole // BLOCK])
        if not direct:
            part.copy_(values)
    return out.view(shape)


def dequantize_fake(packed, absmax, shape, dtype):
    _check(packed, absmax, shape)
    return packed.new_empty(shape, dtype=dtype)
