"""Inputs of `fxopt::rms_norm`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, HUGE_ROWS, HUGE_WIDTH, TOKENS, dtypes, leading, normal, seeds, subset, tensors, widths
from fxopt.kernels.op import Case
from fxopt.kernels.rms_norm.body import CASTINGS


@st.composite
def cases(draw):
    dtype, width = draw(dtypes()), draw(widths())
    x = draw(tensors((*draw(leading()), width), dtype))
    weight = draw(st.none() | tensors((width,), dtype))
    eps, offset = draw(st.sampled_from((1e-6, 1e-5, 0.1))), draw(st.sampled_from((0.0, 1.0)))
    args = (x, weight, eps, offset, draw(st.sampled_from(CASTINGS)))
    return Case(args, draw(subset((0,) if weight is None else (0, 1))), draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    args = (normal(TOKENS, HIDDEN), torch.ones(HIDDEN), 1e-5, 0.0, "none")
    yield "", Case(args, (0,))
    yield "trained weight", Case(args, (0, 1))


def huge() -> Iterator[tuple[str, Case]]:
    """Many wide rows."""
    yield "", Case((torch.empty(HUGE_ROWS, HUGE_WIDTH), torch.empty(HUGE_WIDTH), 1e-5, 0.0, "none"), (0, 1))
