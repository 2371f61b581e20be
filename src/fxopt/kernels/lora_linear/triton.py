"""Linear layers with low-rank adapters on a GPU: dense products by cuBLAS, low-rank ones by three kernels. For few rows a
quantized base is dequantized inside its product, which adds the low-rank part too (`quantized_linear.matmul`).

Each is one pass over its large operand, with an optional dropout mask:

    shrink   low = (x mask) A^T     reads x [rows, width]
    grow     y  += low B^T mask     reads and writes y [rows, width]
    reduce   dA  = u^T (x mask)     reads x [rows, width]

They are bound by memory: at rank 16 a 16-bit x gives 16 multiplications a byte, a GPU has over 200. So dtypes are mixed in
registers (a 16-bit x with fp32 factors needs no fp32 copy of x), and fp32 products are exact ("ieee"), not tf32. `reduce` adds
up in fp32 over parts of the rows, one program each, and then over the parts: the order is fixed, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxopt.kernels import linear
from fxopt.kernels.blocks import as_rows, rows_of

from fxopt.kernels.launch import cdiv, launch, next_power_of_2, target
from fxopt.kernels.lora_linear import body
from fxopt.kernels.lora_linear.grouping import siblings
from fxopt.kernels.quantized_linear.triton import matmul, prologue_rows


@triton.jit
def mixed(h):
    """`dropout._mix` on uint32."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def keeps(seed, row, column, threshold, gain):
    """`dropout.mask` at rows [m, 1] and columns [1, n]."""
    value = tl.load(seed)
    low, high = (value & 0xFFFFFFFF).to(tl.uint32), ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key = mixed(mixed(row.to(tl.uint32) + mixed(high)) ^ mixed(low))
    drawn = mixed(key + column.to(tl.uint32) * 0x9E3779B9) & 0x7FFFFFFF
    return tl.where(drawn >= threshold.to(tl.uint32), gain, 0.0)


