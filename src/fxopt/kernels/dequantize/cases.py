"""Inputs of `fxopt::dequantize`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HIDDEN, HUGE_ROWS, HUGE_WIDTH, MLP, dtypes, normal, tensors
from fxopt.kernels.formats import FORMATS, PLAIN, Format
from fxopt.kernels.formats.gguf import LAYOUTS
from fxopt.kernels.op import Case

SHAPES = ((0,), (1,), (63,), (64,), (5, 13), (3, 43), (2, 64), (33, 66), (1, 256), (3, 512), (5, 96), (2, 3, 32))


@st.composite
def stored(draw, shapes):
    """(base, format name, shape): a weight of one of these shapes, in a format that can store it."""
    format = draw(st.sampled_from(tuple(FORMATS.values())))
    shape = draw(st.sampled_from([shape for shape in shapes if format.fits(shape) is None]))
    return base_of(format, draw(tensors(shape, torch.float32))), format.name, shape


def base_of(format: Format, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The weight in this format; if that is only read from files, random blocks with finite scales."""
    if format.quantize is not None:
        return format.quantize(weight)
    layout = next(layout for layout in LAYOUTS if layout.name == format.name)
    generator = torch.Generator().manual_seed(weight.numel())
    size = weight.numel() // layout.weights
    blocks = torch.randint(0, 256, (size, layout.bytes), dtype=torch.uint8, generator=generator)
    for at in layout.halves:
        blocks[:, at : at + 2] = torch.randn(size, 1, generator=generator).mul_(1e-3).half().view(torch.uint8)
    return (blocks.view(format.parts[0].shape(weight.shape)),)


@st.composite
def cases(draw):
    base, format, shape = draw(stored(SHAPES))
    return Case((*base, format, list(shape), draw(dtypes())), lists=((0, len(base)),))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    for format in FORMATS.values():
        shape = row_shape(format)
        if format.name not in PLAIN:
            base = base_of(format, normal(*shape, scale=0.02))
            yield format.name, Case((*base, format.name, list(shape), torch.float32), lists=((0, len(base)),))


def row_shape(format: Format) -> tuple[int, int]:
    """Of the weight of a row; HIDDEN columns are not whole blocks of the largest kind."""
    return (MLP, HIDDEN) if format.fits((MLP, HIDDEN)) is None else (HIDDEN, MLP)


def huge() -> Iterator[tuple[str, Case]]:
    """More than 2^31 weights in each format."""
    for format in FORMATS.values():
        if format.name not in PLAIN:
            shape = (HUGE_ROWS, HUGE_WIDTH)
            base = [torch.empty(part.shape(shape), dtype=part.dtype) for part in format.parts]
            yield format.name, Case((*base, format.name, list(shape), torch.bfloat16), lists=((0, len(base)),))
