"""Inputs of `fxopt::linear_cross_entropy`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, TOKENS, VOCABULARY, dtypes, leading, normal, seeds, subset, tensors
from fxopt.kernels.linear_cross_entropy.body import REDUCTIONS
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    dtype, rows = draw(dtypes()), draw(leading(empty=False).filter(bool))
    width, classes = draw(st.sampled_from((1, 5, 32))), draw(st.sampled_from((1, 7, 40)))
    hidden = draw(tensors((*rows, width), dtype))
    weight, bias = draw(tensors((classes, width), dtype)), draw(st.none() | tensors((classes,), dtype))
    generator = torch.Generator().manual_seed(draw(seeds()))
    ignore_index = draw(st.sampled_from((-100, -1, 0)))
    target = torch.randint(0, classes, rows, generator=generator)
    ignored = draw(st.sampled_from((0.0, 0.5, 0.99, 1.0)))
    target[torch.rand(rows, generator=generator) < ignored] = ignore_index
    places = (0, 1) if bias is None else (0, 1, 2)
    grads = draw(subset(places))
    # What is needed but not computed in forward is recomputed: draw the two apart.
    mask = [(place in grads and draw(st.booleans())) for place in range(3)]
    args = (
        hidden,
        weight,
        bias,
        target,
        ignore_index,
        draw(st.sampled_from(REDUCTIONS)),
        draw(st.sampled_from((0.0, 0.1))),
        draw(st.sampled_from((0.0, 2.0))),
        draw(st.sampled_from((1.0, 0.5))),
        draw(st.sampled_from((0, 1, 3))),
        mask,
    )
    return Case(args, grads, draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    hidden, weight = normal(TOKENS, HIDDEN), normal(VOCABULARY, HIDDEN, scale=0.02, seed=1)
    generator = torch.Generator().manual_seed(0)
    for label, supervised in (("all rows supervised", 1.0), ("20% of rows supervised", 0.2)):
        target = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
        target[torch.rand(TOKENS, generator=generator) >= supervised] = -100
        args = (hidden, weight, None, target, -100, "mean", 0.0, 0.0, 1.0, 0, [True, False, False])
        yield label, Case(args, (0,))
