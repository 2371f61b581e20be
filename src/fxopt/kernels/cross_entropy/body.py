"""Cross entropy that keeps the logits it was given and two numbers a row.

Plain PyTorch keeps log_softmax, [rows, V] in fp32, and its backward fills a second matrix with zeros to put one number
a row into it. Here forward reads the logits once; backward reads them again and writes their gradient once.
"""

from __future__ import annotations

import torch

from fxopt.errors import CheckError
from fxopt.kernels.blocks import as_rows
from fxopt.kernels.cross_entropy.rows import Terms, row_blocks, take_apart
from fxopt.kernels.dtypes import wide
from fxopt.torch_private import FakeTensor

REDUCTIONS = ("none", "mean", "sum")


def check(logits, target, reduction):
    """Raise unless the reduction exists and each row of logits has a target."""
    if reduction not in REDUCTIONS:
        raise CheckError(f"cross entropy has no reduction {reduction!r}", do=f"use one of {', '.join(REDUCTIONS)}")
    torch._check(
        logits.shape[:-1] == target.shape,
        lambda: f"logits {tuple(logits.shape)} need one target a row, not {tuple(target.shape)}",
    )


def reduce(losses, count, target, reduction):
    """Losses of rows, [n], as the op returns them. The mean over no rows is NaN."""
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() / count if reduction == "mean" else losses.sum()


def row_weights(grad_loss, count, target, reduction):
    """What the gradient of each row is multiplied by, [n]: with no row kept 0 / 0 must not make it NaN."""
    grad = grad_loss.to(wide(grad_loss.dtype))
    grad = grad / count.clamp(min=1) if reduction == "mean" else grad
    return grad.expand(target.shape).reshape(-1)


def forward(logits, target, ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss):
    """Cross entropy of z = softcap * tanh(logit_scale * logits / softcap) against target.

    Args:
        logits: [..., V], fp16, bf16, fp32 or fp64; widened before any arithmetic. target: [...] int64.
        ignore_index: rows with this target cost nothing and have zero gradient, whatever their logits are.
        reduction: "mean" over the rows kept, "sum", or "none". label_smoothing: in [0, 1].
        softcap: 0.0 for none. logit_scale: applied before the cap.
        z_loss: each row also costs z_loss * log(sum exp z)^2.

    Returns:
        loss: [] or [...] for "none", fp32 (fp64 for fp64). With no row kept, "mean" is NaN.
        lse: [...], log of the sum of exp z. maximum: [...], of z. others: [...], the sum of exp(z - maximum) over the
            classes that are not the target. All fp32 (fp64), zero where ignored; the last two are kept for backward.
        count: [] int64, rows not ignored.

    Raises:
        CheckError, RuntimeError: unknown reduction; shapes do not fit; a target outside [0, V), though on a GPU the loss
            and the gradient of such a row are NaN instead.

    Source: Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867, for the sums; z-loss: Chowdhery et al., 2022,
    https://arxiv.org/abs/2204.02311.
    """
    check(logits, target, reduction)
    acc, terms = wide(logits.dtype), Terms(label_smoothing, softcap, logit_scale, z_loss)
    rows, labels = as_rows(logits), target.reshape(-1)
    places = supervised(labels, ignore_index)
    losses, lse, maximum, others = (torch.zeros(labels.shape, dtype=acc, device=logits.device) for _ in range(4))
    for at, room in chosen(rows, places, acc):
        part = take_apart(rows[at], labels[at].unsqueeze(1), terms, acc, out=room)
        for result, value in ((losses, part.losses(terms)), (lse, part.lse), (maximum, part.maximum), (others, part.others)):
            result[at] = value.squeeze(1)
    count = torch.tensor(rows.shape[0] if places is None else places.numel(), device=logits.device)
    per_row = (part.view(target.shape) for part in (lse, maximum, others))
    return reduce(losses, count, target, reduction), *per_row, count


def supervised(labels, ignore_index):
    """Indices of the rows that are not ignored, or None where all are kept. Reads values; in a dry run, which has none, all rows are
    kept, as indices (what takes most)."""
    if isinstance(labels, FakeTensor):
        return torch.arange(labels.numel(), device=labels.device)
    kept = labels != ignore_index
    return None if bool(kept.all()) else kept.nonzero().squeeze(1)


def chosen(rows, places, dtype):
    """Indices of the rows to compute, block by block (slices where all are), and memory for each block."""
    for part, room in row_blocks(rows.shape[0] if places is None else places.numel(), rows.shape[1], rows, dtype):
        yield (part if places is None else places[part]), room


def forward_fake(logits, target, ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss):
    check(logits, target, reduction)
    per_row = [logits.new_empty(target.shape, dtype=wide(logits.dtype)) for _ in range(3)]
    shape = target.shape if reduction == "none" else ()
    return logits.new_empty(shape, dtype=wide(logits.dtype)), *per_row, target.new_empty(())


def backward(
    grad_loss,
    logits,
    target,
    maximum,
    others,
    count,
    ignore_index,
    reduction,
    label_smoothing,
    softcap,
    logit_scale,
    z_loss,
):
    """The gradient of `cross_entropy` by its logits.

    Args:
        grad_loss: [] or [...] for "none", any strides. logits, target: as given. maximum, others, count: of forward.

    Returns:
        [..., V], contiguous, in the dtype of the logits; zero where ignored.
    """
    acc, terms = wide(logits.dtype), Terms(label_smoothing, softcap, logit_scale, z_loss)
    rows, labels = as_rows(logits), target.reshape(-1)
    weights = row_weights(grad_loss, count, target, reduction).unsqueeze(1)
    maximum, others = maximum.reshape(-1, 1), others.reshape(-1, 1)
    places = supervised(labels, ignore_index)
    make = torch.empty if places is None else torch.zeros
    grad = make(rows.shape, dtype=logits.dtype, device=logits.device)
    for at, room in chosen(rows, places, acc):
        out = grad[at] if places is None and logits.dtype == acc else None
        label, known = labels[at].unsqueeze(1), {"maximum": maximum[at], "others": others[at]}
        part = take_apart(rows[at], label, terms, acc, out=room, **known)
        found = part.gradient(terms, weights[at], out)
        if out is None:
            grad[at] = found.to(grad.dtype)
    return grad.view(logits.shape)


def backward_fake(
    grad_loss,
    logits,
    target,
    maximum,
    others,
    count,
    ignore_index,
    reduction,
    label_smoothing,
    softcap,
    logit_scale,
    z_loss,
):
    return logits.new_empty(logits.shape)


def setup_context(ctx, inputs, output):
    logits, target, *ctx.options = inputs
    _, _, maximum, others, count = output
    ctx.save_for_backward(logits, target, maximum, others, count)
