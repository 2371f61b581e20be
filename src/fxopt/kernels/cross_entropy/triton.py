"""Cross entropy on a GPU.

Bytes: forward reads the logits once, backward reads them and writes their gradient, which is the minimum (2 V and 4 V
bytes a row in 16 bits, 6 V against about 30 V of plain PyTorch: cast, log_softmax in fp32, its gradient, the cast back).
`row_kernel` also does the work on a chunk of logits in `linear_cross_entropy`: a first pass finds maximum and sums, a second
one reads the row again, mostly from L2, and writes the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxopt.kernels.blocks import as_rows
from fxopt.kernels.cross_entropy import body
from fxopt.kernels.cross_entropy.rows import Terms
from fxopt.kernels.dtypes import wide
from fxopt.kernels.launch import cdiv, launch, next_power_of_2, target

# Columns of a tile, and elements of a thread: loads of 16 bytes, four of them in flight in fp32. With a maximum and a sum for
# each lane the loop has no barrier; they are three live tiles, 48 registers of a thread.
COLUMNS = 2048
PER_THREAD = 8
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def tanh(x):
    """To 3 ulp. Below 0.6 an odd polynomial (fit here in relative error, 3e-9), above (1 - e^-2x) / (1 + e^-2x)."""
    a = tl.abs(x)
    square = a * a
    series = -5.89516e-3 * square + 2.079597e-2
    series = series * square - 5.378383e-2
    series = series * square + 1.3331924e-1
    series = series * square - 3.3333298e-1
    decay = tl.exp(-2.0 * a)
    size = tl.where(a < 0.6, a + a * square * series, (1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0, -size, size)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, without the rounding of 1 + x where x is small: 2 atanh(x / (2 + x)), five terms, 1e-9."""
    s = x / (2.0 + x)
    square = s * s
    series = 0.11111111 * square + 0.14285715
    series = series * square + 0.2
    series = series * square + 0.33333334
    return tl.where(x < 0.5, 2.0 * (s + s * square * series), tl.log(1.0 + x))


