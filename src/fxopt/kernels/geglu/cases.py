"""Inputs of `fxopt::geglu`."""

from __future__ import annotations

from hypothesis import strategies as st

from fxopt.kernels.cases import dtypes, leading, seeds, subset, tensors, widths
from fxopt.kernels.geglu.body import APPROXIMATIONS
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    dtype, shape = draw(dtypes()), (*draw(leading()), draw(widths()))
    gate, up = draw(tensors(shape, dtype, scale=2.0)), draw(tensors(shape, dtype))
    return Case(
        (gate, up, draw(st.sampled_from(APPROXIMATIONS))), draw(subset((0, 1))), draw(st.booleans()), draw(seeds())
    )
