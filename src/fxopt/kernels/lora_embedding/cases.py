"""Inputs of `fxopt::lora_embedding`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, RANK, TOKENS, VOCABULARY, dtypes, leading, normal, seeds, subset, tensors
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    """Few words and many tokens: most ids occur several times."""
    dtype, index = draw(dtypes()), draw(st.sampled_from((torch.int64, torch.int64, torch.int32)))
    adapter = draw(st.sampled_from((dtype, torch.float32))) if dtype == torch.bfloat16 else dtype
    words, width, rank = (draw(st.sampled_from(sizes)) for sizes in ((1, 4, 30), (1, 5, 65), (1, 2, 8)))
    shape = draw(leading() | st.just((40,)) | st.just((3, 31)))
    ids = torch.randint(0, words, shape, generator=torch.Generator().manual_seed(draw(seeds())), dtype=index)
    weight = draw(tensors((words, width), dtype))
    a, b = draw(tensors((rank, words), adapter)), draw(tensors((width, rank), adapter))
    padding = draw(st.sampled_from((-1, -1, 0, words - 1)))
    return Case((weight, ids, a, b, draw(st.sampled_from((1.0, 0.25, 2.0))), padding), draw(subset((0, 2, 3))), draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """A vocabulary, tokens as they occur in text (few words make up most of it), and with 40% of padding."""
    draws = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0))
    ids = (VOCABULARY ** draws).long().clamp(max=VOCABULARY) - 1  # frequency falls with the rank, as in Zipf's law
    table = normal(VOCABULARY, HIDDEN, scale=0.02)
    a, b = normal(RANK, VOCABULARY, scale=0.04), normal(HIDDEN, RANK, scale=0.04)
    yield "", Case((table, ids, a, b, 2.0, -1), (2, 3))
    padded = ids.clone()
    padded[torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) < 0.4] = 0
    yield "40% padding", Case((table, padded, a, b, 2.0, 0), (2, 3))


def huge() -> Iterator[tuple[str, Case]]:
    """A wide table and as many rows of results; many words at a high rank."""
    for label, tokens, words, width, rank in (("width", 600_000, 300_000, 8192, 16), ("rank", 64, 9_000_000, 256, 256)):
        factors = torch.empty(rank, words), torch.empty(width, rank)
        yield label, Case((torch.empty(words, width), torch.empty(tokens, dtype=torch.int64), *factors, 1.0, -1), (2, 3))
