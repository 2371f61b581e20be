"""A linear layer with an NF4 weight in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels.nf4.reference import dequantize

PATTERNS = ()  # No program writes it: the quantization pass makes it.


def linear_nf4(x, packed, absmax, shape, bias, transposed):
    """Same arguments as `fxopt::linear_nf4`; returns (y,)."""
    (weight,) = dequantize(packed, absmax, shape, x.dtype)
    if not transposed:
        return (F.linear(x, weight, bias),)
    y = torch.matmul(x, weight)
    return (y if bias is None else y + bias,)
