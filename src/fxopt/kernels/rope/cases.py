"""Inputs of `fxopt::rope`."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import strategies as st

from fxopt.kernels.cases import BATCH, HEAD_DIM, HEADS, KV_HEADS, TOKENS, dtypes, normal, seeds, subset, tensors
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    dtype = draw(dtypes())
    batch, seq = draw(st.sampled_from((1, 3))), draw(st.sampled_from((0, 1, 5)))
    heads, kv_heads = draw(st.sampled_from((1, 4))), draw(st.sampled_from((1, 2)))
    rotary, rest = draw(st.sampled_from((2, 6, 16))), draw(st.sampled_from((0, 0, 3)))
    half_tables = draw(st.booleans())
    table = (draw(st.sampled_from((1, batch))), 1, seq, rotary // 2 if half_tables else rotary)
    q = draw(tensors((batch, heads, seq, rotary + rest), dtype))
    k = draw(st.none() | tensors((batch, kv_heads, seq, rotary + rest), dtype))
    # The two halves of a full-width table are drawn apart: the backward is the transpose, not sin negated.
    cos, sin = draw(tensors(table, dtype)), draw(tensors(table, dtype))
    args = (q, k, cos, sin, draw(st.booleans()), half_tables)
    return Case(args, draw(subset((0,) if k is None else (0, 1))), draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    seq = TOKENS // BATCH
    q, k = normal(BATCH, HEADS, seq, HEAD_DIM), normal(BATCH, KV_HEADS, seq, HEAD_DIM, seed=1)
    angle = normal(1, 1, seq, HEAD_DIM, seed=2)
    yield "", Case((q, k, angle.cos(), angle.sin(), False, False), (0, 1))
