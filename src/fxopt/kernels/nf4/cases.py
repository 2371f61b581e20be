"""Inputs of `fxopt::nf4_dequantize`."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import dtypes, tensors
from fxopt.kernels.nf4.reference import quantize
from fxopt.kernels.op import Case

SHAPES = ((0,), (1,), (63,), (64,), (5, 13), (3, 43), (2, 64), (33, 66))


@st.composite
def cases(draw):
    shape = draw(st.sampled_from(SHAPES))
    packed, absmax = quantize(draw(tensors(shape, torch.float32)))
    return Case((packed, absmax, list(shape), draw(dtypes())))
