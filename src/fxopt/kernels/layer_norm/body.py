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
    acc, width, mask = wide(x.dtype), x.shape[-1], list(output_mask)
    w, b = _widen(x, acc, weight, bias)
    dx = dweight = dbias = None
    if _direct(x, acc):
        # The native CPU kernel adds up dweight and dbias in x's dtype: in bf16, 70% off over 4,096 rows of one sign.
        now = mask if x.dtype == acc else [mask[0], False, False]
        if any(now):
            dx, dweight, dbias = _native_backward(dy, x, [width], mean.unsqueeze(-1), rstd.unsqueeze(-1), w, b, now)
        mask = [on and not done for on, done in zip(mask, now, strict=True)]
    if any(mask):
        sums = _in_blocks(dy, x, w, b, mean, rstd, mask)
        dx, dweight, dbias = (old if new is None else new for old, new in zip((dx, dweight, dbias), sums, strict=True))
    return (
        dx,
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None else dbias.to(bias.dtype),
    )


def _in_blocks(dy, x, weight, bias, mean, rstd, mask):
    """`backward` on rows that are widened block by block: dx in x's dtype, the sums over rows wide."""
    acc, width, count = wide(x.dtype), x.shape[-1], rows_of(x)
    rows, grads = as_rows(x), as_rows(dy)
    means, rstds = mean.reshape(count, 1), rstd.reshape(count, 1)
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device) if mask[0] else None
    totals = [torch.zeros(width, dtype=acc, device=x.device) if on else None for on in mask[1:]]
    for block in blocks(*rows.shape):
        part, *sums = _native_backward(
            grads[block].to(acc), rows[block].to(acc), [width], means[block], rstds[block], weight, bias, mask
        )
        if dx is not None:
            dx[block].copy_(part)
        for total, new in zip(totals, sums, strict=True):
            if total is not None:
                total.add_(new)
    return None if dx is None else dx.view(x.shape), *totals


def backward_fake(dy, x, weight, bias, mean, rstd, output_mask):
    return tuple(
        part.new_empty(part.shape) if on else None for part, on in zip((x, weight, bias), output_mask, strict=True)
    )


def setup_context(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
