"""A linear layer with a frozen NF4 weight: dequantize, multiply, forget; again in backward."""

from __future__ import annotations

from fxopt.kernels import linear
from fxopt.kernels.blocks import as_rows


def forward(x, packed, absmax, shape, bias, transposed):
    """y = x W^T + bias with W = nf4_dequantize(packed, absmax, shape).

    Args:
        x: [..., in], fp16, bf16, fp32 or fp64; the weight is dequantized to x's dtype.
        packed: uint8 [(n + 1) // 2, 1]. absmax: fp32 [ceil(n / 64)]. shape: [out, in], or
            [in, out] if transposed (then y = x W + bias). bias: [out] or None.

    Returns:
        y: [..., out] in x's dtype.

    Raises:
        CheckError, RuntimeError: x does not fit the weight; wrong number of codes or scales.

    Source: Dettmers et al., 2023, https://arxiv.org/abs/2305.14314.
    """
    linear.check(x, packed, absmax, shape, transposed)
    return linear.apply(x, linear.dense(packed, absmax, shape, x.dtype), bias, transposed)


def forward_fake(x, packed, absmax, shape, bias, transposed):
    linear.check(x, packed, absmax, shape, transposed)
    return x.new_empty((*x.shape[:-1], linear.out_features(packed, absmax, shape, transposed)))


def backward(dy, packed, absmax, shape, bias, transposed, output_mask):
    """Gradients (dx, dbias) of `linear_nf4`; None where the mask is off. The weight is frozen."""
    grads, dx = as_rows(dy), None
    if output_mask[0]:
        matrix = linear.dense(packed, absmax, shape, dy.dtype)
        dx = linear.pull_back(grads, matrix, transposed)
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, linear.bias_gradient(grads, bias.dtype) if output_mask[1] else None


def backward_fake(dy, packed, absmax, shape, bias, transposed, output_mask):
    width = linear.in_features(packed, absmax, shape, transposed)
    return (
        dy.new_empty((*dy.shape[:-1], width)) if output_mask[0] else None,
        bias.new_empty(bias.shape) if output_mask[1] else None,
    )


def setup_context(ctx, inputs, output):
    _, packed, absmax, ctx.shape, bias, ctx.transposed = inputs
    ctx.save_for_backward(packed, absmax, bias)
