"""Inputs of `fxopt::lora_linear`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, MLP, RANK, TOKENS, dtypes, leading, normal, seeds, subset, tensors
from fxopt.kernels.nf4.reference import quantize
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    dtype, transposed, quantized = draw(dtypes()), draw(st.booleans()), draw(st.booleans())
    adapter = draw(st.sampled_from((dtype, torch.float32))) if dtype == torch.bfloat16 else dtype
    features, outputs = draw(st.sampled_from((1, 5, 32, 65))), draw(st.sampled_from((1, 3, 24)))
    rank = draw(st.sampled_from((1, 2, 8)))
    shape = [features, outputs] if transposed else [outputs, features]
    x = draw(tensors((*draw(leading()), features), dtype))
    weight, absmax = draw(tensors(tuple(shape), dtype)), None
    if quantized:
        weight, absmax = quantize(weight)
    bias = draw(st.none() | tensors((outputs,), dtype))
    lora_a, lora_b = draw(tensors((rank, features), adapter)), draw(tensors((outputs, rank), adapter))
    args = (x, weight, bias, absmax, shape, lora_a, lora_b, draw(st.sampled_from((1.0, 0.25, 2.0))), transposed)
    places = (0, 5, 6) + (() if quantized else (1,)) + (() if bias is None else (2,))
    return Case(args, draw(subset(places)), draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    x, weight = normal(TOKENS, HIDDEN), normal(MLP, HIDDEN, scale=0.02, seed=1)
    adapter = (normal(RANK, HIDDEN, scale=0.04, seed=2), normal(MLP, RANK, scale=0.01, seed=3), 2.0, False)
    for label, base, absmax in (("dense base", weight, None), ("NF4 base", *quantize(weight))):
        yield label, Case((x, base, None, absmax, [MLP, HIDDEN], *adapter), (0, 5, 6))
