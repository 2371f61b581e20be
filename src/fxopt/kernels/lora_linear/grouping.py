"""Which tensors of `fxopt::lora_linear`'s lists belong to which of its siblings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxopt.errors import CheckError
from fxopt.kernels.formats import named


@dataclass(frozen=True)
class Sibling:
    """One of the linear layers that read x.

    Attributes:
        base, format, shape: the stored weight. bias: [out] or None.
        a: [r, in]. b: [out, r]. scale: what the low-rank product is multiplied by.
        columns: its columns of `low`.
    """

    base: Sequence[torch.Tensor]
    format: str
    shape: Sequence[int]
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    columns: slice

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The base as a dense matrix: a temporary where it is quantized, the weight itself where it is dense, or stored in this dtype."""
        if self.format == "dense" or self.base[0].dtype == dtype:  # the parts of other formats are codes
            return self.base[0]
        return torch.ops.fxopt.dequantize(self.base, self.format, self.shape, dtype)


def first_parts(formats: Sequence[str]) -> list[int]:
    """The position in `bases` of each sibling's first part."""
    places, at = [], 0
    for name in formats:
        places.append(at)
        at += len(named(name).parts)
    return places


def siblings(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed) -> list[Sibling]:
    """The siblings, checked against each other and x (None: only against each other).

    Raises:
        CheckError, RuntimeError: a list has the wrong length, a tensor the wrong shape or dtype.
    """
    count = len(formats)
    counts = {"shapes": len(shapes) / 2, "lora_a": len(lora_a), "lora_b": len(lora_b), "scales": len(scales), "biases": len(biases) or count}
    for name, found in counts.items():
        if found != count or not count:
            raise CheckError(f"lora_linear has {count} formats and {found:g} {name}")
    places = [*first_parts(formats), len(bases)]
    found, at = [], 0
    for i, name in enumerate(formats):
        shape, a, b = shapes[2 * i : 2 * i + 2], lora_a[i], lora_b[i]
        base = bases[places[i] : places[i + 1]]
        named(name).check(base, shape)
        inputs, outputs = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
        torch._check(
            a.dim() == 2 and b.dim() == 2 and a.shape[1] == inputs and b.shape[0] == outputs and a.shape[0] == b.shape[1],
            lambda a=a, b=b, i=i, o=outputs, n=inputs: f"lora_a[{i}] {tuple(a.shape)}, lora_b[{i}] {tuple(b.shape)}: need [r, {n}], [{o}, r]",
        )
        if a.dtype != b.dtype or a.dtype != lora_a[0].dtype:
            raise CheckError(f"the adapters are {lora_a[0].dtype}, {a.dtype} and {b.dtype}", do="keep them in one dtype")
        if x is not None:
            torch._check(x.shape[-1] == inputs, lambda n=inputs: f"x has {x.shape[-1]} features, the weight takes {n}")
            if name == "dense" and base[0].dtype != x.dtype:
                raise CheckError(f"x is {x.dtype} and the weight is {base[0].dtype}", do="cast x to the weight's dtype")
        found.append(Sibling(base, name, shape, biases[i] if biases else None, a, b, scales[i], slice(at, at + a.shape[0])))
        at += a.shape[0]
    return found
