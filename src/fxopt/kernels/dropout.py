"""Dropout whose mask is a function of a seed: made again in backward, never stored.

The mask is a hash of (seed, row, column), so that no generator is involved and no value is read back from a device: the seed
stays a tensor. The hash is the 32-bit finalizer of a search over xorshift-multiply chains with the least bias (Wellons, 2018,
"Prospecting for hash functions"): two multiplications and three shifts an element.
"""

from __future__ import annotations

import torch

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_COLUMN = 0x9E3779B9 - (1 << 32)  # 2^32 over the golden ratio: neighbours start far apart


def _mix(h: torch.Tensor) -> torch.Tensor:
    """A bijection of int32, in place; products wrap."""
    h ^= (h >> 16) & 0xFFFF
    h *= _FIRST
    h ^= (h >> 15) & 0x1FFFF
    h *= _SECOND
    h ^= (h >> 16) & 0xFFFF
    return h


def mask(seed: torch.Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> torch.Tensor:
    """What dropout multiplies with: 0 with probability p, else 1 / (1 - p).

    Args:
        seed: int64, one element; equal seeds give equal masks on every device.
        rows, columns: size of the mask. p: in [0, 1), in steps of 2^-31.

    Returns:
        [rows, columns] in dtype.
    """
    seed = seed.reshape(1)
    low, high = (seed & 0xFFFFFFFF).to(torch.int32), (seed >> 32).to(torch.int32)
    key = _mix(_mix(torch.arange(rows, device=seed.device, dtype=torch.int32) + _mix(high)) ^ _mix(low))
    column = torch.arange(columns, device=seed.device, dtype=torch.int32) * _COLUMN
    h = _mix(key.unsqueeze(1) + column) & 0x7FFFFFFF
    return (h >= int(p * (1 << 31))).to(dtype).mul_(1.0 / (1.0 - p))
