"""A residual add and the RMSNorm of its result, block by block: the sum is normalized while it is in cache."""

from __future__ import annotations

import torch

from fxopt.errors import CheckError
from fxopt.kernels.blocks import as_rows, blocks
from fxopt.kernels.dtypes import wide
from fxopt.kernels.rms_norm import body as rms_norm


def check_operands(x, residual):
    """Raise unless both agree in shape and dtype (an op does not broadcast)."""
    if x.dtype != residual.dtype:
        raise CheckError(f"x is {x.dtype} and residual is {residual.dtype}", do="cast one to the other's dtype, or add them before the norm")
    torch._check(x.shape == residual.shape, lambda: f"x is {tuple(x.shape)} and residual is {tuple(residual.shape)}")


def forward(x, residual, weight, eps, offset, casting):
    """sum = x + residual, y = sum / sqrt(mean(sum^2) + eps) * (weight + offset), the mean over the last dimension.

    Args:
        x, residual: [..., d] of one shape and dtype: fp16, bf16, fp32 or fp64. Any strides.
        weight, eps, offset, casting: as for `fxopt::rms_norm`.

    Returns:
        y: [..., d], contiguous, in the dtype of `fxopt::rms_norm`.
        sum: [..., d], contiguous, in x's dtype; it is rounded to that before the mean, as in the plain form.
        rstd: [...], fp32 (fp64 for fp64 x), kept for backward. Both y and sum carry a gradient.

    Raises:
        CheckError: dtypes differ, unknown casting. RuntimeError: shapes differ.

    Source: Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467.
    """
    check_operands(x, residual)
    rows, others, dtype = as_rows(x), as_rows(residual), rms_norm.output_dtype(x, weight, casting)
    y, total = (torch.empty(rows.shape, dtype=of, device=x.device) for of in (dtype, x.dtype))
    rstd = torch.empty(rows.shape[0], dtype=wide(x.dtype), device=x.device)
    normalize = rms_norm.normalizer(x, weight, eps, offset, casting)
    for block in blocks(*rows.shape):
        normalize(torch.add(rows[block], others[block], out=total[block]), y[block], rstd[block])
    return y.view(x.shape), total.view(x.shape), rstd.view(x.shape[:-1])


def forward_fake(x, residual, weight, eps, offset, casting):
    check_operands(x, residual)
    y, rstd = rms_norm.forward_fake(x, weight, eps, offset, casting)
    return y, x.new_empty(x.shape), rstd


def backward(dy, dsum, sum, weight, rstd, offset, output_mask):
    """Gradients of `add_rms_norm`: (of x and of residual alike: dsum + the gradient through y, dweight).

    Args:
        dy, dsum: [..., d], any strides; dsum is None where the sum is not used. sum, weight, rstd: as saved.
        output_mask: (the first, dweight).

    Returns:
        [..., d] in sum's dtype, rounded once from fp32, and dweight [d] in weight's dtype; None where the mask is off.
    """
    return rms_norm.add_backward(dy, dsum, sum, weight, rstd, offset, output_mask)


def backward_fake(dy, dsum, sum, weight, rstd, offset, output_mask):
    return rms_norm.backward_fake(dy, sum, weight, rstd, offset, output_mask)


def setup_context(ctx, inputs, output):
    _, _, weight, _, ctx.offset, _ = inputs
    ctx.save_for_backward(output[1], weight, output[2])
