"""Inputs of `fxopt::layer_norm`."""

from __future__ import annotations

from hypothesis import strategies as st

from fxopt.kernels.cases import dtypes, leading, seeds, subset, tensors, widths
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    dtype, width = draw(dtypes()), draw(widths())
    x = draw(tensors((*draw(leading()), width), dtype))
    weight, bias = (draw(st.none() | tensors((width,), dtype)) for _ in range(2))
    grads = tuple(place for place, part in enumerate((x, weight, bias)) if part is not None)
    args = (x, weight, bias, draw(st.sampled_from((1e-5, 0.1))))
    return Case(args, draw(subset(grads)), draw(st.booleans()), draw(seeds()))
