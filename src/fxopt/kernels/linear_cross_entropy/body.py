"""Head and cross entropy without the logits in memory: gradients are computed on the way forward.

When a chunk of logits is there, its gradient is one more product away; plain PyTorch keeps three
tensors of [N, V] instead. The saved gradients are those of the summed loss: the division by the
number of rows and the incoming gradient are applied in backward, in fp32, so that an fp16 gradient
is not pushed into the subnormals before a loss scaler can lift it.
"""

from __future__ import annotations

import torch

from fxopt.errors import CheckError
from fxopt.kernels.blocks import as_rows
from fxopt.kernels.cross_entropy.body import REDUCTIONS, reduce, row_weights
from fxopt.kernels.cross_entropy.rows import NONE, Terms
from fxopt.kernels.dtypes import wide
from fxopt.kernels.linear_cross_entropy.sweep import ATEN, Head, sweep


def _check(hidden, weight, target, reduction):
    if reduction not in REDUCTIONS:
        raise CheckError(f"cross entropy has no reduction {reduction!r}", do=f"use one of {', '.join(REDUCTIONS)}")
    if hidden.dtype != weight.dtype:
        raise CheckError(f"hidden is {hidden.dtype} and the head is {weight.dtype}", do="cast one to the other")
    torch._check(
        hidden.shape[:-1] == target.shape,
        lambda: f"hidden {tuple(hidden.shape)} needs one target a row, not {tuple(target.shape)}",
    )
    torch._check(
        hidden.shape[-1] == weight.shape[1],
        lambda: f"hidden {tuple(hidden.shape)} does not fit a head of {tuple(weight.shape)}",
    )


def kept_now(reduction, grad_mask, bias):
    """Which gradients forward computes: with reduction "none" those of weight and bias mix rows
    before their incoming gradients are known, so that only backward can form them."""
    hidden, *mixing = grad_mask
    return [hidden, *(on and reduction != "none" and there for on, there in zip(mixing, (True, bias is not None), strict=True))]


def forward(
    hidden,
    weight,
    bias,
    target,
    ignore_index,
    reduction,
    label_smoothing,
    softcap,
    logit_scale,
    z_loss,
    chunk,
    rows,
    grad_mask,
    statistics,
):
    """Cross entropy of z = softcap * tanh(logit_scale (hidden W^T + bias) / softcap) against target.

    Args:
        hidden: [..., d]. weight: [V, d], same dtype. bias: [V] or None. target: [...] int64.
        ignore_index: rows with this target are dropped before the head. reduction: "mean" over the
            rows kept, "sum", or "none". label_smoothing: in [0, 1]. softcap: 0.0 for none.
        logit_scale: applied before the cap. z_loss: each row also costs z_loss * log(sum exp z)^2.
        chunk: rows whose logits exist at once, 0 to choose.
        rows: a bound that the caller knows of the rows that are not ignored; 0 or -1 where none is known. The ATen body
            needs none. On a GPU their number is a value on the device: with a bound only so many rows are computed, with
            0 all are, and with -1 the host waits for the number, which a captured CUDA graph cannot.
        grad_mask: which of (d_hidden, d_weight, d_bias) to compute now, for backward. What is not
            computed now and needed then costs a second sweep over the head; all False for
            inference.
        statistics: which of (log_prob, entropy, correct) to compute.

    Returns:
        loss: [] or [...] for "none", fp32 (fp64 for fp64): the softmax is computed in that dtype from
            logits that the ATen body's product rounds to theirs. With no row kept, "mean" is NaN.
        count: [] int64, rows not ignored.
        log_prob: [...], log of the probability of the target. entropy: [...], of the distribution, in nats, both
            as the loss; correct: [...] bool, whether the target is the first of the largest logits (False for NaN).
            Zero where ignored, None where not asked for. They have no derivative: minus the log-probability that has
            one is the loss with reduction "none", no smoothing and no z_loss.
        d_hidden [..., d], d_weight [V, d], d_bias [V]: gradients of the summed loss, or None.
            d_hidden is full, with zero rows where ignored: a compact one would have a size that
            depends on the data, which no trace with static or symbolic shapes can hold.

    Raises:
        CheckError, RuntimeError: unknown reduction; shapes or dtypes do not fit; a target outside
            [0, V), though on a GPU the results and gradients of such a row are NaN instead; more rows than the bound,
            though on a GPU the loss is NaN instead.

    Source: Wijmans et al., 2024, https://arxiv.org/abs/2411.09009, for the problem and for the
    order of the sums; gradients in forward as in Hsu et al., 2024, https://arxiv.org/abs/2410.10989.
    """
    terms = Terms(label_smoothing, softcap, logit_scale, z_loss)
    return on_device(ATEN, hidden, Head(weight, bias, ignore_index, terms, chunk, rows), target, reduction, grad_mask, statistics)


