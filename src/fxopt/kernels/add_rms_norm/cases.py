"""Inputs of `fxopt::add_rms_norm`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, TOKENS, dtypes, leading, normal, seeds, subset, tensors, widths
from fxopt.kernels.op import Case
from fxopt.kernels.rms_norm.body import CASTINGS
from fxopt.kernels.rms_norm.cases import WIDE, huge_rows


@st.composite
def cases(draw):
    dtype, width = draw(dtypes()), draw(widths())
    shape = (*draw(leading()), width)
    x, residual = draw(tensors(shape, dtype)), draw(tensors(shape, dtype))
    weight = draw(st.none() | tensors((width,), dtype))
    eps, offset = draw(st.sampled_from((1e-6, 1e-5, 0.1))), draw(st.sampled_from((0.0, 1.0)))
    args = (x, residual, weight, eps, offset, draw(st.sampled_from(CASTINGS)))
    return Case(args, draw(subset((0, 1) if weight is None else (0, 1, 2))), draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    args = (normal(TOKENS, HIDDEN), normal(TOKENS, HIDDEN, seed=1), torch.ones(HIDDEN), 1e-5, 0.0, "none")
    yield "", Case(args, (0, 1))
    yield "trained weight", Case(args, (0, 1, 2))
    for width in WIDE:
        yield f"{width} columns", Case((normal(64, width), normal(64, width, seed=1), torch.ones(width), 1e-5, 0.0, "cast_then_scale"), (0, 1, 2))


def huge() -> Iterator[tuple[str, Case]]:
    """As for `rms_norm`."""
    for label, x in huge_rows():
        yield label, Case((x, torch.empty(x.shape), torch.empty(x.shape[-1]), 1e-5, 0.0, "none"), (0, 1, 2))
