"""Inputs of `fxopt::nf4_dequantize`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, MLP, dtypes, normal, tensors
from fxopt.kernels.nf4.reference import quantize
from fxopt.kernels.op import Case

SHAPES = ((0,), (1,), (63,), (64,), (5, 13), (3, 43), (2, 64), (33, 66))


@st.composite
def cases(draw):
    shape = draw(st.sampled_from(SHAPES))
    packed, absmax = quantize(draw(tensors(shape, torch.float32)))
    return Case((packed, absmax, list(shape), draw(dtypes())))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    yield "", Case((*quantize(normal(MLP, HIDDEN, scale=0.02)), [MLP, HIDDEN], torch.float32))
