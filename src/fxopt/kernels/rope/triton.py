"""Rotary position embedding on a GPU: queries and keys in one launch, each element read once and written once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fxopt.kernels.launch import cdiv, launch, next_power_of_2, target
from fxopt.kernels.rope import body

# Pairs in a tile: 8 for each thread of 4 warps, loads of 16 bytes. With 2,048, rows that are not aligned (92 columns, partial
# rotation) spill on all four targets; with 1,024 on gfx942 too, where masks are scalar registers. Half of it in fp64.
PAIRS = {"cuda": 1024, "hip": 512}
WARPS = 4
# Columns that are copied at a time, past the rotated ones.
COPY = 16
# Axes of a tensor but the last, after those that lie together are merged.
AXES = 3


@triton.jit
def _rows(x_ptr, out_ptr, cos_ptr, sin_ptr, block, rows, middle, inner, rotary, width,
          x0, x1, x2, x_column, out0, out1, out2, out_column, table0, table1, table2, table_column,
          ROWS: tl.constexpr, HALF: tl.constexpr, COPY: tl.constexpr, INTERLEAVED: tl.constexpr,
          HALF_TABLES: tl.constexpr, TRANSPOSE: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr):
    """Turn one block of rows of [outer, middle, inner, width]."""
    row = block.to(INDEX) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    rest = row // inner
    at2, at1, at0 = (row % inner).to(tl.int64), (rest % middle).to(tl.int64), (rest // middle).to(tl.int64)
    x_row = (x_ptr + at0 * x0 + at1 * x1 + at2 * x2)[:, None]
    out_row = (out_ptr + at0 * out0 + at1 * out1 + at2 * out2)[:, None]
    table_row = at0 * table0 + at1 * table1 + at2 * table2
    cos_row, sin_row = (cos_ptr + table_row)[:, None], (sin_ptr + table_row)[:, None]

    pair = tl.arange(0, HALF).to(tl.int64)[None, :]
    half = rotary // 2
    mask = here[:, None] & (pair < half)
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF).to(tl.int64)[None, :]
        both_mask = here[:, None] & (both < rotary)
        x = tl.load(x_row + both * x_column, both_mask, 0.0).to(ACC)
        first, second = tl.split(tl.reshape(x, (ROWS, HALF, 2)))
    else:
        first = tl.load(x_row + pair * x_column, mask, 0.0).to(ACC)
        second = tl.load(x_row + (pair + half) * x_column, mask, 0.0).to(ACC)
    cos1 = tl.load(cos_row + pair * table_column, mask, 0.0).to(ACC)
    sin1 = tl.load(sin_row + pair * table_column, mask, 0.0).to(ACC)
    cos2, sin2 = cos1, sin1
    if not HALF_TABLES:
        if INTERLEAVED:
            cos = tl.load(cos_row + both * table_column, both_mask, 0.0).to(ACC)
            sin = tl.load(sin_row + both * table_column, both_mask, 0.0).to(ACC)
            cos1, cos2 = tl.split(tl.reshape(cos, (ROWS, HALF, 2)))
            sin1, sin2 = tl.split(tl.reshape(sin, (ROWS, HALF, 2)))
        else:
            cos2 = tl.load(cos_row + (pair + half) * table_column, mask, 0.0).to(ACC)
            sin2 = tl.load(sin_row + (pair + half) * table_column, mask, 0.0).to(ACC)
    if TRANSPOSE:
        turned1, turned2 = first * cos1 + second * sin2, second * cos2 - first * sin1
    else:
        turned1, turned2 = first * cos1 - second * sin1, second * cos2 + first * sin2
    dtype = out_ptr.dtype.element_ty
    if INTERLEAVED:
        turned = tl.reshape(tl.join(turned1, turned2), (ROWS, 2 * HALF))
        tl.store(out_row + both * out_column, turned.to(dtype), both_mask)
    else:
        tl.store(out_row + pair * out_column, turned1.to(dtype), mask)
        tl.store(out_row + (pair + half) * out_column, turned2.to(dtype), mask)

    for start in range(rotary, width, COPY):
        column = (start + tl.arange(0, COPY)).to(tl.int64)[None, :]
        copied = here[:, None] & (column < width)
        tl.store(out_row + column * out_column, tl.load(x_row + column * x_column, copied, 0.0), copied)


# Sizes that follow the batch are not specialized: another length must not compile another kernel.
@triton.jit(do_not_specialize=["q_rows", "q_middle", "q_inner", "k_rows", "k_middle", "k_inner", "q_blocks"])
def rope_kernel(q, q_out, q_cos, q_sin, q_rows, q_middle, q_inner,
                q0, q1, q2, q3, qo0, qo1, qo2, qo3, qt0, qt1, qt2, qt3,
                k, k_out, k_cos, k_sin, k_rows, k_middle, k_inner,
                k0, k1, k2, k3, ko0, ko1, ko2, ko3, kt0, kt1, kt2, kt3,
                rotary, q_width, k_width, q_blocks,
                ROWS: tl.constexpr, HALF: tl.constexpr, COPY: tl.constexpr, INTERLEAVED: tl.constexpr,
                HALF_TABLES: tl.constexpr, TRANSPOSE: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr):
    """The first `q_blocks` programs turn blocks of q's rows, the others k's."""
    block = tl.program_id(0)
    if block < q_blocks:
        _rows(q, q_out, q_cos, q_sin, block, q_rows, q_middle, q_inner, rotary, q_width,
              q0, q1, q2, q3, qo0, qo1, qo2, qo3, qt0, qt1, qt2, qt3,
              ROWS, HALF, COPY, INTERLEAVED, HALF_TABLES, TRANSPOSE, ACC, INDEX)
    else:
        _rows(k, k_out, k_cos, k_sin, block - q_blocks, k_rows, k_middle, k_inner, rotary, k_width,
              k0, k1, k2, k3, ko0, ko1, ko2, ko3, kt0, kt1, kt2, kt3,
              ROWS, HALF, COPY, INTERLEAVED, HALF_TABLES, TRANSPOSE, ACC, INDEX)


def _axes(x, out, cos):
    """[(size, x stride, out stride, table stride)] of the leading axes, merged where they lie together. Those that
    share a row of the tables come last: neighbouring rows then read the same one."""
    table = cos.expand(*x.shape[:-1], cos.shape[-1])
    axes = list(zip(x.shape, x.stride(), out.stride(), table.stride(), strict=True))[:-1]
    merged: list[tuple[int, ...]] = []
    for axis in sorted((axis for axis in axes if axis[0] != 1), key=lambda axis: axis[3] == 0):
        if merged and all(outer == axis[0] * inner for outer, inner in zip(merged[-1][1:], axis[1:], strict=True)):
            axis = (merged.pop()[0] * axis[0], *axis[1:])
        merged.append(axis)
    return [(1, 0, 0, 0)] * (AXES - len(merged)) + merged


def _arguments(x, out, cos, sin, axes):
    """What the kernel takes for one tensor."""
    sizes, *strides = zip(*axes, strict=True)
    last = (x.stride(-1), out.stride(-1), cos.stride(-1))
    flat = [stride for group, column in zip(strides, last, strict=True) for stride in (*group, column)]
    return [x, out, cos, sin, math.prod(sizes), sizes[1], sizes[2], *flat]


def _turn(q, k, cos, sin, interleaved, half_tables, transpose):
    """Outputs for q and k, each None where it is None."""
    given = [x for x in (q, k) if x is not None]
    rotary = [body.check(x, cos, sin, half_tables) for x in given][0]
    outs = [torch.empty_like(x) for x in given]
    results = (None if q is None else outs[0], None if k is None else outs[-1])
    acc = [torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32) for x in given]
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    axes = [_axes(x, out, cos) for x, out in zip(given, outs, strict=True)]
    if max(map(len, axes)) > AXES:  # More than four dimensions, spread out: laid out anew.
        for x, out in zip(given, outs, strict=True):
            tables = [table.expand(*x.shape[:-1], -1).flatten(0, -2) for table in (cos, sin)]
            turned, _ = _turn(x.flatten(0, -2), None, *tables, interleaved, half_tables, transpose)
            out.copy_(turned.view(x.shape))
        return results
    if acc[0] != acc[-1]:
        return (
            _turn(q, None, cos, sin, interleaved, half_tables, transpose)[0],
            _turn(None, k, cos, sin, interleaved, half_tables, transpose)[1],
        )
    half = next_power_of_2(max(1, rotary // 2))
    pairs = PAIRS[target().backend] // (2 if acc[0] == torch.float64 else 1)
    tile = max(1, pairs // half)
    parts = [_arguments(x, out, cos, sin, lead) for x, out, lead in zip(given, outs, axes, strict=True)]
    rows = [part[4] for part in parts]
    blocks = [cdiv(count, tile) for count in rows]
    launch(
        rope_kernel,
        (sum(blocks),),
        *parts[0],
        *parts[-1],
        rotary,
        given[0].shape[-1],
        given[-1].shape[-1],
        blocks[0],
        ROWS=tile,
        HALF=half,
        COPY=COPY,
        INTERLEAVED=interleaved,
        HALF_TABLES=half_tables,
        TRANSPOSE=transpose,
        ACC=tl.float64 if acc[0] == torch.float64 else tl.float32,
        INDEX=tl.int32 if max(rows) + tile < 2**31 else tl.int64,
        num_warps=WARPS,
    )
    return results


def forward(q, k, cos, sin, interleaved, half_tables):
    """See `body.forward`. fp64 is computed in fp64, everything else in fp32."""
    q_out, k_out = _turn(q, k, cos, sin, interleaved, half_tables, False)
    return q_out, (q.new_empty(0) if k is None else k_out)


def backward(dq, dk, cos, sin, interleaved, half_tables):
    """See `body.backward`: the transpose of the rotation."""
    return _turn(dq, dk, cos, sin, interleaved, half_tables, True)
