"""Products with a stored weight on a GPU: dequantized in the prologue of the product for few rows of x, into scratch for many.

The scratch way reads the codes (q bytes a weight), writes and reads the dense weight (2 s bytes, s of x's dtype), and leaves the
product to cuBLAS. The prologue reads the codes alone, but decodes a weight again for each tile of rows, by about `DECODE`
instructions. See `prologue_rows` for where the one ends and the other begins.

x W^T is computed as (W x^T)^T: the long side of the tile is then the one of W, where a tensor core wants 64 rows (x may have 16).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxopt.kernels import linear
from fxopt.kernels.blocks import as_rows
from fxopt.kernels.dequantize.triton import dense
from fxopt.kernels.formats import PLAIN, named
from fxopt.kernels.formats.nf4 import BLOCK
from fxopt.kernels.formats.triton import e4m3, nf4_levels, nf4_scales
from fxopt.kernels.launch import Target, cdiv, launch, next_power_of_2, target
from fxopt.kernels.quantized_linear import body

# Formats with a kernel of their own here; the blocks of GGUF files are dequantized into scratch.
PROLOGUE = ("nf4", "nf4_nested", "int8", "fp8")
# Instructions for a weight: load of its level, scaling, rounding, moves to the layout of the product (an estimate, not a count).
DECODE = 12
# Instructions that a device executes while it moves one byte: lanes * clock / bandwidth, by their published figures (A100 SXM,
# H100 SXM, B200, MI300X: 108 * 64 * 1.41 GHz / 2.0 TB/s, 132 * 128 * 1.76 / 3.35, 148 * 128 * 1.9 / 8.0, 304 * 64 * 2.1 / 5.3).
INSTRUCTIONS_A_BYTE = {80: 4.9, 90: 8.9, 100: 4.5, "gfx942": 7.7}


@triton.jit
def weight_tile(codes, absmax, levels, nested, table, offset, row, rows, first, columns, FORMAT: tl.constexpr, COLUMNS: tl.constexpr):
    """W[row, first : first + COLUMNS] as fp32; of int8 and fp8 without the scale of the row. Outside: anything finite.

    Rows of nf4 are whole blocks of 64, and first is a multiple of 64.
    """
    inside = row[:, None] < rows
    if FORMAT == "nf4" or FORMAT == "nf4_nested":
        RUNS: tl.constexpr = COLUMNS // 64
        byte = first // 2 + tl.arange(0, COLUMNS // 2)[None, :]
        run = first // 64 + tl.arange(0, RUNS)[None, :]
        code = tl.load(codes + row[:, None] * (columns // 2) + byte, mask=inside & (byte < columns // 2), other=0)
        block = row[:, None] * (columns // 64) + run
        scale = nf4_scales(block, inside & (run < columns // 64), absmax, nested, table, offset, FORMAT == "nf4_nested")
        values = tl.reshape(nf4_levels(code, levels), (row.shape[0], RUNS, 64)) * scale[:, :, None]
        return tl.reshape(values, (row.shape[0], COLUMNS))
    else:
        column = first + tl.arange(0, COLUMNS)[None, :]
        code = tl.load(codes + row[:, None] * columns + column, mask=inside & (column < columns), other=0)
        return e4m3(code) if FORMAT == "fp8" else code.to(tl.float32)


@triton.jit
def row_scales(absmax, row, rows, FORMAT: tl.constexpr):
    scale = tl.load(absmax + row, mask=row < rows, other=0.0)
    return scale if FORMAT == "fp8" else scale * (1.0 / 127.0)


@triton.jit
def product_kernel(x, codes, absmax, levels, nested, table, offset, low, factor, bias, out, count, outputs, depth, rank, chunk,
                   x_row, x_column, low_row, low_column, factor_row, factor_column, scale,
                   FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """out[split] = x W^T (x W if TRANSPOSED), over the split's part of the depth; the first split adds low, factor and bias."""
    PER_ROW: tl.constexpr = FORMAT == "int8" or FORMAT == "fp8"
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    begin = tl.program_id(2) * chunk
    end = tl.minimum(begin + chunk, depth)
    if TRANSPOSED:
        acc = tl.zeros((BM, BN), tl.float32)
    else:
        acc = tl.zeros((BN, BM), tl.float32)
    for start in range(begin, end, BK):
        k = start + tl.arange(0, BK).to(tl.int64)
        if TRANSPOSED:
            part = tl.load(x + m[:, None] * x_row + k[None, :] * x_column, mask=(m[:, None] < count) & (k[None, :] < depth), other=0.0)
            weight = weight_tile(codes, absmax, levels, nested, table, offset, k, depth, tl.program_id(0) * BN, outputs, FORMAT, BN)
            if PER_ROW:
                weight = weight * row_scales(absmax, k, depth, FORMAT)[:, None]
            acc = tl.dot(part, weight.to(part.dtype), acc, input_precision="ieee")
        else:
            part = tl.load(x + m[None, :] * x_row + k[:, None] * x_column, mask=(m[None, :] < count) & (k[:, None] < depth), other=0.0)
            weight = weight_tile(codes, absmax, levels, nested, table, offset, n, outputs, start, depth, FORMAT, BK)
            acc = tl.dot(weight.to(part.dtype), part, acc, input_precision="ieee")
    if not TRANSPOSED:
        if PER_ROW:
            acc = acc * row_scales(absmax, n, outputs, FORMAT)[:, None]
        acc = tl.trans(acc)
    if tl.program_id(2) == 0:
        if low is not None:
            tail = tl.zeros((BM, BN), tl.float32)
            for start in range(0, rank, BR):
                r = start + tl.arange(0, BR)
                part = tl.load(low + m[:, None] * low_row + r[None, :] * low_column, mask=(m[:, None] < count) & (r[None, :] < rank), other=0.0)
                other = tl.load(factor + n[None, :] * factor_row + r[:, None] * factor_column, mask=(n[None, :] < outputs) & (r[:, None] < rank), other=0.0)
                tail = tl.dot(part, other, tail, input_precision="ieee")
            acc += tail * scale
        if bias is not None:
            acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    place = out + (tl.program_id(2).to(tl.int64) * count + m[:, None]) * outputs + n[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(m[:, None] < count) & (n[None, :] < outputs))