def on_device(device, hidden, head, target, reduction, grad_mask, statistics):
    """`forward` on a `Device`."""
    _check(hidden, head.weight, target, reduction)
    mask = kept_now(reduction, grad_mask, head.bias)
    results, count, d_hidden, *others = sweep(device, head, as_rows(hidden), target.reshape(-1), None, mask, statistics)
    losses, *wanted = results.parts
    return (
        reduce(losses, count, target, reduction),
        count,
        *(None if part is None else part.view(target.shape) for part in wanted),
        None if d_hidden is None else d_hidden.view(hidden.shape),
        *others,
    )


def forward_fake(
    hidden,
    weight,
    bias,
    target,
    ignore_index,
    reduction,
    label_smoothing,
    softcap,
    logit_scale,
    z_loss,
    chunk,
    rows,
    grad_mask,
    statistics,
):
    _check(hidden, weight, target, reduction)
    acc, mask = wide(hidden.dtype), kept_now(reduction, grad_mask, bias)
    dtypes = zip((acc, acc, torch.bool), statistics, strict=True)
    wanted = [hidden.new_empty(target.shape, dtype=dtype) if on else None for dtype, on in dtypes]
    parts = zip((hidden, weight, bias), mask, strict=True)
    gradients = [part.new_empty(part.shape) if on else None for part, on in parts]
    shape = target.shape if reduction == "none" else ()
    return hidden.new_empty(shape, dtype=acc), target.new_empty(()), *wanted, *gradients


def backward(
    grad_loss,
    count,
    d_hidden,
    d_weight,
    d_bias,
    hidden,
    weight,
    bias,
    target,
    ignore_index,
    reduction,
    label_smoothing,
    softcap,
    logit_scale,
    z_loss,
    chunk,
    rows,
    output_mask,
):
    """Gradients of `linear_cross_entropy`: saved ones scaled, missing ones by a second sweep.

    Args:
        grad_loss: [] or [...] for "none". count, d_hidden, d_weight, d_bias: results of forward.
        target: as given to forward. hidden, weight, bias: None unless a gradient in output_mask was not computed then.

    Returns:
        the three gradients in their inputs' dtypes, None where the mask is off. Rows that were ignored have zero gradient,
        also where grad_loss is infinite or NaN; so has everything when no row was kept.
    """
    terms = Terms(label_smoothing, softcap, logit_scale, z_loss)
    head = Head(weight, bias, ignore_index, terms, chunk, rows)
    return back_on_device(ATEN, grad_loss, count, [d_hidden, d_weight, d_bias], hidden, head, target, reduction, output_mask)


def back_on_device(device, grad_loss, count, saved, hidden, head, target, reduction, output_mask):
    """`backward` on a `Device`."""
    missing = [on and part is None for on, part in zip(output_mask, saved, strict=True)]
    fresh = [None] * 3
    if any(missing):
        weights = row_weights(grad_loss, count, target, reduction)
        fresh = sweep(device, head, as_rows(hidden), target.reshape(-1), weights, missing, NONE)[2:]
    grad = grad_loss.to(wide(grad_loss.dtype))
    if reduction == "mean":
        grad = grad / count.clamp(min=1)
    # Saved gradients of ignored rows are zero, and times an infinite one, that of a sum divided by no labels, would be NaN.
    grad = grad.masked_fill(count == 0, 0.0)
    results = []
    for place, part in enumerate(saved):
        if not output_mask[place]:
            results.append(None)
        elif missing[place]:
            results.append(fresh[place].view(hidden.shape) if place == 0 else fresh[place])
        else:
            factor = grad.unsqueeze(-1) if reduction == "none" else grad
            results.append(torch.mul(part, factor, out=part.new_empty(part.shape)))
            if place == 0:
                results[0].masked_fill_((target == head.ignore_index).unsqueeze(-1), 0.0)
    return tuple(results)


def backward_fake(
    grad_loss,
    count,
    d_hidden,
    d_weight,
    d_bias,
    hidden,
    weight,
    bias,
    target,
    ignore_index,
    reduction,
    label_smoothing,
    softcap,
    logit_scale,
    z_loss,
    chunk,
    rows,
    output_mask,
):
    parts = zip((d_hidden, d_weight, d_bias), (hidden, weight, bias), output_mask, strict=True)
    like = [(saved if saved is not None else source, on) for saved, source, on in parts]
    return tuple(part.new_empty(part.shape) if on else None for part, on in like)


def setup_context(ctx, inputs, output):
    hidden, weight, bias, target, *ctx.options, _, _ = inputs
    count, gradients = output[1], output[5:]
    needed = ctx.needs_input_grad[:3]
    again = any(need and gradient is None for need, gradient in zip(needed, gradients, strict=True))
    gradients = [gradient if need else None for need, gradient in zip(needed, gradients, strict=True)]
    data = (hidden, weight, bias) if again else (None,) * 3
    ctx.save_for_backward(count, *gradients, *data, target)
