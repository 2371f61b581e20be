"""Inputs of `fxopt::quantized_linear`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import TOKENS, dtypes, leading, normal, seeds, subset, tensors
from fxopt.kernels.dequantize.cases import base_of, row_shape, stored
from fxopt.kernels.formats import FORMATS, PLAIN
from fxopt.kernels.op import Case

SHAPES = ((1, 1), (3, 5), (24, 32), (5, 65), (3, 64), (24, 96), (32, 24), (65, 1), (2, 256), (17, 128))


@st.composite
def cases(draw):
    dtype, transposed = draw(dtypes()), draw(st.booleans())
    base, format, shape = draw(stored(SHAPES))
    features, outputs = shape if transposed else reversed(shape)
    x = draw(tensors((*draw(leading()), features), dtype))
    bias = draw(st.none() | tensors((outputs,), dtype))
    args = (x, *base, format, list(shape), bias, transposed)
    place = len(base) + 3
    grads = draw(subset((0,) if bias is None else (0, place)))
    return Case(args, grads, draw(st.booleans()), draw(seeds()), lists=((1, 1 + len(base)),))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`: training, one token a sequence, and a tile of tokens."""
    for format in FORMATS.values():
        if format.name in PLAIN:
            continue
        shape = row_shape(format)
        base = base_of(format, normal(*shape, scale=0.02))
        tile = ((f"{format.name}, 32 rows", 32), (f"{format.name}, 64 rows", 64)) if format.name in ("nf4", "int8") else ()
        for label, tokens in ((format.name, TOKENS), (f"{format.name}, 4 rows", 4), *tile):
            args = (normal(tokens, shape[1]), *base, format.name, list(shape), None, False)
            yield label, Case(args, (0,), lists=((1, 1 + len(base)),))


def huge() -> Iterator[tuple[str, Case]]:
    """More than 2^31 bytes of codes and a few rows of x: what is dequantized in the product, in both directions."""
    for format in FORMATS.values():
        shape = ((1 << 25) + 5, 128)
        if format.name in ("nf4", "nf4_nested", "int8", "fp8"):
            base = [torch.empty(part.shape(shape), dtype=part.dtype) for part in format.parts]
            args = (torch.empty(4, shape[1]), *base, format.name, list(shape), None, False)
            yield format.name, Case(args, (0,), lists=((1, 1 + len(base)),))
