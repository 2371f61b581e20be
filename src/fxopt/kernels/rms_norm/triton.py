"""RMSNorm on a GPU, with or without a residual add in front.

Forward: one tile of rows per program, x read once. Backward: dx needs dy, x and one number per row. The weight gradient is
a sum over all rows: each program adds up its rows in registers, in fp32, and writes one row of partial sums; their sum is a
second, small step. The order of every sum is fixed by the shapes and the device, so that runs repeat bit for bit.
Rows that do not fit into registers are read twice, the second time from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxopt.kernels.launch import cdiv, launch
from fxopt.kernels.rms_norm import body
from fxopt.kernels.tiles import SUM_ROWS, SUM_WIDTH, programs_over, row_tile, rows_per_sum, strided_rows

# Columns of a row held at once: two tensors in the forward, up to five in the backward.
WIDEST, WIDEST_BACKWARD = 16384, 8192


@triton.jit
def load_sum(X, RESIDUAL, row, col, mask, x_row, x_col, r_row, r_col):
    """A tile of x, or of x + residual rounded to x's dtype, as the plain program rounds it."""
    x = tl.load(X + row[:, None] * x_row + col[None, :] * x_col, mask=mask, other=0.0)
    if RESIDUAL is not None:
        r = tl.load(RESIDUAL + row[:, None] * r_row + col[None, :] * r_col, mask=mask, other=0.0)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _store(x, rstd, W, Y, SUM, row, col, inside, mask, cols, offset, ROUND_TWICE: tl.constexpr):
    """Writes y, and the sum that x is."""
    at = row[:, None] * cols + col[None, :]
    if SUM is not None:
        tl.store(SUM + at, x, mask=mask)
    y = x.to(tl.float32) * rstd[:, None]
    if W is not None:
        w = tl.load(W + col, mask=inside, other=0.0)
        if ROUND_TWICE:
            scale = (w.to(tl.float32) + tl.cast(offset, tl.float32)).to(w.dtype).to(tl.float32)
            y = y.to(x.dtype).to(tl.float32) * scale[None, :]
        else:
            y = y * (w.to(tl.float32) + tl.cast(offset, tl.float32))[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_forward(X, RESIDUAL, W, Y, SUM, RSTD, rows, cols, x_row, x_col, r_row, r_col, eps, offset,
                     ROUND_TWICE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    if WHOLE:
        col = tl.arange(0, WIDTH)
        inside = col < cols
        mask = here[:, None] & inside[None, :]
        x = load_sum(X, RESIDUAL, row, col, mask, x_row, x_col, r_row, r_col)
        wide = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / cols + tl.cast(eps, tl.float32))
        _store(x, rstd, W, Y, SUM, row, col, inside, mask, cols, offset, ROUND_TWICE)
    else:
        squares = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(0, cols, WIDTH):
            col = start + tl.arange(0, WIDTH)
            mask = here[:, None] & (col < cols)[None, :]
            wide = load_sum(X, RESIDUAL, row, col, mask, x_row, x_col, r_row, r_col).to(tl.float32)
            squares += wide * wide
        rstd = tl.rsqrt(tl.sum(squares, axis=1) / cols + tl.cast(eps, tl.float32))
        for start in range(0, cols, WIDTH):
            col = start + tl.arange(0, WIDTH)
            inside = col < cols
            mask = here[:, None] & inside[None, :]
            # The sum is made again: what this program wrote need not be visible to its other threads yet.
            x = load_sum(X, RESIDUAL, row, col, mask, x_row, x_col, r_row, r_col)
            _store(x, rstd, W, Y, SUM, row, col, inside, mask, cols, offset, ROUND_TWICE)
    tl.store(RSTD + row, rstd, mask=here)


@triton.jit
def _pull(DY, W, row, col, inside, mask, d_row, d_col, offset):
    """A tile of dy, and of g = dy * (weight + offset)."""
    dy = tl.load(DY + row[:, None] * d_row + col[None, :] * d_col, mask=mask, other=0.0).to(tl.float32)
    g = dy
    if W is not None:
        w = tl.load(W + col, mask=inside, other=0.0).to(tl.float32) + tl.cast(offset, tl.float32)
        g = dy * w[None, :]
    return dy, g


@triton.jit
def store_gradient(dx, DSUM, DX, row, col, mask, cols, s_row, s_col):
    """Writes dx, with the gradient that reaches the sum on its other way."""
    if DSUM is not None:
        dx += tl.load(DSUM + row[:, None] * s_row + col[None, :] * s_col, mask=mask, other=0.0).to(tl.float32)
    tl.store(DX + row[:, None] * cols + col[None, :], dx.to(DX.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_backward(DY, DSUM, X, W, RSTD, DX, PART, rows, cols, d_row, d_col, s_row, s_col, x_row, x_col, offset,
                      ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """dx of every `num_programs`-th tile of whole rows; with PART, a row of partial sums of dweight."""
    col = tl.arange(0, WIDTH)
    inside = col < cols
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        here = row < rows
        mask = here[:, None] & inside[None, :]
        rstd = tl.load(RSTD + row, mask=here, other=0.0)
        xhat = tl.load(X + row[:, None] * x_row + col[None, :] * x_col, mask=mask, other=0.0).to(tl.float32) * rstd[:, None]
        dy, g = _pull(DY, W, row, col, inside, mask, d_row, d_col, offset)
        if PART is not None:
            sums += dy * xhat
        mean = tl.sum(g * xhat, axis=1) / cols
        store_gradient(rstd[:, None] * (g - xhat * mean[:, None]), DSUM, DX, row, col, mask, cols, s_row, s_col)
    if PART is not None:
        tl.store(PART + tl.program_id(0).to(tl.int64) * cols + col, tl.sum(sums, axis=0), mask=inside)


@triton.jit
def rms_norm_backward_wide(DY, DSUM, X, W, RSTD, DX, cols, d_row, d_col, s_row, s_col, x_row, x_col, offset,
                           ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """dx of ROWS = 1 row, in tiles of its columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rstd = tl.load(RSTD + row)
    products = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, cols, WIDTH):
        col = start + tl.arange(0, WIDTH)
        inside = col < cols
        mask = inside[None, :]
        x = tl.load(X + row[:, None] * x_row + col[None, :] * x_col, mask=mask, other=0.0).to(tl.float32)
        dy, g = _pull(DY, W, row, col, inside, mask, d_row, d_col, offset)
        products += g * (x * rstd[:, None])
    mean = tl.sum(products, axis=1) / cols
    for start in range(0, cols, WIDTH):
        col = start + tl.arange(0, WIDTH)
        inside = col < cols
        mask = inside[None, :]
        xhat = tl.load(X + row[:, None] * x_row + col[None, :] * x_col, mask=mask, other=0.0).to(tl.float32) * rstd[:, None]
        dy, g = _pull(DY, W, row, col, inside, mask, d_row, d_col, offset)
        store_gradient(rstd[:, None] * (g - xhat * mean[:, None]), DSUM, DX, row, col, mask, cols, s_row, s_col)


@triton.jit
def rms_norm_weight_gradient(DY, X, RSTD, PART, rows, cols, chunk, d_row, d_col, x_row, x_col, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Partial sums of dweight over `chunk` rows, for WIDTH columns: for rows that `rms_norm_backward` cannot hold, or without dx."""
    col = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = col < cols
    first = tl.program_id(1).to(tl.int64) * chunk
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, chunk, ROWS):
        row = first + start + tl.arange(0, ROWS)
        here = (row < rows) & (row < first + chunk)
        mask = here[:, None] & inside[None, :]
        rstd = tl.load(RSTD + row, mask=here, other=0.0)
        x = tl.load(X + row[:, None] * x_row + col[None, :] * x_col, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + row[:, None] * d_row + col[None, :] * d_col, mask=mask, other=0.0).to(tl.float32)
        sums += dy * (x * rstd[:, None])
    tl.store(PART + tl.program_id(1).to(tl.int64) * cols + col, tl.sum(sums, axis=0), mask=inside)


def forward(x, weight, eps, offset, casting):
    """As `body.forward`, which also serves fp64: fp32 statistics would not do there."""
    if x.dtype == torch.float64:
        return body.forward(x, weight, eps, offset, casting)
    y, _, rstd = add_forward(x, None, weight, eps, offset, casting)
    return y, rstd


def backward(dy, x, weight, rstd, offset, output_mask):
    """As `body.backward`, which also serves fp64."""
    if x.dtype == torch.float64:
        return body.backward(dy, x, weight, rstd, offset, output_mask)
    return add_backward(dy, None, x, weight, rstd, offset, output_mask)


def add_forward(x, residual, weight, eps, offset, casting):
    """(y, sum, rstd) of the norm of x + residual; of x, and no sum, where residual is None. Not for fp64."""
    dtype, cols = body.output_dtype(x, weight, casting), x.shape[-1]
    x_rows = strided_rows(x)
    r_rows = None if residual is None else strided_rows(residual)
    r_strides = (0, 0) if residual is None else r_rows.stride()
    scale = None if weight is None else weight.contiguous()
    y, rstd = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = None if residual is None else x.new_empty(x.shape)
    tile = row_tile(cols, WIDEST)
    launch(
        rms_norm_forward, (cdiv(x_rows.shape[0], tile.rows),),
        x_rows, r_rows, scale, y, total, rstd, *x_rows.shape, *x_rows.stride(), *r_strides,
        eps, offset, ROUND_TWICE=casting == "cast_then_scale", WHOLE=tile.whole, **tile.meta,
    )  # fmt: skip
    return y, total, rstd


def add_backward(dy, dsum, x, weight, rstd, offset, output_mask):
    """(dx + dsum, dweight), each None where the mask is off; dsum may be None. Not for fp64."""
    x_rows, d_rows = strided_rows(x), strided_rows(dy)
    s_rows = None if dsum is None else strided_rows(dsum)
    scale = None if weight is None else weight.contiguous()
    rstd = rstd.contiguous()
    rows, cols = x_rows.shape
    dx = x.new_empty(x.shape) if output_mask[0] else None
    strides = (*d_rows.stride(), *(s_rows.stride() if dsum is not None else (0, 0)), *x_rows.stride())
    tile = row_tile(cols, WIDEST_BACKWARD)
    groups = cdiv(rows, tile.rows)
    programs, part = groups, None
    if output_mask[1] and (dx is None or not tile.whole):
        part = _sum_over_rows(d_rows, x_rows, rstd)
    elif output_mask[1]:
        programs = programs_over(groups, tile.warps)
        part = x.new_empty((programs, cols), dtype=torch.float32)
    if dx is not None and tile.whole:
        launch(
            rms_norm_backward, (programs,), d_rows, s_rows, x_rows, scale, rstd, dx, part, rows, cols, *strides, offset, **tile.meta,
        )  # fmt: skip
    elif dx is not None:
        launch(rms_norm_backward_wide, (rows,), d_rows, s_rows, x_rows, scale, rstd, dx, cols, *strides, offset, **tile.meta)
    return dx, None if part is None else part.sum(0).to(weight.dtype)


def _sum_over_rows(d_rows, x_rows, rstd):
    """Partial sums of dweight, [chunks, cols]."""
    rows, cols = x_rows.shape
    chunk = rows_per_sum(rows, cols)
    part = x_rows.new_empty((cdiv(rows, chunk), cols), dtype=torch.float32)
    launch(
        rms_norm_weight_gradient, (cdiv(cols, SUM_WIDTH), part.shape[0]), d_rows, x_rows, rstd, part, rows, cols, chunk, *d_rows.stride(),
        *x_rows.stride(), ROWS=SUM_ROWS, WIDTH=SUM_WIDTH, num_warps=4,
    )  # fmt: skip
    return part
