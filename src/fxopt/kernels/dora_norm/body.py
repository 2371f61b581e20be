"""The norms of an adapted weight's rows, block by block: the sum of weight and adapter never exists as a whole.

Writing ||W + s B A||^2 as three sums needs as many multiplications and cancels where the adapter undoes the weight.
"""

from __future__ import annotations

import torch

from fxopt.errors import CheckError
from fxopt.kernels.blocks import blocks
from fxopt.kernels.formats import named


def forward(base, format, shape, lora_a, lora_b, scale, transposed):
    """||W_o + scale (B A)_o|| for each output o.

    Args:
        base, format, shape: the stored weight, [out, in], or [in, out] if transposed (see kernels/formats).
        lora_a: [r, in]. lora_b: [out, r]; of one dtype, in which the norm is computed. scale: of the low-rank product.

    Returns:
        norm: [out] in the adapter's dtype. It has no gradient: DoRA holds it constant (section 4.3 of the paper).

    Raises:
        CheckError, RuntimeError: shapes or dtypes do not fit.

    Source: Liu et al., 2024, https://arxiv.org/abs/2402.09353.
    """
    check(base, format, shape, lora_a, lora_b, transposed)
    dtype = lora_a.dtype
    weight = base[0] if format == "dense" else torch.ops.fxopt.dequantize(base, format, shape, dtype)
    rows = weight.t() if transposed else weight
    norm = torch.empty(rows.shape[0], dtype=dtype, device=rows.device)
    for part in blocks(*rows.shape):
        torch.linalg.vector_norm(torch.addmm(rows[part].to(dtype), lora_b[part], lora_a, alpha=scale), dim=1, out=norm[part])
    return norm


def check(base, format, shape, lora_a, lora_b, transposed):
    named(format).check(base, shape)
    inputs, outputs = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
    torch._check(
        lora_a.shape[1] == inputs and lora_b.shape[0] == outputs and lora_a.shape[0] == lora_b.shape[1],
        lambda: f"lora_a {tuple(lora_a.shape)}, lora_b {tuple(lora_b.shape)}: need [r, {inputs}], [{outputs}, r]",
    )
    if lora_a.dtype != lora_b.dtype:
        raise CheckError(f"lora_a is {lora_a.dtype} and lora_b is {lora_b.dtype}", do="keep them in one dtype")


def forward_fake(base, format, shape, lora_a, lora_b, scale, transposed):
    check(base, format, shape, lora_a, lora_b, transposed)
    return lora_b.new_empty(lora_b.shape[:1])