def prologue_rows(format: str, shape, dtype: torch.dtype, device: Target) -> int:
    """Up to how many rows of x the weight is dequantized in the prologue of the product; 0: never.

    Scratch moves q + 2 s bytes a weight; the prologue, per tile of rows, q bytes or DECODE instructions, whichever takes longer.
    So it may decode (q + 2 s) / max(q, DECODE / INSTRUCTIONS_A_BYTE) times: for nf4 in 16 bits on an H100 3 times (192 rows),
    on an A100 once (64); in fp32 once. (Reasoned, not measured: no GPU was at hand.)

    Where rows of an nf4 weight are not whole blocks of 64, a tile of it has no constant stride of scales, and goes through
    scratch. So do the blocks of GGUF files.
    """
    if format not in PROLOGUE or (format.startswith("nf4") and shape[-1] % BLOCK):
        return 0
    rows = _most_rows(dtype, dtype, device)
    if dtype == torch.float32:
        return rows
    stored = named(format).bits(shape) / 8
    instructions = INSTRUCTIONS_A_BYTE.get(device.arch, min(INSTRUCTIONS_A_BYTE.values()))
    return rows * int((stored + 2 * dtype.itemsize) / max(stored, DECODE / instructions))


def matmul(x, base, format, shape, transposed, low=None, factor=None, scale=1.0, bias=None):
    """x W^T (x W if transposed) + scale low factor^T + bias, of a stored weight W.

    Forward of y = x W^T takes transposed=False, its backward dx = dy W takes transposed=True, and so on. The low-rank part is
    that of an adapter: low [t, r] and factor [outputs, r], of one dtype and any strides. `base` must be checked.

    Args:
        x: [t, depth], fp16, bf16 or fp32; any strides. shape: of W, [outputs, depth] ([depth, outputs] if transposed).
        bias: [outputs] or None.

    Returns:
        [t, outputs] in x's dtype, contiguous; summed in fp32.
    """
    if not x.shape[0]:
        return x.new_empty((0, shape[1] if transposed else shape[0]))
    if x.shape[0] <= prologue_rows(format, shape, x.dtype, target()):
        return _in_prologue(x, base, format, shape, transposed, low, factor, scale, bias)
    weight = dense(base, format, shape, x.dtype)
    side = weight if transposed else weight.t()
    y = x.mm(side) if bias is None else torch.addmm(bias, x, side)
    if low is None:
        return y
    if low.dtype == y.dtype:
        return y.addmm_(low, factor.t(), alpha=scale)
    return y.add_(low.mm(factor.t()), alpha=scale)


