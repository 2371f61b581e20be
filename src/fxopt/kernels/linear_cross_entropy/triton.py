"""Head and cross entropy on a GPU.

With a gradient, for each chunk of rows: logits by the vendor's matrix product (16 bits in, fp32 out) into private memory, one
kernel that finds the losses and writes the gradient of the logits, and two more products. Per logit that is 4 d FLOPs (6 d
with a trained head) and 16 bytes: 4 written by the product, 4 + 4 read by the kernel's two passes, 2 written, 2 read by the
product for d_hidden. On an H100 (798 TFLOP/s and 3.0 TB/s measured) 20 ps against 5 at d = 4,096. A kernel that never
writes the logits has to compute them twice, 6 d FLOPs: 31 ps.

Without a gradient, in 16 bits, `head_kernel` keeps the logits in registers: 2 d FLOPs and no bytes a logit, where chunks cost
8 bytes or 2.7 ps. Its tiles of 128 x 128 do 64 FLOPs for each byte that they read from L2 (5.5 TB/s): 350 TFLOP/s, about half
of the vendor's product. By this arithmetic it is faster for d below 945, and used up to 1,024; not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxopt.kernels.cross_entropy.rows import Terms
from fxopt.kernels.cross_entropy.triton import LOWEST, capped, log_total, numbers, run_rows
from fxopt.kernels.launch import cdiv, launch, next_power_of_2, target
from fxopt.kernels.linear_cross_entropy import body
from fxopt.kernels.linear_cross_entropy.sweep import Head

# Bytes of fp32 logits at once, and the fewest rows. A chunk of n rows does n FLOPs for each byte of the head that it reads:
# an H100 needs 266 for its full rate in 16 bits.
SCRATCH = 1 << 28
FEWEST_ROWS = 512
# Rows of the scratch start on 128 bytes, as the fast kernels of the matrix products need.
ALIGNED = 64
_LOW = (torch.float16, torch.bfloat16)
# The widest hidden state for `head_kernel`: see above.
WIDEST = 1024


@triton.jit(do_not_specialize=["rows", "tiles_each"])
def head_kernel(hidden_ptr, hidden_row, weight_ptr, weight_row, weight_column, bias_ptr, target_ptr,
                maximum_ptr, others_ptr, own_ptr, first_ptr, rows, classes, width, tiles_each, scale, softcap,
                SCALED: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr, CORRECT: tl.constexpr,
                M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Program (block of rows, split): `tiles_each` tiles of classes for M rows. Neighbouring programs share a split, so that
    the head is read from memory once. Writes what `join_kernel` needs, [splits, rows]."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    here = row < rows
    label = tl.load(target_ptr + row, mask=here, other=-1)
    # 64-bit arithmetic on scalars only: offsets within a tile are small, and pointers of 64 bits would cost 60 registers.
    hidden = hidden_ptr + tl.cast(tl.program_id(0) * M, tl.int64) * hidden_row
    k = tl.arange(0, K)
    left_at = tl.arange(0, M)[:, None] * hidden_row + k[None, :]
    right_at = tl.arange(0, N)[None, :] * weight_row + k[:, None] * weight_column
    top = tl.full((M,), LOWEST, tl.float32)
    rest = tl.zeros((M,), tl.float32)
    own = tl.zeros((M,), tl.float32)
    first = tl.zeros((M,), tl.int32)
    begin = tl.program_id(1) * tiles_each
    for tile in range(begin, tl.minimum(begin + tiles_each, tl.cdiv(classes, N))):
        column = tile * N + tl.arange(0, N)
        inside = column < classes
        weight = weight_ptr + tl.cast(tile * N, tl.int64) * weight_row
        x = tl.zeros((M, N), tl.float32)
        for start in range(0, width, K):
            there = k < width - start
            left = tl.load(hidden + start + left_at, mask=here[:, None] & there[None, :], other=0.0)
            step = tl.cast(start, tl.int64) * weight_column
            right = tl.load(weight + step + right_at, mask=inside[None, :] & there[:, None], other=0.0)
            x = tl.dot(left, right, x, input_precision="ieee")
        if BIASED:
            x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        x = capped(x, scale, softcap, SCALED, CAPPED)
        mine = column[None, :] == label[:, None]
        own += tl.sum(tl.where(mine, x, 0.0), 1)
        x = tl.where(inside[None, :], x, float("-inf"))
        tile_top = tl.max(x, 1)
        if CORRECT:
            place = tl.min(tl.where(x == tile_top[:, None], column[None, :], classes), 1)
            first = tl.where(tile_top > top, place, first)
        higher = tl.maximum(top, tile_top)
        rest = rest * tl.exp(top - higher) + tl.sum(tl.where(mine, 0.0, tl.exp(x - higher[:, None])), 1)
        top = higher
    at = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(maximum_ptr + at, top, mask=here)
    tl.store(others_ptr + at, rest, mask=here)
    tl.store(own_ptr + at, own, mask=here)
    if CORRECT:
        tl.store(first_ptr + at, first, mask=here)


@triton.jit(do_not_specialize=["rows", "splits", "ignore_index"])
def join_kernel(maximum_ptr, others_ptr, own_ptr, first_ptr, target_ptr, loss_ptr, log_prob_ptr, correct_ptr,
                rows, splits, classes, ignore_index, z_loss,
                LOG_PROB: tl.constexpr, CORRECT: tl.constexpr, HAS_Z: tl.constexpr, ROWS: tl.constexpr):
    """The splits of each row together."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    label = tl.load(target_ptr + row, mask=here, other=0)
    maximum = tl.full((ROWS,), LOWEST, tl.float32)
    others = tl.zeros((ROWS,), tl.float32)
    own = tl.zeros((ROWS,), tl.float32)
    first = tl.zeros((ROWS,), tl.int32)
    for split in range(0, splits):
        at = tl.cast(split, tl.int64) * rows + row
        top = tl.load(maximum_ptr + at, mask=here, other=0.0)
        rest = tl.load(others_ptr + at, mask=here, other=0.0)
        own += tl.load(own_ptr + at, mask=here, other=0.0)
        if CORRECT:
            first = tl.where(top > maximum, tl.load(first_ptr + at, mask=here, other=0), first)
        higher = tl.maximum(maximum, top)
        others = others * tl.exp(maximum - higher) + rest * tl.exp(top - higher)
        maximum = higher
    own = tl.where((label >= 0) & (label < classes), own, float("nan"))
    kept = label != ignore_index
    own_shift = own - maximum
    log_sum = log_total(others, own_shift)
    lse = maximum + log_sum
    loss = log_sum - own_shift
    if LOG_PROB:
        tl.store(log_prob_ptr + row, tl.where(kept, -loss, 0.0), mask=here)
    if CORRECT:
        tl.store(correct_ptr + row, ((first == label) & kept & (lse == lse)).to(tl.int8), mask=here)
    if HAS_Z:
        loss += z_loss * lse * lse
    tl.store(loss_ptr + row, tl.where(kept, loss, 0.0), mask=here)


