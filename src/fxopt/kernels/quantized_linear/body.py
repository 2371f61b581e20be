"""A linear layer with a frozen stored weight: dequantize, multiply, forget; again in backward."""

from __future__ import annotations

import torch

from fxopt.kernels import linear
from fxopt.kernels.blocks import as_rows
from fxopt.kernels.formats import named


def forward(x, base, format, shape, bias, transposed):
    """y = x W^T + bias with W = dequantize(base, format, shape).

    Args:
        x: [..., in], fp16, bf16, fp32 or fp64; the weight is dequantized to x's dtype.
        base: one tensor per part of the format. format: its name, see `kernels/formats/`.
        shape: [out, in], or [in, out] if transposed (then y = x W + bias). bias: [out] or None.

    Returns:
        y: [..., out] in x's dtype. The weight has no gradient: it is frozen.

    Raises:
        CheckError, RuntimeError: x does not fit the weight; unknown format; parts of a wrong number, dtype or size.

    Source: Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, equation 5 without the adapter.
    """
    check(x, base, format, shape, transposed)
    return linear.apply(x, named(format).dequantize(base, shape, x.dtype), bias, transposed)


def check(x, base, format, shape, transposed):
    """Raise unless base is a weight of this shape that takes x."""
    torch._check(len(shape) == 2, lambda: f"a linear weight has two dimensions, not {len(shape)}")
    named(format).check(base, shape)
    wanted = shape[0] if transposed else shape[1]
    torch._check(x.shape[-1] == wanted, lambda: f"x has {x.shape[-1]} features, the weight takes {wanted}")


def forward_fake(x, base, format, shape, bias, transposed):
    check(x, base, format, shape, transposed)
    return x.new_empty((*x.shape[:-1], shape[1] if transposed else shape[0]))


def backward(dy, base, format, shape, bias, transposed, output_mask):
    """Gradients (dx, dbias) of `quantized_linear`; None where the mask is off. The weight is frozen."""
    grads, dx = as_rows(dy), None
    if output_mask[0]:
        dx = linear.pull_back(grads, named(format).dequantize(base, shape, dy.dtype), transposed)
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, linear.bias_gradient(grads, bias.dtype) if output_mask[1] else None


def backward_fake(dy, base, format, shape, bias, transposed, output_mask):
    return (
        dy.new_empty((*dy.shape[:-1], shape[0] if transposed else shape[1])) if output_mask[0] else None,
        bias.new_empty(bias.shape) if output_mask[1] else None,
    )


def setup_context(ctx, inputs, output):
    _, base, ctx.format, ctx.shape, bias, ctx.transposed = inputs
    ctx.save_for_backward(*base, bias)
