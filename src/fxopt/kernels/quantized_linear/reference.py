"""A linear layer with a stored weight in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels.formats import named

PATTERNS = ()  # No program writes it: the quantization pass makes it.


def quantized_linear(x, base, format, shape, bias, transposed):
    """Same arguments as `fxopt::quantized_linear`; returns (y,)."""
    weight = named(format).reference(base, shape, x.dtype)
    if not transposed:
        return (F.linear(x, weight, bias),)
    y = torch.matmul(x, weight)
    return (y if bias is None else y + bias,)
