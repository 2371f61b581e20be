"""Inputs of `fxopt::packed_attention`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HEAD_DIM, HEADS, KV_HEADS, dtypes, normal, seeds, subset, tensors
from fxopt.kernels.op import Case

LENGTHS = (1, 2, 5, 17, 40)


@st.composite
def layouts(draw, rows, seq):
    """Segments [rows, seq]: one document, runs, tokens alone, ids that come back, padding behind."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    kind = draw(st.sampled_from(("one", "runs", "runs", "alone", "again", "again", "padded")))
    if kind == "one":
        return torch.full((rows, seq), 3)
    if kind == "alone":
        return torch.arange(seq).expand(rows, seq)
    if kind == "again":
        return torch.randint(-1, 3, (rows, seq), generator=generator)
    ids = (torch.rand(rows, seq, generator=generator) < 0.3).cumsum(1) + 1
    return ids.masked_fill(torch.arange(seq) >= seq * 2 // 3, 0) if kind == "padded" else ids


@st.composite
def cases(draw):
    dtype, batch, seq = draw(dtypes()), draw(st.sampled_from((1, 2, 3, 0))), draw(st.sampled_from(LENGTHS))
    heads, kv_heads = draw(st.sampled_from(((1, 1), (4, 2), (3, 1), (2, 2))))
    width = draw(st.sampled_from((1, 4, 8)))
    segments = draw(layouts(draw(st.sampled_from((1, max(batch, 1)))) if batch else 1, seq)).to(draw(st.sampled_from((torch.int64, torch.int32, torch.bool))))
    query = draw(tensors((batch, heads, seq, width), dtype))
    key, value = draw(tensors((batch, kv_heads, seq, width), dtype)), draw(tensors((batch, kv_heads, seq, draw(st.sampled_from((width, width, 3)))), dtype))
    args = (query, key, value, segments, draw(st.sampled_from((None, 0.3))), draw(st.booleans()))
    return Case(args, draw(subset((0, 1, 2))), draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call): 2,048 tokens in 8 documents of 32 to 500 tokens, at the head sizes of `kernels/cases.py`."""
    query, key, value = (normal(1, 2048, heads, HEAD_DIM, seed=seed).transpose(1, 2) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    lengths = torch.tensor((500, 32, 256, 300, 128, 400, 64, 368))
    segments = torch.arange(8).repeat_interleave(lengths)[None]
    for label, causal in (("causal", True), ("both ways", False)):
        yield label, Case((query, key, value, segments, None, causal), (0, 1, 2))