def _tile(count: int, dtype: torch.dtype, low: torch.dtype, transposed: bool, device: Target) -> dict[str, int]:
    """The tile: no spills on any target (`make kernels`). A side of W's tile is 64 weights, a block of nf4.

    Products of fp32 hold the whole depth of a tile in registers: 16 where that is free to choose, and no loads ahead (with them
    ptxas moves so many loads forward that it spills). Left alone, ptxas also spills a few values to get down to 80 or 96 registers.
    """
    wide = dtype == torch.float32
    rows = min(_most_rows(dtype, low, device), max(16, next_power_of_2(count)))
    tile = {
        "BM": rows,
        "BN": 32 if wide and not transposed else 64,
        "BK": 16 if wide and transposed else 64,
        "BR": 16 if low == torch.float32 else 32,
        "num_warps": 4,
        "num_stages": 1 if wide else 2 if device.backend == "hip" else 4,
    }
    return tile | ({"maxnreg": 168 if wide or rows == 16 else 240} if device.backend == "cuda" else {})


def _most_rows(dtype: torch.dtype, low: torch.dtype, device: Target) -> int:
    """Rows of a tile at most.

    In fp32 there is no tensor core: products are instructions too, and cuBLAS wastes fewer. (And Triton 3.7 for sm_100 rounds
    an fp32 product of 64 rows to tf32 (seen in its PTX), whatever `input_precision` says: every side in fp32 stays below.) For a
    gfx942, tiles of 32 and 64 rows spill in bf16.
    """
    if device.backend == "hip":
        return 16
    return 32 if torch.float32 in (dtype, low) else 64


def _in_prologue(x, base, format, shape, transposed, low, factor, scale, bias):
    (count, depth), outputs = x.shape, shape[1] if transposed else shape[0]
    codes, absmax, levels, nested, table, offset = (*(part.contiguous() for part in base), *[None] * 4)[:6]
    device = target()
    tile = _tile(count, x.dtype, x.dtype if low is None else low.dtype, transposed, device)
    bm, bn, bk = tile["BM"], tile["BN"], tile["BK"]
    # Enough programs for the device, by cutting the depth; each part at least 256 deep, for loads under way.
    programs = cdiv(outputs, bn) * cdiv(count, bm)
    splits = max(1, min(cdiv(depth, 256), cdiv(2 * device.processors, max(1, programs))))
    chunk = cdiv(cdiv(depth, bk), splits) * bk
    splits = max(1, cdiv(depth, max(1, chunk)))
    out = x.new_empty((splits, count, outputs), dtype=x.dtype if splits == 1 else torch.float32)
    strides = (0, 0, 0, 0) if low is None else (*low.stride(), *factor.stride())
    rank = 0 if low is None else low.shape[1]
    launch(product_kernel, (cdiv(outputs, bn), cdiv(count, bm), splits), x, codes, absmax, levels, nested, table, offset, low, factor, bias, out,
           count, outputs, depth, rank, chunk, *x.stride(), *strides, scale, FORMAT=format, TRANSPOSED=transposed, **tile)  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


def forward(x, base, format, shape, bias, transposed):
    """`body.forward`; in fp64 that itself."""
    if x.dtype == torch.float64:
        return body.forward(x, base, format, shape, bias, transposed)
    body.check(x, base, format, shape, transposed)
    if format in PLAIN:
        return linear.apply(x, dense(base, format, shape, x.dtype), bias, transposed)
    y = matmul(as_rows(x), base, format, shape, transposed, bias=bias)
    return y.view(*x.shape[:-1], y.shape[1])


def backward(dy, base, format, shape, bias, transposed, output_mask):
    """`body.backward`; in fp64 that itself."""
    if dy.dtype == torch.float64:
        return body.backward(dy, base, format, shape, bias, transposed, output_mask)
    grads, dx = as_rows(dy), None
    if output_mask[0]:
        dx = matmul(grads, base, format, shape, not transposed)
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    return dx, linear.bias_gradient(grads, bias.dtype) if output_mask[1] else None