@triton.jit
def capped(x, scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """softcap * tanh(scale * x / softcap), in fp32."""
    x = x.to(tl.float32)
    if SCALED:
        x = x * scale
    if CAPPED:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def bend(x, scale, softcap, SCALED: tl.constexpr):
    """1 - tanh^2 of a raw logit, without the cancellation where tanh is near 1: 4 e^-2a / (1 + e^-2a)^2."""
    x = x.to(tl.float32)
    if SCALED:
        x = x * scale
    decay = tl.exp(-2.0 * tl.abs(x / softcap))
    return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def log_total(others, own_shift):
    """log(others + exp(own_shift)), to the last digit where the label is the maximum."""
    return tl.where(own_shift == 0.0, log1p(others), tl.log(others + tl.exp(own_shift)))


@triton.jit
def slopes(others, own_shift, maximum, weight, smoothing, z_loss, scale, classes, HAS_Z: tl.constexpr):
    """(factor of exp(z_j - maximum), what is subtracted from each class, gradient of the label's logit), without the cap's."""
    own = tl.exp(own_shift)
    total = others + own
    rise = 0.0
    if HAS_Z:
        rise = 2.0 * z_loss * (maximum + log_total(others, own_shift))
    outer = weight * scale
    label = rise * (own / total) - others / total + (smoothing - smoothing / classes)
    even = tl.where(smoothing == 0.0, 0.0, outer * (smoothing / classes))  # No 0 times an infinite weight.
    return outer * (1.0 + rise) / total, even, outer * label


@triton.jit(do_not_specialize=["ignore_index"])
def row_kernel(logits_ptr, logits_row, logits_column, bias_ptr, target_ptr, weight_ptr, grad_ptr, grad_row,
               loss_ptr, lse_ptr, maximum_ptr, others_ptr, log_prob_ptr, entropy_ptr, correct_ptr,
               classes, ignore_index, smoothing, softcap, scale, z_loss,
               SCALED: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, HAS_Z: tl.constexpr, BIASED: tl.constexpr,
               WEIGHTED: tl.constexpr, SUMS: tl.constexpr, LOG_PROB: tl.constexpr, ENTROPY: tl.constexpr,
               CORRECT: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program. The gradient may lie over the logits: a thread writes where it has read, and the label's column,
    which every thread reads at the start, is written once, after the barriers of the sums."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target_ptr + row)
    logits = logits_ptr + row * logits_row
    lane = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if SUMS:
            tl.store(lse_ptr + row, 0.0)
            tl.store(maximum_ptr + row, 0.0)
            tl.store(others_ptr + row, 0.0)
        if LOG_PROB:
            tl.store(log_prob_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if CORRECT:
            tl.store(correct_ptr + row, 0)
        if GRAD:
            for start in range(0, classes, BLOCK):
                column = start + lane
                zero = tl.zeros((BLOCK,), tl.float32).to(grad_ptr.dtype.element_ty)
                tl.store(grad_ptr + row * grad_row + column, zero, mask=column < classes)
    else:
        # A label that is no class poisons the row: its loss and gradient are NaN.
        known = (label >= 0) & (label < classes)
        own = tl.load(logits + label * logits_column, mask=known, other=float("nan")).to(tl.float32)
        if BIASED:
            own += tl.load(bias_ptr + label, mask=known, other=0.0).to(tl.float32)
        raw_own = own
        own = capped(own, scale, softcap, SCALED, CAPPED)
        top = tl.full((BLOCK,), LOWEST, tl.float32)
        rest = tl.zeros((BLOCK,), tl.float32)
        beaten = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, classes, BLOCK):
            column = start + lane
            inside = column < classes
            x = tl.load(logits + column.to(tl.int64) * logits_column, mask=inside, other=0.0).to(tl.float32)
            if BIASED:
                x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, capped(x, scale, softcap, SCALED, CAPPED), float("-inf"))
            higher = tl.maximum(top, x)
            rest = rest * tl.exp(top - higher) + tl.where(column == label, 0.0, tl.exp(x - higher))
            top = higher
            if CORRECT:
                beaten = beaten | ((x > own) | ((x == own) & (column < label))).to(tl.int32)
        maximum = tl.max(top, 0)
        others = tl.sum(rest * tl.exp(top - maximum), 0)
        own_shift = own - maximum
        log_sum = log_total(others, own_shift)
        lse = maximum + log_sum
        loss = log_sum - own_shift
        if LOG_PROB:
            tl.store(log_prob_ptr + row, -loss)
        if CORRECT:
            tl.store(correct_ptr + row, ((tl.max(beaten, 0) == 0) & (lse == lse)).to(tl.int8))
        if SUMS:
            tl.store(lse_ptr + row, lse)
            tl.store(maximum_ptr + row, maximum)
            tl.store(others_ptr + row, others)

        if GRAD or ENTROPY or SMOOTHED:
            weight = 1.0
            if WEIGHTED:
                weight = tl.load(weight_ptr + row)
            slope, even, own_slope = slopes(others, own_shift, maximum, weight, smoothing, z_loss, scale, classes, HAS_Z)
            spread = tl.zeros((BLOCK,), tl.float32)
            shifts = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, classes, BLOCK):
                column = start + lane
                inside = column < classes
                x = tl.load(logits + column.to(tl.int64) * logits_column, mask=inside, other=0.0).to(tl.float32)
                if BIASED:
                    x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
                raw = x
                x = capped(x, scale, softcap, SCALED, CAPPED)
                shift = x - maximum
                e = tl.exp(shift)
                if ENTROPY:  # 0 log 0 is 0, also for a class whose logit is -inf.
                    spread += tl.where(inside & (e != 0.0), e * shift, 0.0)
                if SMOOTHED:
                    shifts += tl.where(inside, shift, 0.0)
                if GRAD:
                    slant = e * slope - even
                    if CAPPED:
                        slant = slant * bend(raw, scale, softcap, SCALED)
                    out = grad_ptr + row * grad_row + column
                    tl.store(out, slant.to(grad_ptr.dtype.element_ty), mask=inside & (column != label))
            if ENTROPY:
                tl.store(entropy_ptr + row, log_sum - tl.sum(spread, 0) / (others + tl.exp(own_shift)))
            if SMOOTHED:
                loss = (1.0 - smoothing) * loss + smoothing * (log_sum - tl.sum(shifts, 0) / classes)
            if GRAD:
                if CAPPED:
                    own_slope = own_slope * bend(raw_own, scale, softcap, SCALED)
                tl.store(grad_ptr + row * grad_row + label, own_slope.to(grad_ptr.dtype.element_ty), mask=known)
        if HAS_Z:
            loss += z_loss * lse * lse
        tl.store(loss_ptr + row, loss)


