"""LayerNorm through ATen's native kernels, with fp32 statistics for every storage dtype.

ATen's bf16 path returns mean and rstd rounded to bf16 when the weight is bf16 or absent; its backward
then starts from statistics that are off by up to 2^-9. With an fp32 weight the CPU kernel keeps them
in fp32, so a low-precision weight is widened (it is one row) and an absent one is a row of ones.
Kernels of other devices do not mix dtypes: there the rows are widened, block by block.
"""

from __future__ import annotations

import torch

from fxopt.kernels.blocks import as_rows, blocks, rows_of
from fxopt.kernels.dtypes import wide

_native = torch.ops.aten.native_layer_norm.default
_native_backward = torch.ops.aten.native_layer_norm_backward.default


def forward(x, weight, bias, eps):
    """LayerNorm over the last dimension: y = (x - mean) / sqrt(var + eps) * weight + bias.

    Args:
        x: [..., d], fp16, bf16, fp32 or fp64. weight, bias: [d] or None. eps: added to the variance.

    Returns:
        y: [..., d] in x's dtype, contiguous. mean, rstd: [...], fp32 (fp64 for fp64 x).

    Source: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450.
    """
    acc, shape = wide(x.dtype), x.shape[-1:]
    if _direct(x, acc):
        y, mean, rstd = _native(x, shape, *_widen(x, acc, weight, bias), eps)
        return y, mean.squeeze(-1), rstd.squeeze(-1)
    rows, (w, b) = as_rows(x), _widen(x, acc, weight, bias)
    mean, rstd = (torch.empty(rows.shape[0], dtype=acc, device=x.device) for _ in range(2))
    y = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    for block in blocks(*rows.shape):
        part, m, r = _native(rows[block].to(acc), shape, w, b, eps)
        y[block].copy_(part)
        mean[block], rstd[block] = m.view(-1), r.view(-1)
    lead = x.shape[:-1]
    return y.view(x.shape), mean.view(lead), rstd.view(lead)


def _direct(x, acc):
    """Whether the native kernel takes x as it is and keeps its statistics in acc."""
    return x.dtype == acc or x.device.type == "cpu"


def _widen(x, acc, weight, bias):
    if x.dtype == acc:
        if (weight is None or weight.dtype == acc) and (bias is None or bias.dtype == acc):
            return weight, bias
    elif weight is None:
        weight = torch.ones(x.shape[-1], dtype=acc, device=x.device)
    return [None if part is None else part.to(acc) for part in (weight, bias)]


def forward_fake(x, weight, bias, eps):
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=wide(x.dtype)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def backward(dy, x, weight, bias, mean, rstd, output_mask):
    """Gradients of `layer_norm`: dx in x's dtype, dweight and dbias [d] in theirs, None where the
    mask is off. weight and bias gradients are summed over rows in fp32 (fp64 for fp64 x).
    """
    acc, width, mask = wide(x.dtype), x.shape[-1], output_mask
    w, b = _widen(x, acc, weight, bias)
    # The native CPU kernel adds up dweight and dbias in x's dtype: in bf16, 70% off over 4,096 rows of one sign.
    if _direct(x, acc) and (x.dtype == acc or not any(mask[1:])):
        dx, dweight, dbias = _native_backward(dy, x, [width], mean.unsqueeze(-1), rstd.unsqueeze(-1), w, b, mask)
        if x.dtype == acc and (weight is None or weight is w) and (bias is None or bias is b):
            return dx, dweight, dbias
    else:
        rows, grads, count = as_rows(x), as_rows(dy), rows_of(x)
        m_all, r_all = mean.reshape(count, 1), rstd.reshape(count, 1)
        dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device) if mask[0] else None
        dweight, dbias = (torch.zeros(width, dtype=acc, device=x.device) if on else None for on in mask[1:])
        for block in blocks(*rows.shape):
            parts = _native_backward(
                grads[block].to(acc), rows[block].to(acc), [width], m_all[block], r_all[block], w, b, mask
            )
            if mask[0]:
                dx[block].copy_(parts[0])
            for total, part in ((dweight, parts[1]), (dbias, parts[2])):
                if total is not None:
                    total.add_(part)
    return (
        dx.view(x.shape) if mask[0] else None,
        dweight.to(weight.dtype) if mask[1] else None,
        dbias.to(bias.dtype) if mask[2] else None,
    )


def backward_fake(dy, x, weight, bias, mean, rstd, output_mask):
    return tuple(
        part.new_empty(part.shape) if on else None for part, on in zip((x, weight, bias), output_mask, strict=True)
    )


def setup_context(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
