"""Inputs of `fxopt::layer_norm`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, HUGE_ROWS, HUGE_WIDTH, TOKENS, dtypes, leading, normal, seeds, subset, tensors, widths
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    dtype, width = draw(dtypes()), draw(widths())
    x = draw(tensors((*draw(leading()), width), dtype))
    weight, bias = (draw(st.none() | tensors((width,), dtype)) for _ in range(2))
    grads = tuple(place for place, part in enumerate((x, weight, bias)) if part is not None)
    args = (x, weight, bias, draw(st.sampled_from((1e-5, 0.1))))
    return Case(args, draw(subset(grads)), draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    args = (normal(TOKENS, HIDDEN), torch.ones(HIDDEN), torch.zeros(HIDDEN), 1e-5)
    yield "", Case(args, (0,))
    yield "trained weight", Case(args, (0, 1, 2))


def huge() -> Iterator[tuple[str, Case]]:
    """Many wide rows."""
    yield "", Case((torch.empty(HUGE_ROWS, HUGE_WIDTH), torch.empty(HUGE_WIDTH), torch.empty(HUGE_WIDTH), 1e-5), (0, 1, 2))
