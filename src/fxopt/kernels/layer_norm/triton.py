"""LayerNorm on a GPU, with or without a residual add in front. See `rms_norm/triton.py` for how rows and sums are cut.

The variance is a mean of squared differences, never a difference of mean squares. Rows that do not fit into registers have
their tiles' means and squared differences merged (Chan, Golub and LeVeque, 1983, "Algorithms for computing the sample
variance").
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxopt.kernels.launch import cdiv, launch
from fxopt.kernels.layer_norm import body
from fxopt.kernels.rms_norm.triton import load_sum, store_gradient
from fxopt.kernels.tiles import SUM_ROWS, SUM_WIDTH, programs_over, row_tile, rows_per_sum, strided_rows

# Columns of a row held at once, two tensors in the forward and three in the backward; and with the sums for dweight and dbias
# in registers too, where a thread holds fewer elements of each tensor.
WIDEST, WIDEST_BACKWARD, WIDEST_WITH_SUMS = 16384, 8192, 4096
PER_THREAD_WITH_SUMS = 8


@triton.jit
def _store(x, mean, rstd, W, B, Y, SUM, row, col, inside, mask, cols):
    """Writes y, and the sum that x is."""
    at = row[:, None] * cols + col[None, :]
    if SUM is not None:
        tl.store(SUM + at, x, mask=mask)
    y = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    if W is not None:
        y *= tl.load(W + col, mask=inside, other=0.0).to(tl.float32)[None, :]
    if B is not None:
        y += tl.load(B + col, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_forward(X, RESIDUAL, W, B, Y, SUM, MEAN, RSTD, rows, cols, x_row, x_col, r_row, r_col, eps,
                       WHOLE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    if WHOLE:
        col = tl.arange(0, WIDTH)
        inside = col < cols
        mask = here[:, None] & inside[None, :]
        x = load_sum(X, RESIDUAL, row, col, mask, x_row, x_col, r_row, r_col)
        mean = tl.sum(x.to(tl.float32), axis=1) / cols
        centered = tl.where(mask, x.to(tl.float32) - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / cols + tl.cast(eps, tl.float32))
        _store(x, mean, rstd, W, B, Y, SUM, row, col, inside, mask, cols)
    else:
        mean = tl.zeros([ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, cols, WIDTH):
            col = start + tl.arange(0, WIDTH)
            mask = here[:, None] & (col < cols)[None, :]
            x = load_sum(X, RESIDUAL, row, col, mask, x_row, x_col, r_row, r_col).to(tl.float32)
            count = tl.minimum(cols - start, WIDTH).to(tl.float32)
            tile_mean = tl.sum(x, axis=1) / count
            centered = tl.where(mask, x - tile_mean[:, None], 0.0)
            part = count / (start + count)
            shift = tile_mean - mean
            squares += tl.sum(centered * centered, axis=1) + shift * shift * (start * part)
            mean += shift * part
        rstd = tl.rsqrt(squares / cols + tl.cast(eps, tl.float32))
        for start in range(0, cols, WIDTH):
            col = start + tl.arange(0, WIDTH)
            inside = col < cols
            mask = here[:, None] & inside[None, :]
            # The sum is made again: what this program wrote need not be visible to its other threads yet.
            x = load_sum(X, RESIDUAL, row, col, mask, x_row, x_col, r_row, r_col)
            _store(x, mean, rstd, W, B, Y, SUM, row, col, inside, mask, cols)
    tl.store(MEAN + row, mean, mask=here)
    tl.store(RSTD + row, rstd, mask=here)


@triton.jit
def _normalized(X, MEAN, RSTD, row, col, here, mask, x_row, x_col):
    """A tile of (x - mean) * rstd, and rstd."""
    mean = tl.load(MEAN + row, mask=here, other=0.0)
    rstd = tl.load(RSTD + row, mask=here, other=0.0)
    x = tl.load(X + row[:, None] * x_row + col[None, :] * x_col, mask=mask, other=0.0).to(tl.float32)
    return (x - mean[:, None]) * rstd[:, None], rstd


@triton.jit
def _pull(DY, W, row, col, inside, mask, d_row, d_col):
    """A tile of dy, and of g = dy * weight."""
    dy = tl.load(DY + row[:, None] * d_row + col[None, :] * d_col, mask=mask, other=0.0).to(tl.float32)
    g = dy
    if W is not None:
        g = dy * tl.load(W + col, mask=inside, other=0.0).to(tl.float32)[None, :]
    return dy, g


@triton.jit
def layer_norm_backward(DY, DSUM, X, W, MEAN, RSTD, DX, SCALES, SHIFTS, rows, cols, d_row, d_col, s_row, s_col, x_row, x_col,
                        ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """dx of every `num_programs`-th tile of whole rows; a row of partial sums of dweight and of dbias, where asked for."""
    col = tl.arange(0, WIDTH)
    inside = col < cols
    scales = tl.zeros([ROWS, WIDTH], tl.float32)
    shifts = tl.zeros([ROWS, WIDTH], tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        here = row < rows
        mask = here[:, None] & inside[None, :]
        xhat, rstd = _normalized(X, MEAN, RSTD, row, col, here, mask, x_row, x_col)
        dy, g = _pull(DY, W, row, col, inside, mask, d_row, d_col)
        if SCALES is not None:
            scales += dy * xhat
        if SHIFTS is not None:
            shifts += dy
        along = tl.sum(g * xhat, axis=1) / cols
        level = tl.sum(g, axis=1) / cols
        store_gradient(rstd[:, None] * (g - xhat * along[:, None] - level[:, None]), DSUM, DX, row, col, mask, cols, s_row, s_col)
    at = tl.program_id(0).to(tl.int64) * cols + col
    if SCALES is not None:
        tl.store(SCALES + at, tl.sum(scales, axis=0), mask=inside)
    if SHIFTS is not None:
        tl.store(SHIFTS + at, tl.sum(shifts, axis=0), mask=inside)


@triton.jit
def layer_norm_backward_wide(DY, DSUM, X, W, MEAN, RSTD, DX, cols, d_row, d_col, s_row, s_col, x_row, x_col,
                             ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """dx of ROWS = 1 row, in tiles of its columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    products = tl.zeros([ROWS, WIDTH], tl.float32)
    pulls = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, cols, WIDTH):
        col = start + tl.arange(0, WIDTH)
        inside = col < cols
        mask = inside[None, :]
        xhat, rstd = _normalized(X, MEAN, RSTD, row, col, row >= 0, mask, x_row, x_col)
        dy, g = _pull(DY, W, row, col, inside, mask, d_row, d_col)
        products += g * xhat
        pulls += g
    along = tl.sum(products, axis=1) / cols
    level = tl.sum(pulls, axis=1) / cols
    for start in range(0, cols, WIDTH):
        col = start + tl.arange(0, WIDTH)
        inside = col < cols
        mask = inside[None, :]
        xhat, rstd = _normalized(X, MEAN, RSTD, row, col, row >= 0, mask, x_row, x_col)
        dy, g = _pull(DY, W, row, col, inside, mask, d_row, d_col)
        store_gradient(rstd[:, None] * (g - xhat * along[:, None] - level[:, None]), DSUM, DX, row, col, mask, cols, s_row, s_col)


