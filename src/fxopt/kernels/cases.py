"""Strategies that the cases of all ops share: shapes, layouts, dtypes, seeded values.

Values come from a seeded generator, not from hypothesis: it explores shapes and options, where the
bugs of such ops are, and a failing case prints small.

The sizes below are those of a row: a call at the size of a 135-million-parameter language model, for measurements and for
compiling the kernels that it starts. `cases.py` of an op gives its rows in fp32. Its `huge()` gives calls whose tensors
have more than 2^31 elements, for the kernels' offsets; it is called under a FakeTensorMode, where `torch.empty` costs nothing.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

TOKENS, BATCH = 1024, 4
HIDDEN, MLP, VOCABULARY = 576, 1536, 49152
HEADS, KV_HEADS, HEAD_DIM, RANK = 9, 3, 64, 16

HUGE_ROWS, HUGE_WIDTH = 70_001, 36_864  # 2.58e9 elements


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """fp32 normal values of a row, the same ones at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def dtypes() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from(DTYPES)


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 999)


def widths() -> st.SearchStrategy[int]:
    """Sizes of a last dimension: one, odd, a little over a vector register, and over a block of 1,024."""
    return st.sampled_from((1, 2, 5, 8, 17, 33, 64, 1100))


def leading(empty: bool = True) -> st.SearchStrategy[tuple[int, ...]]:
    """Leading dimensions: none, one row, odd counts, and no rows at all."""
    shapes = ((), (1,), (7,), (2, 3), (1, 4, 1))
    return st.sampled_from((*shapes, (0,), (2, 0)) if empty else shapes)


def subset(positions: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Which of these arguments require a gradient: at least one."""
    return st.lists(st.sampled_from(positions), min_size=1, unique=True).map(lambda some: tuple(sorted(some)))


@st.composite
def tensors(draw, shape, dtype, scale=1.0):
    """Normal values of this shape; contiguous, permuted, strided or a slice of something larger."""
    generator = torch.Generator().manual_seed(draw(seeds()))

    def normal(size):
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    layout = draw(st.sampled_from(("contiguous", "contiguous", "slice", "step", "transposed")))
    if not shape or layout == "contiguous":
        return normal(shape)
    if layout == "slice":
        return normal((*shape[:-1], shape[-1] + 3))[..., 1 : shape[-1] + 1]
    if layout == "step":
        return normal((*shape[:-1], 2 * shape[-1]))[..., ::2]
    return normal(tuple(reversed(shape))).permute(*reversed(range(len(shape))))
