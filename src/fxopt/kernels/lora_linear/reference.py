"""A linear layer with a low-rank adapter in plain PyTorch.

LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685; on an NF4 base: Dettmers et al., 2023,
https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels.nf4.reference import dequantize

PATTERNS = ()  # The adapter pass makes it, out of linear layers.


def lora_linear(x, weight, bias, absmax, shape, lora_a, lora_b, scale, transposed):
    """Same arguments as `fxopt::lora_linear`; returns (y,)."""
    if absmax is not None:
        (weight,) = dequantize(weight, absmax, shape, x.dtype)
    if transposed:
        base = torch.matmul(x, weight)
        base = base if bias is None else base + bias
    else:
        base = F.linear(x, weight, bias)
    low = F.linear(F.linear(x.to(lora_a.dtype), lora_a), lora_b)
    return ((base + scale * low).to(x.dtype),)
