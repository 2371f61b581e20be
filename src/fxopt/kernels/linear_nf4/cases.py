"""Inputs of `fxopt::linear_nf4`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, MLP, TOKENS, dtypes, leading, normal, seeds, subset, tensors
from fxopt.kernels.nf4.reference import quantize
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    dtype, transposed = draw(dtypes()), draw(st.booleans())
    features, outputs = draw(st.sampled_from((1, 5, 32, 65))), draw(st.sampled_from((1, 3, 24)))
    shape = [features, outputs] if transposed else [outputs, features]
    packed, absmax = quantize(draw(tensors(tuple(shape), torch.float32)))
    x = draw(tensors((*draw(leading()), features), dtype))
    bias = draw(st.none() | tensors((outputs,), dtype))
    args = (x, packed, absmax, shape, bias, transposed)
    return Case(args, draw(subset((0,) if bias is None else (0, 4))), draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    packed, absmax = quantize(normal(MLP, HIDDEN, scale=0.02))
    yield "", Case((normal(TOKENS, HIDDEN), packed, absmax, [MLP, HIDDEN], None, False), (0,))
