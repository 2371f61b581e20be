"""Inputs of `fxopt::layer_norm`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, TOKENS, dtypes, leading, normal, seeds, subset, tensors, widths
from fxopt.kernels.op import Case
from fxopt.kernels.rms_norm.cases import WIDE, huge_rows


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
    for width in WIDE:
        yield f"{width} columns", Case((normal(64, width), torch.ones(width), torch.zeros(width), 1e-5), (0, 1, 2))


def huge() -> Iterator[tuple[str, Case]]:
    """As for `rms_norm`."""
    for label, x in huge_rows():
        yield label, Case((x, *(torch.empty(x.shape[-1]) for _ in range(2)), 1e-5), (0, 1, 2))