@triton.jit
def shrink_kernel(x, a, low, seed, rows, width, rank, x_row, x_column, a_row, a_column, low_row, scale, threshold, gain,
                  DROPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    r = tl.program_id(1) * BR + tl.arange(0, BR)[None, :]
    acc = tl.zeros((BM, BR), tl.float32)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        part = tl.load(x + row * x_row + k[None, :].to(tl.int64) * x_column, mask=(row < rows) & (k[None, :] < width), other=0.0)
        factor = tl.load(a + r.to(tl.int64) * a_row + k[:, None].to(tl.int64) * a_column, mask=(r < rank) & (k[:, None] < width), other=0.0)
        part = part.to(factor.dtype)
        if DROPS:
            part = (part * keeps(seed, row, k[None, :], threshold, gain)).to(factor.dtype)
        acc = tl.dot(part, factor, acc, input_precision="ieee")
    tl.store(low + row * low_row + r, (acc * scale).to(low.dtype.element_ty), mask=(row < rows) & (r < rank))


@triton.jit
def grow_kernel(y, low, b, seed, rows, width, rank, low_row, low_column, b_row, b_column, scale, threshold, gain,
                DROPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, rank, BR):
        r = start + tl.arange(0, BR)
        part = tl.load(low + row * low_row + r[None, :] * low_column, mask=(row < rows) & (r[None, :] < rank), other=0.0)
        factor = tl.load(b + n * b_row + r[:, None] * b_column, mask=(n < width) & (r[:, None] < rank), other=0.0)
        acc = tl.dot(part, factor, acc, input_precision="ieee")
    if DROPS:
        acc = acc * keeps(seed, row, n, threshold, gain)
    place, inside = y + row * width + n, (row < rows) & (n < width)
    tl.store(place, (tl.load(place, mask=inside, other=0.0).to(tl.float32) + acc * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(u, x, out, seed, rows, width, rank, chunk, u_row, u_column, x_row, x_column, out_part, out_rank, out_column, scale, threshold,
                  gain, DROPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    first = tl.program_id(1).to(tl.int64) * chunk
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    acc = tl.zeros((BR, BN), tl.float32)
    for start in range(0, chunk, BM):
        row = first + start + tl.arange(0, BM)
        part = tl.load(u + row[None, :] * u_row + r[:, None] * u_column, mask=(row[None, :] < rows) & (r[:, None] < rank), other=0.0)
        value = tl.load(x + row[:, None] * x_row + n * x_column, mask=(row[:, None] < rows) & (n < width), other=0.0).to(part.dtype)
        if DROPS:
            value = (value * keeps(seed, row[:, None], n, threshold, gain)).to(part.dtype)
        acc = tl.dot(part, value, acc, input_precision="ieee")
    place = out + tl.program_id(1).to(tl.int64) * out_part + r[:, None].to(tl.int64) * out_rank + n * out_column
    tl.store(place, (acc * scale).to(out.dtype.element_ty), mask=(r[:, None] < rank) & (n < width))


def _drops(seed, p):
    """The kernels' arguments for a mask: threshold and gain as `dropout.mask` has them."""
    return (int(p * (1 << 31)), 1.0 / (1.0 - p)) if seed is not None else (0, 1.0)


def _rank(rank):
    """Ranks of a tile: `tl.dot` needs 16; more than 64 take several."""
    return min(64, max(16, next_power_of_2(rank)))


def _side(factor):
    """Edge of a tile of the large operand. fp32 products have no tensor cores: their operands pass through registers."""
    return 64 if factor.element_size() == 2 else 32


def _rows(rows, most):
    return min(most, 16 if rows <= 16 else 32 if rows <= 32 else 64)


def _options():
    """Four warps; up to 168 registers a thread: left alone, ptxas spills a few to get below 128, for occupancy that loops
    over memory with three loads under way do not need."""
    return {"num_warps": 4, "num_stages": 2, **({"maxnreg": 168} if target().backend == "cuda" else {})}


def shrink(rows, a, low, scale=1.0, seed=None, p=0.0):
    """low = scale (rows mask) a^T. rows: [t, k]; a: [r, k], any strides; low: [t, r] to write, columns dense."""
    (count, width), rank = rows.shape, a.shape[0]
    side = _side(a)
    bm, br = _rows(count, side), _rank(rank)
    launch(shrink_kernel, (cdiv(count, bm), cdiv(rank, br)), rows, a, low, seed, count, width, rank, *rows.stride(), *a.stride(), low.stride(0),
           scale, *_drops(seed, p), DROPS=seed is not None, BM=bm, BK=side, BR=br, **_options())  # fmt: skip


def grow(y, low, b, scale=1.0, seed=None, p=0.0):
    """y += scale (low b^T) mask, in place. y: [t, n], contiguous, the caller's own; low: [t, r]; b: [n, r], any strides."""
    (count, width), rank = y.shape, b.shape[1]
    side = _side(b)
    bm, br = _rows(count, side), min(32, _rank(rank))
    launch(grow_kernel, (cdiv(count, bm), cdiv(width, side)), y, low, b, seed, count, width, rank, *low.stride(), *b.stride(), scale,
           *_drops(seed, p), DROPS=seed is not None, BM=bm, BN=side, BR=br, **_options())  # fmt: skip


def reduce(u, x, like, transposed=False, scale=1.0, seed=None, p=0.0):
    """scale u^T (x mask), [r, n], or its transpose [n, r]. u: [t, r], x: [t, n], any strides. Returns like's dtype, contiguous."""
    (count, width), rank = x.shape, u.shape[1]
    bn = _side(u)
    bm, br = _rows(count, bn), min(32, _rank(rank))
    parts = max(1, min(cdiv(count, 4 * bm), cdiv(2 * target().processors, cdiv(width, bn) * cdiv(rank, br))))
    chunk = cdiv(cdiv(count, bm), parts) * bm
    out = like.new_empty((parts, width, rank) if transposed else (parts, rank, width), dtype=like.dtype if parts == 1 else torch.float32)
    over_rank, over_width = (out.stride(2), out.stride(1)) if transposed else (out.stride(1), out.stride(2))
    launch(reduce_kernel, (cdiv(width, bn), parts, cdiv(rank, br)), u, x, out, seed, count, width, rank, chunk, *u.stride(), *x.stride(),
           out.stride(0), over_rank, over_width, scale, *_drops(seed, p), DROPS=seed is not None, BM=bm, BN=bn, BR=br, **_options())  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(like.dtype)


def _few(rows, each):
    """Whether so few rows are multiplied that the weight is dequantized inside the product."""
    return each.format != "dense" and rows.shape[0] <= prologue_rows(each.format, each.shape, rows.dtype, target())


def forward(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed, dropout, seeds):
    """`body.forward`; in fp64 that itself."""
    if x.dtype == torch.float64:
        return body.forward(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed, dropout, seeds)
    group = siblings(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed)
    rows = as_rows(x)
    low = lora_a[0].new_empty((rows.shape[0], sum(a.shape[0] for a in lora_a)))
    if dropout:
        for i, each in enumerate(group):
            shrink(rows, each.a, low[:, each.columns], seed=seeds[i], p=dropout)
    else:
        shrink(rows, body.together(lora_a), low)
    ys = []
    for each in group:
        if _few(rows, each):
            y = matmul(rows, each.base, each.format, each.shape, transposed, low[:, each.columns], each.b, each.scale, each.bias)
            ys.append(y.view(*x.shape[:-1], y.shape[1]))
            continue
        y = linear.apply(x, each.dense(x.dtype), each.bias, transposed)
        grow(y.view(rows_of(x), y.shape[-1]), low[:, each.columns], each.b, each.scale)
        ys.append(y)
    return [*ys, low.view(*x.shape[:-1], low.shape[1])]


def backward(dys, x, bases, formats, shapes, biases, lora_a, lora_b, low, scales, transposed, dropout, seeds, output_mask):
    """`body.backward`; in fp64 that itself."""
    some = next(dy for dy in dys if dy is not None)
    if some.dtype == torch.float64:
        return body.backward(dys, x, bases, formats, shapes, biases, lora_a, lora_b, low, scales, transposed, dropout, seeds, output_mask)
    group = siblings(None, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed)
    want = body.Wanted.of(output_mask, len(group), len(biases))
    grads = [None if dy is None else as_rows(dy) for dy in dys]
    rows = None if x is None else as_rows(x)
    lows = low.reshape(rows_of(some), low.shape[-1])
    ups = low.new_empty(lows.shape)
    for grad, each, a in zip(grads, group, want.a, strict=True):
        if grad is not None and (want.x or a):
            shrink(grad, each.b.t(), ups[:, each.columns], each.scale)
    found = []
    if want.x:
        used = [i for i, grad in enumerate(grads) if grad is not None]
        dx = _base_gradient([grads[i] for i in used], [group[i] for i in used], transposed)
        if dropout:
            for i in used:
                grow(dx, ups[:, group[i].columns], group[i].a.t(), seed=seeds[i], p=dropout)
        elif len(used) == len(group):
            grow(dx, ups, body.together(lora_a).t())
        else:
            for i in used:
                grow(dx, ups[:, group[i].columns], group[i].a.t())
        found.append(dx.view(*some.shape[:-1], dx.shape[1]))
    found += body.dense_gradients(grads, rows, group, biases, want, transposed)
    for i, each in enumerate(group):
        if want.a[i]:
            seed = seeds[i] if dropout else None
            found.append(torch.zeros_like(each.a) if grads[i] is None else reduce(ups[:, each.columns], rows, each.a, seed=seed, p=dropout))
    for i, each in enumerate(group):
        if want.b[i]:
            found.append(torch.zeros_like(each.b) if grads[i] is None else reduce(lows[:, each.columns], grads[i], each.b, True, each.scale))
    return found


def _base_gradient(grads, group, transposed):
    """sum of dy_i W_i, [rows, in]: one product over joined operands, or products that accumulate; whichever moves less."""
    if all(_few(grad, each) for grad, each in zip(grads, group, strict=True)):
        parts = [matmul(grad, each.base, each.format, each.shape, not transposed) for grad, each in zip(grads, group, strict=True)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    matrices = [each.dense(grads[0].dtype) for each in group]
    sides = [matrix.t() if transposed else matrix for matrix in matrices]
    if len(sides) > 1 and body.joined(grads[0].shape[0], sides[0].shape[1], sum(side.shape[0] for side in sides), len(sides)):
        return torch.cat(grads, dim=1).mm(torch.cat(sides))
    dx = grads[0].mm(sides[0])
    for grad, side in zip(grads[1:], sides[1:], strict=True):
        dx.addmm_(grad, side)
    return dx
