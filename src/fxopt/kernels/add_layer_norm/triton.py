"""A residual add and the LayerNorm of its result on a GPU: the kernels of `layer_norm`, with their second operand."""

from __future__ import annotations

import torch

from fxopt.kernels.add_layer_norm import body
from fxopt.kernels.layer_norm.triton import add_backward, add_forward


def forward(x, residual, weight, bias, eps):
    """As `body.forward`, which also serves fp64: fp32 statistics would not do there."""
    body.check_operands(x, residual)
    run = body.forward if x.dtype == torch.float64 else add_forward
    return run(x, residual, weight, bias, eps)


def backward(dy, dsum, sum, weight, bias, mean, rstd, output_mask):
    """As `body.backward`, which also serves fp64."""
    run = body.backward if sum.dtype == torch.float64 else add_backward
    return run(dy, dsum, sum, weight, bias, mean, rstd, output_mask)
