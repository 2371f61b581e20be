"""NF4 as the op `nf4_dequantize` takes it: the format is in `kernels/formats/nf4.py`."""

from __future__ import annotations

import torch

from fxopt.kernels.dtypes import wide
from fxopt.kernels.formats import nf4
from fxopt.kernels.formats.nf4 import BLOCK, LEVELS


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to NF4.

    Args:
        weight: any shape, floating point; n elements.

    Returns:
        packed: uint8 [(n + 1) // 2, 1]. absmax: fp32 [ceil(n / 64)].
    """
    return nf4.quantize(weight)[:2]


def dequantize(packed, absmax, shape, dtype):
    """Same arguments as `fxopt::nf4_dequantize`; returns (weight,)."""
    levels = torch.tensor(LEVELS, dtype=wide(dtype), device=packed.device)
    return (nf4.reference((packed, absmax, levels), shape, dtype),)


__all__ = ["BLOCK", "LEVELS", "dequantize", "quantize"]
