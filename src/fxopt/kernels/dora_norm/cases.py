"""Inputs of `fxopt::dora_norm`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, HUGE_ROWS, HUGE_WIDTH, MLP, RANK, normal, tensors
from fxopt.kernels.formats import named
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    transposed, name = draw(st.booleans()), draw(st.sampled_from(("dense", "nf4")))
    features, outputs, rank = (draw(st.sampled_from(sizes)) for sizes in ((1, 5, 65), (1, 3, 24), (1, 2, 8)))
    shape = [features, outputs] if transposed else [outputs, features]
    base = named(name).quantize(draw(tensors(tuple(shape), draw(st.sampled_from((dtype, torch.bfloat16))))))
    a, b = draw(tensors((rank, features), dtype)), draw(tensors((outputs, rank), dtype))
    return Case((*base, name, shape, a, b, draw(st.sampled_from((1.0, 0.25))), transposed), lists=((0, len(base)),))


def rows() -> Iterator[tuple[str, Case]]:
    """One layer's weight, dense and NF4."""
    for name in ("dense", "nf4"):
        base = named(name).quantize(normal(MLP, HIDDEN, scale=0.02))
        args = (*base, name, [MLP, HIDDEN], normal(RANK, HIDDEN, scale=0.04), normal(MLP, RANK, scale=0.01), 2.0, False)
        yield f"{name} base", Case(args, lists=((0, len(base)),))


def huge() -> Iterator[tuple[str, Case]]:
    """A weight of more than 2^31 elements."""
    base, a, b = torch.empty(HUGE_ROWS, HUGE_WIDTH), torch.empty(RANK, HUGE_WIDTH), torch.empty(HUGE_ROWS, RANK)
    yield "", Case((base, "dense", [HUGE_ROWS, HUGE_WIDTH], a, b, 2.0, False), lists=((0, 1),))
