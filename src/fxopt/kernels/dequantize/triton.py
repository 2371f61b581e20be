"""Dequantization on a GPU: one read of the codes, one write of the weight; bit-equal to the ATen bodies.

A program writes a tile of 4,096 weights: 32 a thread, so that codes are read and weights written 16 bytes at a time. The scales
of a tile are one column of it, read once a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxopt.kernels.blocks import as_rows
from fxopt.kernels.dequantize import body
from fxopt.kernels.formats import PLAIN, named
from fxopt.kernels.formats.gguf import LAYOUTS
from fxopt.kernels.formats.nf4 import BLOCK
from fxopt.kernels.formats.triton import e4m3, half_at, nf4_levels, nf4_scales
from fxopt.kernels.launch import cdiv, launch, next_power_of_2

TILE = 4096
_LAYOUTS = {layout.name: layout for layout in LAYOUTS}


@triton.jit
def nf4_kernel(codes, absmax, levels, nested, table, offset, out, count, NESTED: tl.constexpr, ROWS: tl.constexpr):
    """Rows are blocks of 64 of the flattened weight."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    byte = block * 32 + tl.arange(0, 32)[None, :]
    place = block * 64 + tl.arange(0, 64)[None, :]
    scale = nf4_scales(block, block * 64 < count, absmax, nested, table, offset, NESTED)
    values = nf4_levels(tl.load(codes + byte, mask=byte * 2 < count, other=0), levels) * scale
    tl.store(out + place, values.to(out.dtype.element_ty), mask=place < count)


@triton.jit
def per_row_kernel(codes, scales, out, rows, columns, FP8: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    scale = tl.load(scales + row, mask=row < rows, other=0.0)
    code = tl.load(codes + row * columns + column, mask=mask, other=0)
    if FP8:
        values = e4m3(code) * scale
    else:
        values = code.to(tl.float32) * (scale * (1.0 / 127.0))
    tl.store(out + row * columns + column, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def blocks_kernel(blocks, out, count, KIND: tl.constexpr, BYTES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Rows are runs of SIZE weights that share a scale, GROUPS of them in a block of BYTES bytes (see formats/gguf.py)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inside = row < count
    start, group = (row // GROUPS) * BYTES, (row % GROUPS).to(tl.int32)
    if KIND == "q8_0":
        code = tl.load(blocks + start + 2 + column, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        values = code * half_at(blocks, start, inside)
    elif KIND == "q6_k":
        half, quarter = group // 8, (group % 8) // 2
        lane = (group % 2) * 16 + column
        low = tl.load(blocks + start + half * 64 + (quarter & 1) * 32 + lane, mask=inside, other=0).to(tl.int32)
        high = tl.load(blocks + start + 128 + half * 32 + lane, mask=inside, other=0).to(tl.int32)
        code = ((low >> ((quarter >> 1) * 4)) & 15) | (((high >> (quarter * 2)) & 3) << 4)
        scale = tl.load(blocks + start + 192 + group, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        values = (code - 32).to(tl.float32) * (scale * half_at(blocks, start + 208, inside))
    elif KIND == "q4_k":
        packed = tl.load(blocks + start + 16 + (group // 2) * 32 + column, mask=inside, other=0).to(tl.int32)
        code = (packed >> ((group % 2) * 4)) & 15
        first = tl.load(blocks + start + 4 + group % 4, mask=inside, other=0).to(tl.int32)
        second = tl.load(blocks + start + 8 + group % 4, mask=inside, other=0).to(tl.int32)
        third = tl.load(blocks + start + 12 + group % 4, mask=inside, other=0).to(tl.int32)
        scale = tl.where(group < 4, first & 63, (third & 15) | ((first >> 6) << 4)).to(tl.float32) * half_at(blocks, start, inside)
        least = tl.where(group < 4, second & 63, (third >> 4) | ((second >> 6) << 4)).to(tl.float32) * half_at(blocks, start + 2, inside)
        values = code.to(tl.float32) * scale - least
    else:
        packed = tl.load(blocks + start + (BYTES - 16) + column % 16, mask=inside, other=0).to(tl.int32)
        code = (packed >> ((column // 16) * 4)) & 15
        if KIND == "q4_1":
            values = code.to(tl.float32) * half_at(blocks, start, inside) + half_at(blocks, start + 2, inside)
        else:
            values = (code - 8).to(tl.float32) * half_at(blocks, start, inside)
    tl.store(out + row * SIZE + column, values.to(out.dtype.element_ty), mask=inside)


# Weights that share a scale.
_RUNS = {"q6_k": 16}


def dense(base, format, shape, dtype):
    """The weight of these parts in fp16, bf16 or fp32; `base` must be checked. "dense": the weight itself, or a cast of it."""
    if format in PLAIN:
        return base[0].to(dtype)
    base = [part.contiguous() for part in base]
    out = base[0].new_empty(shape, dtype=dtype)
    if format in ("nf4", "nf4_nested"):
        codes, absmax, levels, nested, table, offset = (*base, None, None, None)[:6]
        rows = TILE // BLOCK
        launch(nf4_kernel, (cdiv(out.numel(), TILE),), codes, absmax, levels, nested, table, offset, out, out.numel(),
               NESTED=format == "nf4_nested", ROWS=rows, num_warps=4, enable_fp_fusion=False)  # fmt: skip
    elif format in ("int8", "fp8"):
        rows, columns = as_rows(out).shape
        wide = min(1024, max(16, next_power_of_2(columns)))
        launch(per_row_kernel, (cdiv(rows, TILE // wide), cdiv(columns, wide)), *base, out, rows, columns,
               FP8=format == "fp8", ROWS=TILE // wide, COLUMNS=wide, num_warps=4)  # fmt: skip
    else:
        layout, run = _LAYOUTS[format], _RUNS.get(format, 32)
        runs = out.numel() // run
        launch(blocks_kernel, (cdiv(runs, TILE // run),), *base, out, runs, KIND=format, BYTES=layout.bytes, GROUPS=layout.weights // run,
               SIZE=run, ROWS=TILE // run, num_warps=4)  # fmt: skip
    return out


def forward(base, format, shape, dtype):
    """`body.forward`; in fp64 that itself."""
    if dtype == torch.float64:
        return body.forward(base, format, shape, dtype)
    named(format).check(base, shape)
    weight = dense(base, format, shape, dtype)
    return weight.clone(memory_format=torch.contiguous_format) if weight is base[0] else weight.contiguous()
