"""A residual add and the LayerNorm of its result, through `layer_norm`'s body.

The native kernel is bound by its arithmetic on a CPU, so that working block by block (the sum still in cache) only added
copies: 1.4 times the time on fp32 [2048, 2048] in both directions. The gradient that reaches the sum on its other way is
added in place, to a result that nobody else has.
"""

from __future__ import annotations

import torch

from fxopt.kernels.add_rms_norm.body import check_operands
from fxopt.kernels.layer_norm import body as layer_norm


def forward(x, residual, weight, bias, eps):
    """sum = x + residual, y = (sum - mean) / sqrt(var + eps) * weight + bias, mean and var over the last dimension.

    Args:
        x, residual: [..., d] of one shape and dtype: fp16, bf16, fp32 or fp64. Any strides.
        weight, bias, eps: as for `fxopt::layer_norm`.

    Returns:
        y, sum: [..., d] in x's dtype, contiguous; sum is rounded to that before the mean, as in the plain form.
        mean, rstd: [...], fp32 (fp64 for fp64 x), kept for backward. Both y and sum carry a gradient.

    Raises:
        CheckError: dtypes differ. RuntimeError: shapes differ.

    Source: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450.
    """
    check_operands(x, residual)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.add(x, residual, out=total)
    y, mean, rstd = layer_norm.forward(total, weight, bias, eps)
    return y, total, mean, rstd


def forward_fake(x, residual, weight, bias, eps):
    check_operands(x, residual)
    y, mean, rstd = layer_norm.forward_fake(x, weight, bias, eps)
    return y, x.new_empty(x.shape), mean, rstd


def backward(dy, dsum, sum, weight, bias, mean, rstd, output_mask):
    """Gradients of `add_layer_norm`: (of x and of residual alike: dsum + the gradient through y, dweight, dbias).

    Args:
        dy, dsum: [..., d], any strides; dsum is None where the sum is not used. sum, weight, bias, mean, rstd: as saved.
        output_mask: (the first, dweight, dbias).

    Returns:
        [..., d] in sum's dtype, dweight and dbias [d] in theirs; None where the mask is off.
    """
    dx, dweight, dbias = layer_norm.backward(dy, sum, weight, bias, mean, rstd, output_mask)
    if dx is not None and dsum is not None:
        dx.add_(dsum)
    return dx, dweight, dbias


def backward_fake(dy, dsum, sum, weight, bias, mean, rstd, output_mask):
    return layer_norm.backward_fake(dy, sum, weight, bias, mean, rstd, output_mask)


def setup_context(ctx, inputs, output):
    _, _, weight, bias, _ = inputs
    ctx.save_for_backward(output[1], weight, bias, *output[2:])
