"""Linear layers that read one x, each with a low-rank adapter.

The plain form writes each adapter's output, its scaled copy and the sum, six passes over [rows, out], reads x twice a layer,
and adds up dx in as many passes as there are layers. Here x A^T is one product for all siblings, an adapter is one `addmm_`
into the base output, and dx is one product or accumulates inside the products. Backward saves x, x A^T and no dense copy of a
quantized weight, and multiplies from the small side. W^T dY of a frozen weight is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxopt.kernels import dropout as dropouts
from fxopt.kernels import linear
from fxopt.kernels.blocks import as_rows, rows_of
from fxopt.kernels.lora_linear.grouping import first_parts, siblings


def forward(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed, dropout, seeds):
    """y_i = x W_i^T + bias_i + scale_i (drop(x) A_i^T) B_i^T for each sibling i of n.

    Args:
        x: [..., in], fp16, bf16, fp32 or fp64.
        bases: the parts of all stored weights, one after the other. formats: n names (see kernels/formats). shapes: the dense
            shape of each, 2 n numbers: [out, in], or [in, out] if transposed. A dense base is in x's dtype.
        biases: none, or n of [out].
        lora_a: n of [r, in]. lora_b: n of [out, r]. Either x's dtype or a wider one; the adapter is computed in theirs.
        scales: n numbers, alpha / r. transposed: y = x W + bias, for weights stored as [in, out].
        dropout: probability of a zero in the adapters' input, in [0, 1). seeds: int64 [n], or None without dropout: the mask
            is a function of the seed (kernels/dropout.py), so that backward and recomputation see the same one.

    Returns:
        a list: y_1 ... y_n, each [..., out_i] in x's dtype, with lora_b = 0 equal to the base layer bit for bit; then
        low: [..., r_1 + ... + r_n], the drop(x) A^T in the adapters' dtype, kept for the gradients of lora_b.

    Raises:
        CheckError, RuntimeError: x does not fit a weight or an adapter; the lists do not fit each other.

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685.
    """
    group = siblings(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed)
    rows = as_rows(x)
    low = _shrink(rows.to(lora_a[0].dtype), group, dropout, seeds)
    ys = []
    for each in group:
        y = linear.apply(x, each.dense(x.dtype), each.bias, transposed)
        out, part = y.view(rows_of(x), y.shape[-1]), low[:, each.columns]
        if out.dtype == part.dtype:
            out.addmm_(part, each.b.t(), alpha=each.scale)
        else:
            out.add_(part.mm(each.b.t()), alpha=each.scale)
        ys.append(y)
    return [*ys, low.view(*x.shape[:-1], low.shape[1])]


def _shrink(rows, group, dropout, seeds):
    """drop(x) A^T of all siblings, [rows, sum of r]: one product where they see the same x."""
    if not dropout:
        return rows.mm(together([each.a for each in group]).t())
    return torch.cat([(rows * _mask(seeds, i, rows, dropout)).mm(each.a.t()) for i, each in enumerate(group)], dim=1)


def _mask(seeds, i, rows, dropout):
    return dropouts.mask(seeds[i], *rows.shape, dropout, rows.dtype)


def together(matrices):
    """The matrices below each other, without a copy of a single one."""
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def forward_fake(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed, dropout, seeds):
    group = siblings(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed)
    ys = [x.new_empty((*x.shape[:-1], each.b.shape[0])) for each in group]
    return [*ys, x.new_empty((*x.shape[:-1], sum(each.a.shape[0] for each in group)), dtype=lora_a[0].dtype)]


def backward(dys, x, bases, formats, shapes, biases, lora_a, lora_b, low, scales, transposed, dropout, seeds, output_mask):
    """Gradients of `lora_linear`. With u_i = scale_i dy_i B_i [rows, r]:

    dx = sum of dy_i W_i + (u_i A_i) mask_i, dA_i = u_i^T drop(x), dB_i = scale_i dy_i^T low_i, dW_i = dy_i^T x,
    dbias_i = sum of dy_i over rows. dW costs as much as the whole forward; it is formed only under the mask.

    Args:
        dys: n of [..., out_i], any strides; None where nothing read y_i. x: None where neither dA nor dW is asked for.
        biases: for their dtype. output_mask: dx, then n dW, dbias (as many as biases), n dA, n dB.

    Returns:
        a list of the gradients that the mask asks for, in its order, each in its input's dtype.
    """
    group = siblings(None, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed)
    want = Wanted.of(output_mask, len(group), len(biases))
    some = next(dy for dy in dys if dy is not None)
    grads = [None if dy is None else as_rows(dy) for dy in dys]
    rows = None if x is None else as_rows(x)
    lows = low.reshape(rows_of(some), low.shape[-1])
    ups = [None if grad is None or not (want.x or a) else grad.to(each.b.dtype).mm(each.b).mul_(each.scale)
           for grad, each, a in zip(grads, group, want.a, strict=True)]
    found = []
    if want.x:
        dx = _pull_back(grads, ups, group, transposed, dropout, seeds)
        found.append(dx.view(*some.shape[:-1], dx.shape[1]))
    found += dense_gradients(grads, rows, group, biases, want, transposed)
    wide = None if rows is None else rows.to(lora_a[0].dtype)
    for i, each in enumerate(group):
        if want.a[i]:
            found.append(torch.zeros_like(each.a) if ups[i] is None else
                         ups[i].t().mm(wide * _mask(seeds, i, wide, dropout) if dropout else wide))
    for i, each in enumerate(group):
        if want.b[i]:
            found.append(torch.zeros_like(each.b) if grads[i] is None else
                         grads[i].to(low.dtype).t().mm(lows[:, each.columns]).mul_(each.scale))
    return found


@dataclass(frozen=True)
class Wanted:
    """An output mask by what it asks for: dx, and for each sibling dW, dbias, dA and dB."""

    x: bool
    weights: Sequence[bool]
    biases: Sequence[bool]
    a: Sequence[bool]
    b: Sequence[bool]

    @staticmethod
    def of(mask, count, biases):
        ends = [1, 1 + count, 1 + count + biases, 1 + 2 * count + biases]
        return Wanted(mask[0], mask[1 : ends[1]], mask[ends[1] : ends[2]], mask[ends[2] : ends[3]], mask[ends[3] :])


def dense_gradients(grads, rows, group, biases, want, transposed):
    """The gradients of dense weights and of biases that the mask asks for, in its order."""
    found = []
    for grad, each, wanted in zip(grads, group, want.weights, strict=True):
        if wanted:
            found.append(torch.zeros_like(each.base[0]) if grad is None else linear.weight_gradient(grad, rows, transposed))
    for i, wanted in enumerate(want.biases):
        if wanted:
            found.append(torch.zeros_like(biases[i]) if grads[i] is None else linear.bias_gradient(grads[i], biases[i].dtype))
    return found


def _pull_back(grads, ups, group, transposed, dropout, seeds):
    """dx, [rows, in]: of the siblings whose output was used."""
    used = [(grad, up, each, i) for i, (grad, up, each) in enumerate(zip(grads, ups, group, strict=True)) if grad is not None]
    some, rank_dtype = used[0][0], used[0][1].dtype
    matrices = [each.dense(some.dtype) for _, _, each, _ in used]
    sides = [matrix.t() if transposed else matrix for matrix in matrices]  # each [out, in]
    width, total = sides[0].shape[1], sum(side.shape[0] for side in sides)
    if len(used) > 1 and not dropout and rank_dtype == some.dtype and joined(some.shape[0], width, total, len(used)):
        # [dy_1 ... dy_n u_1 ... u_n] [W_1 ... W_n A_1 ... A_n]: one product
        left = torch.cat([grad for grad, *_ in used] + [up for _, up, *_ in used], dim=1)
        return left.mm(torch.cat([*sides, *(each.a for _, _, each, _ in used)]))
    dx = None
    for (grad, *_), side in zip(used, sides, strict=True):
        dx = grad.mm(side) if dx is None else dx.addmm_(grad, side)
    if dropout:
        for _, up, each, i in used:
            dx.add_(up.mm(each.a).mul_(dropouts.mask(seeds[i], some.shape[0], width, dropout, up.dtype)))
        return dx
    up, a = torch.cat([up for _, up, *_ in used], dim=1), together([each.a for _, _, each, _ in used])
    return dx.addmm_(up, a) if up.dtype == dx.dtype else dx.add_(up.mm(a))


def joined(rows, width, total, count):
    """Whether one product over joined operands moves less memory than products that accumulate in dx.

    Joining copies `total` (the sum of all outputs) rows of the weights and columns of the gradients; accumulating reads and
    writes dx [rows, width] once more for each further sibling.
    """
    return total * (width + rows) < (count - 1) * rows * width


def backward_fake(dys, x, bases, formats, shapes, biases, lora_a, lora_b, low, scales, transposed, dropout, seeds, output_mask):
    some = next(dy for dy in dys if dy is not None)
    places = first_parts(formats)
    like = [*(bases[place] for place in places), *biases, *lora_a, *lora_b]
    found = [some.new_empty((*some.shape[:-1], lora_a[0].shape[1]))] if output_mask[0] else []
    return found + [part.new_empty(part.shape) for part, on in zip(like, output_mask[1:], strict=True) if on]


def setup_context(ctx, inputs, output):
    x, bases, ctx.formats, ctx.shapes, biases, lora_a, lora_b, ctx.scales, ctx.transposed, ctx.dropout, seeds = inputs
    ctx.counts, ctx.first_parts = (len(bases), len(biases), len(lora_a)), first_parts(ctx.formats)
    # needs_input_grad lies flat here: x, each base, formats, shapes, each bias, each lora_a, ...
    flat = ctx.needs_input_grad
    start = 3 + len(bases) + len(biases)
    needs_x = any(flat[1 : 1 + len(bases)]) or any(flat[start : start + len(lora_a)])
    ctx.save_for_backward(x if needs_x else None, output[-1], *bases, *biases, *lora_a, *lora_b, seeds)
