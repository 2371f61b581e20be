"""Inputs of `fxopt::geglu`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HUGE_ROWS, HUGE_WIDTH, MLP, TOKENS, dtypes, leading, normal, seeds, subset, tensors, widths
from fxopt.kernels.geglu.body import APPROXIMATIONS
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    dtype, shape = draw(dtypes()), (*draw(leading()), draw(widths()))
    gate, up = draw(tensors(shape, dtype, scale=2.0)), draw(tensors(shape, dtype))
    return Case(
        (gate, up, draw(st.sampled_from(APPROXIMATIONS))), draw(subset((0, 1))), draw(st.booleans()), draw(seeds())
    )


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    gate, up = normal(TOKENS, MLP), normal(TOKENS, MLP, seed=1)
    yield "", Case((gate, up, "tanh"), (0, 1))
    yield "erf", Case((gate, up, "none"), (0, 1))


def huge() -> Iterator[tuple[str, Case]]:
    """Dense tensors, and the halves of one product."""
    gate, up = (torch.empty(HUGE_ROWS, HUGE_WIDTH) for _ in range(2))
    yield "dense", Case((gate, up, "tanh"), (0, 1))
    gate, up = torch.empty(HUGE_ROWS, 2 * HUGE_WIDTH).chunk(2, -1)
    yield "halves", Case((gate, up, "tanh"), (0, 1))
