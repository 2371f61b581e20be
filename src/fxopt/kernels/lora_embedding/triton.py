"""An embedding with a low-rank adapter on a GPU.

Forward is two passes: the columns of A (a gather of r values from r places), then the rows of W with the low-rank product added
in registers, so that y is written once. Backward goes through dy once for u = dy B and once for dB; dA is summed without
atomics: tokens are sorted by id, and the program of the first token of an id adds up all of them, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxopt.kernels.blocks import as_rows
from fxopt.kernels.launch import cdiv, launch, next_power_of_2
from fxopt.kernels.lora_embedding import body
from fxopt.kernels.lora_linear.triton import reduce, shrink

aten = torch.ops.aten


@triton.jit
def columns_kernel(ids, a, low, tokens, rank, a_row, a_column, BM: tl.constexpr, BR: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)[None, :]
    word = tl.load(ids + token, mask=token < tokens, other=0).to(tl.int64)
    inside = (token[:, None] < tokens) & (r < rank)
    value = tl.load(a + r.to(tl.int64) * a_row + word[:, None] * a_column, mask=inside, other=0.0)
    tl.store(low + token[:, None] * rank + r, value, mask=inside)


@triton.jit
def rows_kernel(ids, weight, low, b, y, tokens, width, rank, weight_row, weight_column, b_row, b_column, scale,
                BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, rank, BR):
        r = start + tl.arange(0, BR)
        part = tl.load(low + token[:, None] * rank + r[None, :], mask=(token[:, None] < tokens) & (r[None, :] < rank), other=0.0)
        factor = tl.load(b + n * b_row + r[:, None].to(tl.int64) * b_column, mask=(n < width) & (r[:, None] < rank), other=0.0)
        acc = tl.dot(part, factor, acc, input_precision="ieee")
    word = tl.load(ids + token, mask=token < tokens, other=0).to(tl.int64)
    inside = (token[:, None] < tokens) & (n < width)
    base = tl.load(weight + word[:, None] * weight_row + n * weight_column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token[:, None] * width + n, (base + acc * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def segments_kernel(words, order, first, last, up, out, rank, padding, up_row, out_row, BM: tl.constexpr, BR: tl.constexpr):
    here = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BR + tl.arange(0, BR)[None, :]
    word, end = tl.load(words + here).to(tl.int64), tl.load(last + here)
    if (tl.load(first + here) == here) & (word != padding):
        acc = tl.zeros((BM, BR), tl.float32)
        for start in range(here, end, BM):
            place = start + tl.arange(0, BM)
            token = tl.load(order + place, mask=place < end, other=0)
            acc += tl.load(up + token[:, None] * up_row + r, mask=(place[:, None] < end) & (r < rank), other=0.0).to(tl.float32)
        total = tl.sum(acc, axis=0)[None, :]
        tl.store(out + r.to(tl.int64) * out_row + word, total.to(out.dtype.element_ty), mask=r < rank)


def _rank(rank):
    """Ranks of a tile: `tl.dot` needs 16; more than 32 take several."""
    return min(32, max(16, next_power_of_2(rank)))


def _tokens(tokens):
    return 16 if tokens <= 16 else 32


def forward(weight, ids, lora_a, lora_b, scale, padding_idx):
    """`body.forward`; in fp64 that itself. Ids outside the vocabulary are not checked, as in any gather on a GPU."""
    if weight.dtype == torch.float64:
        return body.forward(weight, ids, lora_a, lora_b, scale, padding_idx)
    body.check(weight, ids, lora_a, lora_b)
    flat, (rank, _), width = ids.reshape(-1), lora_a.shape, weight.shape[1]
    count = flat.shape[0]
    low = lora_a.new_empty((count, rank))
    y = weight.new_empty((count, width))
    bm, br = _tokens(count), _rank(rank)
    launch(columns_kernel, (cdiv(count, bm), cdiv(rank, br)), flat, lora_a, low, count, rank, *lora_a.stride(), BM=bm, BR=br, num_warps=4)
    bn = min(128, max(16, next_power_of_2(width)))
    launch(rows_kernel, (cdiv(count, bm), cdiv(width, bn)), flat, weight, low, lora_b, y, count, width, rank, *weight.stride(), *lora_b.stride(),
           scale, BM=bm, BN=bn, BR=br, num_warps=4, num_stages=2)  # fmt: skip
    return y.view(*ids.shape, width), low.view(*ids.shape, rank)


def backward(dy, ids, lora_a, lora_b, low, scale, padding_idx, words, output_mask):
    """`body.backward`; in fp64 that itself. dW, which no adapter needs, is ATen's."""
    if dy.dtype == torch.float64:
        return body.backward(dy, ids, lora_a, lora_b, low, scale, padding_idx, words, output_mask)
    rows, flat = as_rows(dy), ids.reshape(-1)
    d_weight = aten.embedding_dense_backward(dy, ids, words, padding_idx, False) if output_mask[0] else None
    d_a = _column_gradient(rows, flat, lora_a, lora_b, scale, padding_idx) if output_mask[1] else None
    d_b = None
    if output_mask[2]:
        d_b = reduce(as_rows(low), rows, lora_b, True, scale) if flat.shape[0] else torch.zeros_like(lora_b, memory_format=torch.contiguous_format)
    return d_weight, d_a, d_b


def _column_gradient(rows, flat, lora_a, lora_b, scale, padding_idx):
    """dA [r, words]: zero where no token is."""
    out = lora_a.new_zeros(lora_a.shape)
    count, rank = flat.shape[0], lora_a.shape[0]
    if count:
        up = lora_a.new_empty((count, rank), dtype=torch.float32)
        shrink(rows, lora_b.t(), up, scale)
        words, order = flat.sort(stable=True)
        first, last = torch.searchsorted(words, words), torch.searchsorted(words, words, right=True)
        br = min(64, max(16, next_power_of_2(rank)))
        launch(segments_kernel, (count, cdiv(rank, br)), words, order, first, last, up, out, rank, padding_idx, up.stride(0), out.stride(0),
               BM=_tokens(count), BR=br, num_warps=1)  # fmt: skip
    return out
