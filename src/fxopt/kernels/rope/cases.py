"""Inputs of `fxopt::rope`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
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
    # Views of what a projection gives, [batch, seq, heads, head_dim].
    q, k = (normal(BATCH, seq, heads, HEAD_DIM, seed=heads).transpose(1, 2) for heads in (HEADS, KV_HEADS))
    angle = normal(1, 1, seq, HEAD_DIM, seed=2)
    for label, interleaved in (("", False), ("interleaved", True)):
        yield label, Case((q, k, angle.cos(), angle.sin(), interleaved, False), (0, 1))
    # 46 of 92 columns, tables of their own for each sequence: rows and pairs that no vector load fits.
    q, k = (normal(BATCH, seq, heads, 92, seed=heads).transpose(1, 2) for heads in (HEADS, KV_HEADS))
    angle = normal(BATCH, 1, seq, 23, seed=2)
    yield "partial", Case((q, k, angle.cos(), angle.sin(), False, True), (0, 1))


def huge() -> Iterator[tuple[str, Case]]:
    """Long sequences in a large batch, one table for all of them."""
    q, k = (torch.empty(16, 65_536, heads, 128).transpose(1, 2) for heads in (32, 8))
    cos, sin = (torch.empty(1, 1, 65_536, 128) for _ in range(2))
    yield "", Case((q, k, cos, sin, False, False), (0, 1))
