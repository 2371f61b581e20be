"""bf16 and fp16: a weight rounded to 16 bits. It is read as it is by products in that dtype, and widened for others."""

from __future__ import annotations

import torch

from fxopt.errors import CheckError
from fxopt.kernels.dtypes import wide
from fxopt.kernels.formats.format import Format, Part, anything, take


def dequantize(base, shape, dtype):
    """The stored tensor itself in its own dtype, else a copy; both are exact, or rounded once."""
    return base[0].to(dtype)


def reference(base, shape, dtype):
    """Through fp32 (fp64 if dtype is), rounded once to dtype."""
    return base[0].to(wide(dtype)).to(dtype)


def _format(name, dtype, error):
    def quantize(weight):
        rounded = weight.detach().to(dtype)
        if not bool(rounded.isfinite().all()) and bool(weight.isfinite().all()):
            raise CheckError(f"a weight has elements beyond {name}'s range (its largest is {float(weight.abs().max()):.3g})", do="store it in bf16")
        return (rounded,)

    return Format(
        name=name,
        parts=(Part("weight", dtype, tuple),),
        quantize=quantize,
        reference=reference,
        dequantize=dequantize,
        bits=lambda shape: 16.0,
        error=error,
        fits=anything,
        save=lambda base, shape, dtype_: {"": base[0]},
        load=lambda entries, shape: (take(entries, "", dtype, shape),),
    )


# The stated errors are measured; a bf16 weight keeps 8 bits of its mantissa, an fp16 one 11.
BF16 = _format("bf16", torch.bfloat16, 0.00166)
FP16 = _format("fp16", torch.float16, 0.000208)
