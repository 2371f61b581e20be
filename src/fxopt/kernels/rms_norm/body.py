"""RMSNorm from ATen calls, block by block: one read of x and one write of y in each direction."""

from __future__ import annotations

import torch

from fxopt.errors import CheckError
from fxopt.kernels.blocks import as_rows, blocks, rows_of
from fxopt.kernels.dtypes import wide

CASTINGS = ("cast_then_scale", "scale_then_cast", "none")


def output_dtype(x, weight, casting):
    """The dtype of y: that of x, or what multiplying by an uncast weight promotes to."""
    if casting not in CASTINGS:
        raise CheckError(f"rms_norm has no casting {casting!r}", do=f"use one of {', '.join(CASTINGS)}")
    if weight is None or casting == "scale_then_cast":
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)


def forward(x, weight, eps, offset, casting):
    """RMSNorm over the last dimension: y = x / sqrt(mean(x^2) + eps) * (weight + offset).

    Args:
        x: [..., d], fp16, bf16, fp32 or fp64.
        weight: [d] or None for no scale.
        eps: added to the mean square.
        offset: added to the weight; 1.0 for weights stored as a difference from one.
        casting: "cast_then_scale" rounds x / rms to x's dtype, then multiplies by the weight in the
            promoted dtype; "scale_then_cast" multiplies in fp32 and rounds once, to x's dtype;
            "none" also rounds once, to the promoted dtype.

    Returns:
        y: [..., d], contiguous. rstd: [...], fp32 (fp64 for fp64 x), kept for backward.

    Raises:
        CheckError: unknown casting.

    Source: Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467.
    """
    rows, dtype = as_rows(x), output_dtype(x, weight, casting)
    y = torch.empty(rows.shape, dtype=dtype, device=x.device)
    rstd = torch.empty(rows.shape[0], dtype=wide(x.dtype), device=x.device)
    normalize = normalizer(x, weight, eps, offset, casting)
    for block in blocks(*rows.shape):
        normalize(rows[block], y[block], rstd[block])
    return y.view(x.shape), rstd.view(x.shape[:-1])


def normalizer(x, weight, eps, offset, casting):
    """The forward of rows like those of x: a function of (a block of rows, its room in y, its room in rstd)."""
    acc, width, two_roundings = wide(x.dtype), x.shape[-1], casting == "cast_then_scale"
    scale = None if weight is None else _scale(weight, offset, weight.dtype if two_roundings else acc)

    def normalize(block, y, r):
        part = block.to(acc)
        torch.linalg.vector_norm(part, dim=-1, out=r)
        r.square_().div_(width).add_(eps).rsqrt_()
        if acc == y.dtype == x.dtype:
            torch.mul(part, r.unsqueeze(1), out=y)
            if scale is not None:
                y.mul_(scale)
            return
        xhat = part * r.unsqueeze(1)
        if scale is not None:
            xhat = (xhat.to(x.dtype) if two_roundings else xhat) * scale
        y.copy_(xhat)

    return normalize


def _scale(weight, offset, dtype):
    weight = weight.to(dtype)
    return weight + offset if offset else weight


def forward_fake(x, weight, eps, offset, casting):
    y = x.new_empty(x.shape, dtype=output_dtype(x, weight, casting))
    return y, x.new_empty(x.shape[:-1], dtype=wide(x.dtype))


def backward(dy, x, weight, rstd, offset, output_mask):
    """Gradients of `rms_norm`.

    With g = dy * (weight + offset) and xhat = x * rstd, dx = rstd * (g - xhat * mean(g * xhat)) and
    dweight = sum over rows of dy * xhat. The product p = dy * x serves both reductions, as two
    matrix-vector products: p @ scale for the row mean, p^T @ rstd for dweight.

    Args:
        dy: [..., d], any strides. x, weight, rstd: as saved. output_mask: (dx, dweight).

    Returns:
        dx [..., d] in x's dtype and dweight [d] in weight's dtype; None where the mask is off.
    """
    return add_backward(dy, None, x, weight, rstd, offset, output_mask)


def add_backward(dy, dsum, x, weight, rstd, offset, output_mask):
    """`backward`, with dsum added to dx where it is not None."""
    acc, width = wide(x.dtype), x.shape[-1]
    rows, grads, r_all = as_rows(x), as_rows(dy), rstd.reshape(rows_of(x))
    others = None if dsum is None else as_rows(dsum)
    scale = None if weight is None else _scale(weight, offset, acc)
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device) if output_mask[0] else None
    dweight = torch.zeros(width, dtype=acc, device=x.device) if output_mask[1] else None
    for block in blocks(*rows.shape):
        part, grad, r = rows[block].to(acc), grads[block].to(acc), r_all[block]
        product = grad * part
        if dweight is not None:
            dweight.addmv_(product.t(), r)
        if dx is None:
            continue
        pull = product.sum(-1) if scale is None else product.mv(scale)
        pull.mul_(r).mul_(r).mul_(r).div_(-width)
        out = dx[block] if x.dtype == acc else product
        if scale is None:
            torch.mul(grad, r.unsqueeze(1), out=out)
        else:
            torch.mul(grad, scale, out=out).mul_(r.unsqueeze(1))
        out.addcmul_(part, pull.unsqueeze(1))
        if others is not None:
            out.add_(others[block])
        if out is product:
            dx[block].copy_(product)
    return (
        None if dx is None else dx.view(x.shape),
        None if dweight is None else dweight.to(weight.dtype),
    )


def backward_fake(dy, x, weight, rstd, offset, output_mask):
    return (
        x.new_empty(x.shape) if output_mask[0] else None,
        weight.new_empty(weight.shape) if output_mask[1] else None,
    )


def setup_context(ctx, inputs, output):
    x, weight, _, ctx.offset, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
