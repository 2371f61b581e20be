"""Inputs of `fxopt::rms_norm`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, HUGE_ROWS, HUGE_WIDTH, TOKENS, dtypes, leading, normal, seeds, subset, tensors, widths
from fxopt.kernels.op import Case
from fxopt.kernels.rms_norm.body import CASTINGS

# Of rows that the kernels hold at once in the forward alone, and in both directions.
WIDE = (16384, 4096)


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
    for width in WIDE:
        yield f"{width} columns", Case((normal(64, width), torch.ones(width), 1e-5, 0.0, "cast_then_scale"), (0, 1))


def huge() -> Iterator[tuple[str, Case]]:
    """See `huge_rows`."""
    for label, x in huge_rows():
        yield label, Case((x, torch.empty(x.shape[-1]), 1e-5, 0.0, "none"), (0, 1))


def huge_rows() -> Iterator[tuple[str, torch.Tensor]]:
    """Rows that registers hold, rows that they do not, and rows with a gap between them."""
    yield "narrow", torch.empty(HUGE_ROWS * HUGE_WIDTH // HIDDEN, HIDDEN)
    yield "wide", torch.empty(HUGE_ROWS, HUGE_WIDTH)
    yield "half of each row", torch.empty(HUGE_ROWS, 2 * HUGE_WIDTH)[:, :HUGE_WIDTH]