class Gpu:
    """The products are the vendor's; see `sweep.Device`."""

    def supervised(self, head, hidden, target):
        rows = target.numel()
        if head.rows < 0:  # The host waits, as the caller said: it is the host that gives the vendor's products their sizes.
            places = (target != head.ignore_index).nonzero().squeeze(1)
            return None if places.numel() == rows else places
        if 0 < head.rows < rows:  # Those with a label first, in their order.
            return torch.sort(target == head.ignore_index, stable=True)[1][: head.rows]
        return None

    def rows_per_chunk(self, head, rows):
        return max(FEWEST_ROWS, SCRATCH // (4 * max(1, head.weight.shape[0])) // 128 * 128)

    def scratch(self, head, rows, mask):
        weight, classes = head.weight, head.weight.shape[0]
        padded = cdiv(classes, ALIGNED) * ALIGNED
        logits = weight.new_empty(rows, padded, dtype=torch.float32)[:, :classes]
        return logits, weight.new_empty(rows, padded)[:, :classes] if weight.dtype in _LOW and any(mask) else logits

    def without_logits(self, head, rows, labels, results):
        plain = not head.terms.label_smoothing and results.entropy is None
        if rows.dtype not in _LOW or rows.shape[1] > WIDEST or not plain:
            return False
        if rows.shape[0]:
            _head(head, rows, labels.contiguous(), results)
        return True

    def logits(self, head, rows, out):
        weight = head.weight.t()
        if rows.dtype == out.dtype:
            torch.mm(rows, weight, out=out)
        elif rows.is_cuda:
            torch.mm(rows, weight, out_dtype=out.dtype, out=out)
        else:  # Only CUDA has that product.
            torch.mm(rows.to(out.dtype), weight.to(out.dtype), out=out)

    def losses(self, head, logits, labels, row_weight, results, grad):
        row_weight = None if row_weight is None else row_weight.contiguous()
        losses, *statistics = results.parts
        run_rows(logits, head.bias, labels.contiguous(), row_weight, head.ignore_index, head.terms, grad, losses, None, statistics)

    def d_hidden(self, head, grad, out):
        torch.mm(grad, head.weight, out=out)

    def add_d_weight(self, total, grad, rows):
        if grad.is_cuda and grad.dtype != total.dtype:
            torch.addmm(total, grad.t(), rows, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, grad.t().to(total.dtype), rows.to(total.dtype), out=total)


GPU = Gpu()


def tiles(rows, width, classes):
    """(splits, tiles of each, constants) of `head_kernel`. 128 rows for 8 warps spill on all targets but sm_90."""
    m, n = min(128 if target().arch == 90 else 64, max(16, next_power_of_2(rows))), min(128, max(16, next_power_of_2(classes)))
    every = cdiv(classes, n)
    # Two programs for each processor; more splits are more to join.
    each = cdiv(every, max(1, cdiv(2 * target().processors, cdiv(rows, m))))
    k = min(64, max(16, next_power_of_2(width)))
    return cdiv(every, each), each, {"M": m, "N": n, "K": k, "num_warps": 8 if m * n >= 64 * 128 else 4, "num_stages": 3}


def _head(head, rows, labels, results):
    (number, width), classes, terms = rows.shape, head.weight.shape[0], head.terms
    splits, each, meta = tiles(number, width, classes)
    maximum, others, own = (rows.new_empty(splits, number, dtype=torch.float32) for _ in range(3))
    want = results.correct is not None
    first = rows.new_empty(splits, number, dtype=torch.int32) if want else maximum
    _, softcap, scale, z_loss = numbers(terms)
    launch(
        head_kernel,
        (cdiv(number, meta["M"]), splits),
        rows,
        rows.stride(0),
        head.weight,
        head.weight.stride(0),
        head.weight.stride(1),
        maximum if head.bias is None else head.bias,
        labels,
        maximum,
        others,
        own,
        first,
        number,
        classes,
        width,
        each,
        scale,
        softcap,
        SCALED=scale != 1.0,
        CAPPED=bool(softcap),
        BIASED=head.bias is not None,
        CORRECT=want,
        **meta,
    )
    launch(
        join_kernel,
        (cdiv(number, 128),),
        maximum,
        others,
        own,
        first,
        labels,
        results.losses,
        results.losses if results.log_prob is None else results.log_prob,
        results.correct.view(torch.int8) if want else results.losses,
        number,
        splits,
        classes,
        head.ignore_index,
        z_loss,
        LOG_PROB=results.log_prob is not None,
        CORRECT=want,
        HAS_Z=bool(z_loss),
        ROWS=128,
        num_warps=4,
    )


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
    """See `body.forward`, `rows` above all. fp64 goes to the ATen body."""
    options = (ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss, chunk, rows)
    if hidden.dtype == torch.float64:
        return body.forward(hidden, weight, bias, target, *options, grad_mask, statistics)
    head = Head(weight, _lined_up(bias), ignore_index, Terms(label_smoothing, softcap, logit_scale, z_loss), chunk, rows)
    return body.on_device(GPU, hidden, head, target, reduction, grad_mask, statistics)


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
    """See `body.backward`. fp64 goes to the ATen body."""
    saved = [d_hidden, d_weight, d_bias]
    options = (ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss, chunk, rows)
    if grad_loss.dtype == torch.float64:
        return body.backward(grad_loss, count, *saved, hidden, weight, bias, target, *options, output_mask)
    head = Head(weight, _lined_up(bias), ignore_index, Terms(label_smoothing, softcap, logit_scale, z_loss), chunk, rows)
    return body.back_on_device(GPU, grad_loss, count, saved, hidden, head, target, reduction, output_mask)


def _lined_up(bias):
    return None if bias is None else bias.contiguous()
