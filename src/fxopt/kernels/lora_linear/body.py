"""A linear layer with a low-rank adapter: two small products added in place to the base product.

The plain form writes the adapter's output, its scaled copy and the sum, six passes over [rows, out];
here the adapter is one `addmm_` into the base output. Backward saves x, x A^T and no dense copy of a
quantized weight, and multiplies from the small side.
"""

from __future__ import annotations

import torch

from fxopt.kernels import linear
from fxopt.kernels.blocks import as_rows, rows_of


def forward(x, weight, bias, absmax, shape, lora_a, lora_b, scale, transposed):
    """y = x W^T + bias + scale (x A^T) B^T.

    Args:
        x: [..., in], fp16, bf16, fp32 or fp64.
        weight: dense [out, in] ([in, out] if transposed) in x's dtype when absmax is None, else the
            uint8 codes of NF4.
        bias: [out] or None. absmax: None, or fp32 scales of NF4. shape: dense shape of an NF4
            weight; ignored for a dense one.
        lora_a: [r, in]. lora_b: [out, r]. Either x's dtype or a wider one; the adapter is computed
            in theirs. scale: alpha / r.
        transposed: y = x W + bias, for weights stored as [in, out].

    Returns:
        y: [..., out] in x's dtype; with lora_b = 0 equal to the base layer bit for bit.
        low: [..., r] = x A^T in lora_a's dtype, kept for the gradient of lora_b.

    Raises:
        CheckError, RuntimeError: x does not fit the weight or the adapter.

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685.
    """
    _check(x, weight, absmax, shape, lora_a, lora_b, transposed)
    y = linear.apply(x, linear.dense(weight, absmax, shape, x.dtype), bias, transposed)
    rows, out = as_rows(x), y.view(rows_of(x), y.shape[-1])
    low = rows.to(lora_a.dtype).mm(lora_a.t())
    if out.dtype == low.dtype:
        out.addmm_(low, lora_b.t(), alpha=scale)
    else:
        out.add_(low.mm(lora_b.t()), alpha=scale)
    return y, low.view(*x.shape[:-1], low.shape[1])


def _check(x, weight, absmax, shape, lora_a, lora_b, transposed):
    linear.check(x, weight, absmax, shape, transposed)
    outputs = linear.out_features(weight, absmax, shape, transposed)
    torch._check(
        lora_a.shape[1] == x.shape[-1] and lora_b.shape[0] == outputs and lora_a.shape[0] == lora_b.shape[1],
        lambda: f"lora_a {tuple(lora_a.shape)}, lora_b {tuple(lora_b.shape)}: need [r, {x.shape[-1]}], [{outputs}, r]",
    )
    torch._check(lora_a.dtype == lora_b.dtype, lambda: f"lora_a is {lora_a.dtype} and lora_b is {lora_b.dtype}")


def forward_fake(x, weight, bias, absmax, shape, lora_a, lora_b, scale, transposed):
    _check(x, weight, absmax, shape, lora_a, lora_b, transposed)
    return (
        x.new_empty((*x.shape[:-1], lora_b.shape[0])),
        x.new_empty((*x.shape[:-1], lora_a.shape[0]), dtype=lora_a.dtype),
    )


def backward(dy, x, weight, bias, absmax, shape, lora_a, lora_b, low, scale, transposed, output_mask):
    """Gradients of `lora_linear`. With u = scale dy B [rows, r]:

    dx = dy W + u A, dA = u^T x, dB = scale dy^T low, dW = dy^T x, dbias = sum of dy over rows.
    dW costs as much as the whole forward; it is formed only under the mask.

    Args:
        dy: [..., out], any strides. x: None where neither dA nor dW is asked for. bias: for its
            dtype. output_mask: (dx, dweight, dbias, dlora_a, dlora_b).

    Returns:
        the five gradients, each in its input's dtype, None where the mask is off.
    """
    want_x, want_weight, want_bias, want_a, want_b = output_mask
    grads = as_rows(dy)
    rows = None if x is None else as_rows(x)
    adapter_grads = grads.to(lora_a.dtype)
    dx = dweight = dbias = da = db = None
    if want_x or want_a:
        up = adapter_grads.mm(lora_b).mul_(scale)
    if want_a:
        da = up.t().mm(rows.to(up.dtype))
    if want_b:
        db = adapter_grads.t().mm(low.reshape(grads.shape[0], low.shape[-1])).mul_(scale)
    if want_x:
        dx = linear.pull_back(grads, linear.dense(weight, absmax, shape, dy.dtype), transposed)
        if dx.dtype == up.dtype:
            dx.addmm_(up, lora_a)
        else:
            dx.add_(up.mm(lora_a))
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    if want_weight:
        dweight = linear.weight_gradient(grads, rows, transposed)
    if want_bias:
        dbias = linear.bias_gradient(grads, bias.dtype)
    return dx, dweight, dbias, da, db


def backward_fake(dy, x, weight, bias, absmax, shape, lora_a, lora_b, low, scale, transposed, output_mask):
    dx = dy.new_empty((*dy.shape[:-1], lora_a.shape[1])) if output_mask[0] else None
    rest = zip((weight, bias, lora_a, lora_b), output_mask[1:], strict=True)
    return dx, *(part.new_empty(part.shape) if on else None for part, on in rest)


def setup_context(ctx, inputs, output):
    x, weight, bias, absmax, ctx.shape, lora_a, lora_b, ctx.scale, ctx.transposed = inputs
    needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[5]
    ctx.save_for_backward(x if needs_x else None, weight, bias, absmax, lora_a, lora_b, output[1])