@triton.jit(do_not_specialize=["ignore_index"])
def gradient_kernel(logits_ptr, logits_row, logits_column, target_ptr, maximum_ptr, others_ptr, loss_grad_ptr, loss_grad_row,
                    count_ptr, grad_ptr, classes, ignore_index, smoothing, softcap, scale, z_loss,
                    SCALED: tl.constexpr, CAPPED: tl.constexpr, HAS_Z: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of a row a program: program (row, tile)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    label = tl.load(target_ptr + row)
    out = grad_ptr + row * classes + column
    if label == ignore_index:
        tl.store(out, tl.zeros((BLOCK,), tl.float32).to(grad_ptr.dtype.element_ty), mask=inside)
    else:
        logits = logits_ptr + row * logits_row
        known = (label >= 0) & (label < classes)
        own = tl.load(logits + label * logits_column, mask=known, other=float("nan"))
        x = tl.load(logits + column.to(tl.int64) * logits_column, mask=inside, other=0.0)
        weight = tl.load(loss_grad_ptr + row * loss_grad_row).to(tl.float32)
        if MEAN:
            weight = weight / tl.load(count_ptr).to(tl.float32)
        maximum, others = tl.load(maximum_ptr + row), tl.load(others_ptr + row)
        raw = x
        own = capped(own, scale, softcap, SCALED, CAPPED)
        x = capped(x, scale, softcap, SCALED, CAPPED)
        slope, even, own_slope = slopes(others, own - maximum, maximum, weight, smoothing, z_loss, scale, classes, HAS_Z)
        slant = tl.where(column == label, own_slope, tl.exp(x - maximum) * slope - even)
        if CAPPED:
            slant = slant * bend(raw, scale, softcap, SCALED)
        tl.store(out, slant.to(grad_ptr.dtype.element_ty), mask=inside)


def tile(classes):
    """BLOCK and num_warps for rows of so many classes."""
    block = min(COLUMNS, max(16, next_power_of_2(classes)))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // (PER_THREAD * target().warp)))}


def run_rows(logits, bias, labels, weight, ignore_index, terms, grad, losses, sums=None, statistics=(None, None, None)):
    """Start `row_kernel` on each row.

    Args:
        logits: [n, V], any strides. bias: [V] or None, added to them. labels: [n] int64, contiguous. weight: [n] fp32 or None.
        grad: [n, V] with rows of any stride, or None; may be logits themselves. losses: [n] fp32.
        sums: (lse, maximum, others), [n] fp32 each, or None. statistics: log_prob, entropy [n] fp32, correct [n] bool, or None.
    """
    rows, classes = logits.shape
    unused = losses
    lse, maximum, others = sums or (unused,) * 3
    flags = dict(zip(("LOG_PROB", "ENTROPY", "CORRECT"), (part is not None for part in statistics), strict=True))
    log_prob, entropy, correct = (unused if part is None else part for part in statistics)
    launch(
        row_kernel,
        (rows,),
        logits,
        logits.stride(0),
        logits.stride(1),
        unused if bias is None else bias,
        labels,
        unused if weight is None else weight,
        logits if grad is None else grad,
        0 if grad is None else grad.stride(0),
        losses,
        lse,
        maximum,
        others,
        log_prob,
        entropy,
        correct.view(torch.int8) if correct.dtype == torch.bool else correct,
        classes,
        ignore_index,
        *numbers(terms),
        SCALED=terms.logit_scale != 1.0,
        CAPPED=bool(terms.softcap),
        SMOOTHED=bool(terms.label_smoothing),
        HAS_Z=bool(terms.z_loss),
        BIASED=bias is not None,
        WEIGHTED=weight is not None,
        SUMS=sums is not None,
        GRAD=grad is not None,
        **flags,
        **tile(classes),
    )


def numbers(terms):
    """The scalars of the loss, in the order of the kernels' arguments."""
    return float(terms.label_smoothing), float(terms.softcap), float(terms.logit_scale), float(terms.z_loss)


def forward(logits, target, ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss):
    """See `body.forward`. fp64 goes to the ATen body. A target that is no class gives NaN: an error would need a wait."""
    if logits.dtype == torch.float64:
        return body.forward(logits, target, ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss)
    body.check(logits, target, reduction)
    rows, labels = as_rows(logits), target.reshape(-1).contiguous()
    losses, *sums = (logits.new_empty(labels.shape, dtype=wide(logits.dtype)) for _ in range(4))
    terms = Terms(label_smoothing, softcap, logit_scale, z_loss)
    run_rows(rows, None, labels, None, ignore_index, terms, None, losses, sums)
    count = (labels != ignore_index).sum()
    return body.reduce(losses, count, target, reduction), *(part.view(target.shape) for part in sums), count


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
    """See `body.backward`. fp64 goes to the ATen body."""
    if logits.dtype == torch.float64:
        options = (ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss)
        return body.backward(grad_loss, logits, target, maximum, others, count, *options)
    rows, labels = as_rows(logits), target.reshape(-1).contiguous()
    (number, classes), each = rows.shape, grad_loss.reshape(-1)
    grad = logits.new_empty(logits.shape)
    meta = tile(classes)
    terms = Terms(label_smoothing, softcap, logit_scale, z_loss)
    launch(
        gradient_kernel,
        (number, cdiv(classes, meta["BLOCK"])),
        rows,
        rows.stride(0),
        rows.stride(1),
        labels,
        maximum,
        others,
        each,
        each.stride(0) if reduction == "none" else 0,
        count,
        grad,
        classes,
        ignore_index,
        *numbers(terms),
        SCALED=terms.logit_scale != 1.0,
        CAPPED=bool(terms.softcap),
        HAS_Z=bool(terms.z_loss),
        MEAN=reduction == "mean",
        **meta,
    )
    return grad
