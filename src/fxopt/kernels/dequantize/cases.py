"""Inputs of `fxopt::dequantize`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, MLP, dtypes, normal, tensors
from fxopt.kernels.formats import FORMATS, named
from fxopt.kernels.op import Case

SHAPES = ((0,), (1,), (63,), (64,), (5, 13), (3, 43), (2, 64), (33, 66), (1, 256), (3, 512), (5, 96), (2, 3, 32))


@st.composite
def stored(draw, shapes):
    """(base, format name, shape): a weight of one of these shapes, in a format that can store it."""
    format = draw(st.sampled_from([format for format in FORMATS.values() if format.quantize is not None]))
    shape = draw(st.sampled_from([shape for shape in shapes if format.fits(shape) is None]))
    return format.quantize(draw(tensors(shape, torch.float32))), format.name, shape


@st.composite
def cases(draw):
    base, format, shape = draw(stored(SHAPES))
    return Case((*base, format, list(shape), draw(dtypes())), lists=((0, len(base)),))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    for format in FORMATS.values():
        if format.quantize is not None and format.name != "dense":
            base = named(format.name).quantize(normal(MLP, HIDDEN, scale=0.02))
            yield format.name, Case((*base, format.name, [MLP, HIDDEN], torch.float32), lists=((0, len(base)),))
