"""The norms of an adapted weight's rows on a GPU: one pass over the weight, its sum with the adapter only in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxopt.kernels.dora_norm import body
from fxopt.kernels.launch import cdiv, launch, next_power_of_2


@triton.jit
def norm_kernel(weight, a, b, norm, rows, width, rank, w_row, w_column, a_row, a_column, b_row, b_column, scale,
                BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    acc = tl.zeros((BM,), tl.float32)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        inside = (row[:, None] < rows) & (k[None, :] < width)
        value = tl.load(weight + row[:, None] * w_row + k[None, :].to(tl.int64) * w_column, mask=inside, other=0.0).to(tl.float32)
        change = tl.zeros((BM, BK), tl.float32)
        for first in range(0, rank, BR):
            r = first + tl.arange(0, BR)
            left = tl.load(b + row[:, None] * b_row + r[None, :] * b_column, mask=(row[:, None] < rows) & (r[None, :] < rank), other=0.0)
            right = tl.load(a + r[:, None].to(tl.int64) * a_row + k[None, :].to(tl.int64) * a_column, mask=(r[:, None] < rank) & (k[None, :] < width), other=0.0)
            change = tl.dot(left, right, change, input_precision="ieee")
        value += change * scale
        acc += tl.sum(value * value, axis=1)
    tl.store(norm + row, tl.sqrt(acc).to(norm.dtype.element_ty), mask=row < rows)


def forward(base, format, shape, lora_a, lora_b, scale, transposed):
    """`body.forward`; in fp64 that itself."""
    if lora_a.dtype == torch.float64:
        return body.forward(base, format, shape, lora_a, lora_b, scale, transposed)
    body.check(base, format, shape, lora_a, lora_b, transposed)
    weight = base[0] if format == "dense" else torch.ops.fxopt.dequantize(base, format, shape, lora_a.dtype)
    rows = weight.t() if transposed else weight
    norm = lora_b.new_empty(lora_b.shape[:1])
    (count, width), rank = rows.shape, lora_a.shape[0]
    br = min(32, max(16, next_power_of_2(rank)))
    launch(norm_kernel, (cdiv(count, 32),), rows, lora_a, lora_b, norm, count, width, rank, *rows.stride(), *lora_a.stride(), *lora_b.stride(), scale,
           BM=32, BK=64, BR=br, num_warps=4, num_stages=2)  # fmt: skip
    return norm
