"""A weight as it is: the format of what is not quantized."""

from __future__ import annotations

import torch

from fxopt.errors import DataError
from fxopt.kernels.formats.format import Format, Part, anything


def dequantize(base, shape, dtype):
    """The weight itself, or a copy in another dtype."""
    return base[0].to(dtype)


def _load(entries, shape):
    if "" not in entries:
        raise DataError("the weight is missing")
    return (entries[""],)


DENSE = Format(
    name="dense",
    parts=(Part("weight", None, tuple),),
    quantize=lambda weight: (weight,),
    reference=dequantize,
    dequantize=dequantize,
    bits=lambda shape: 32.0,
    error=0.0,
    fits=anything,
    save=lambda base, shape, dtype: {"": base[0].to(dtype)},
    load=_load,
    claims=lambda entries: "" in entries and entries[""].dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16),
)