@triton.jit
def layer_norm_parameter_gradients(DY, X, MEAN, RSTD, SCALES, SHIFTS, rows, cols, chunk, d_row, d_col, x_row, x_col,
                                   ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Partial sums over `chunk` rows, for WIDTH columns: for rows that `layer_norm_backward` cannot hold, or without dx."""
    col = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = col < cols
    first = tl.program_id(1).to(tl.int64) * chunk
    scales = tl.zeros([ROWS, WIDTH], tl.float32)
    shifts = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, chunk, ROWS):
        row = first + start + tl.arange(0, ROWS)
        here = (row < rows) & (row < first + chunk)
        mask = here[:, None] & inside[None, :]
        dy = tl.load(DY + row[:, None] * d_row + col[None, :] * d_col, mask=mask, other=0.0).to(tl.float32)
        if SCALES is not None:
            xhat, rstd = _normalized(X, MEAN, RSTD, row, col, here, mask, x_row, x_col)
            scales += dy * xhat
        if SHIFTS is not None:
            shifts += dy
    at = tl.program_id(1).to(tl.int64) * cols + col
    if SCALES is not None:
        tl.store(SCALES + at, tl.sum(scales, axis=0), mask=inside)
    if SHIFTS is not None:
        tl.store(SHIFTS + at, tl.sum(shifts, axis=0), mask=inside)


def forward(x, weight, bias, eps):
    """As `body.forward`, which also serves fp64: fp32 statistics would not do there."""
    if x.dtype == torch.float64:
        return body.forward(x, weight, bias, eps)
    y, _, mean, rstd = add_forward(x, None, weight, bias, eps)
    return y, mean, rstd


def backward(dy, x, weight, bias, mean, rstd, output_mask):
    """As `body.backward`, which also serves fp64."""
    if x.dtype == torch.float64:
        return body.backward(dy, x, weight, bias, mean, rstd, output_mask)
    return add_backward(dy, None, x, weight, bias, mean, rstd, output_mask)


def add_forward(x, residual, weight, bias, eps):
    """(y, sum, mean, rstd) of the norm of x + residual; of x, and no sum, where residual is None. Not for fp64."""
    x_rows = strided_rows(x)
    r_rows = None if residual is None else strided_rows(residual)
    r_strides = (0, 0) if residual is None else r_rows.stride()
    scale, shift = (None if part is None else part.contiguous() for part in (weight, bias))
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    total = None if residual is None else x.new_empty(x.shape)
    tile = row_tile(x.shape[-1], WIDEST)
    launch(
        layer_norm_forward, (cdiv(x_rows.shape[0], tile.rows),),
        x_rows, r_rows, scale, shift, y, total, mean, rstd, *x_rows.shape, *x_rows.stride(), *r_strides, eps,
        WHOLE=tile.whole, **tile.meta,
    )  # fmt: skip
    return y, total, mean, rstd


def add_backward(dy, dsum, x, weight, bias, mean, rstd, output_mask):
    """(dx + dsum, dweight, dbias), each None where the mask is off; dsum may be None. Not for fp64."""
    x_rows, d_rows = strided_rows(x), strided_rows(dy)
    s_rows = None if dsum is None else strided_rows(dsum)
    scale = None if weight is None else weight.contiguous()
    statistics = (mean.contiguous(), rstd.contiguous())
    rows, cols = x_rows.shape
    dx = x.new_empty(x.shape) if output_mask[0] else None
    strides = (*d_rows.stride(), *(s_rows.stride() if dsum is not None else (0, 0)), *x_rows.stride())
    parts, sums = (None, None), any(output_mask[1:])
    tile = row_tile(cols, WIDEST_WITH_SUMS, PER_THREAD_WITH_SUMS)
    if sums and dx is not None and tile.whole:
        programs = programs_over(cdiv(rows, tile.rows), tile.warps)
        parts = together = _partial(x, programs, output_mask)
    else:
        tile, together = row_tile(cols, WIDEST_BACKWARD), (None, None)
        programs = cdiv(rows, tile.rows)
        if sums:
            parts = _sum_over_rows(d_rows, x_rows, statistics, output_mask)
    if dx is not None and tile.whole:
        launch(
            layer_norm_backward, (programs,), d_rows, s_rows, x_rows, scale, *statistics, dx, *together, rows, cols, *strides, **tile.meta,
        )  # fmt: skip
    elif dx is not None:
        launch(layer_norm_backward_wide, (rows,), d_rows, s_rows, x_rows, scale, *statistics, dx, cols, *strides, **tile.meta)
    return dx, *(None if part is None else part.sum(0).to(of.dtype) for of, part in zip((weight, bias), parts, strict=True))


def _partial(x, count, output_mask):
    """Room for partial sums of dweight and of dbias, [count, cols] each; None where not asked for."""
    return tuple(x.new_empty((count, x.shape[-1]), dtype=torch.float32) if on else None for on in output_mask[1:])


def _sum_over_rows(d_rows, x_rows, statistics, output_mask):
    """Partial sums of dweight and of dbias, [chunks, cols] each."""
    rows, cols = x_rows.shape
    chunk = rows_per_sum(rows, cols)
    parts = _partial(x_rows, cdiv(rows, chunk), output_mask)
    launch(
        layer_norm_parameter_gradients, (cdiv(cols, SUM_WIDTH), cdiv(rows, chunk)), d_rows, x_rows, *statistics, *parts, rows, cols, chunk,
        *d_rows.stride(), *x_rows.stride(), ROWS=SUM_ROWS, WIDTH=SUM_WIDTH, num_warps=4,
    )  # fmt: skip
    return parts
