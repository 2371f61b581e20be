"""A stored weight as a dense one: the ATen body of its format."""

from __future__ import annotations

import torch

from fxopt.kernels.formats import named


def forward(base, format, shape, dtype):
    """The dense weight of a stored one.

    Args:
        base: one tensor per part of the format, see `kernels/formats/`.
        format: the name of the format. shape: of the weight.
        dtype: fp16, bf16, fp32 or fp64; values are made in fp32 (fp64 for fp64) and rounded once.

    Returns:
        weight: shape, dtype, contiguous; shares no memory with base.

    Raises:
        CheckError, RuntimeError: unknown format; parts of a wrong number, dtype or size.

    Source: of the formats, in `kernels/formats/`.
    """
    found = named(format)
    found.check(base, shape)
    weight = found.dequantize(base, shape, dtype)
    return weight.clone(memory_format=torch.contiguous_format) if weight is base[0] else weight.contiguous()


def forward_fake(base, format, shape, dtype):
    named(format).check(base, shape)
    return base[0].new_empty(shape, dtype=dtype)
