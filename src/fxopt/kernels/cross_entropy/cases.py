"""Inputs of `fxopt::cross_entropy`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import DTYPES, HUGE_ROWS, HUGE_WIDTH, leading, seeds, tensors
from fxopt.kernels.cross_entropy.body import REDUCTIONS
from fxopt.kernels.op import Case


@st.composite
def targets(draw, rows, classes, ignore_index):
    """Classes, the first and the last among them, with none, half, 99% or all of the rows ignored."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    target = torch.randint(0, classes, rows, generator=generator)
    edge = torch.rand(rows, generator=generator)
    target[edge < 0.2], target[edge > 0.8] = 0, classes - 1
    ignored = draw(st.sampled_from((0.0, 0.3, 0.5, 0.6, 0.99, 1.0)))
    target[torch.rand(rows, generator=generator) < ignored] = ignore_index
    return target


def options():
    """label_smoothing, softcap, logit_scale, z_loss."""
    return st.tuples(*map(st.sampled_from, ((0.0, 0.1), (0.0, 2.0), (1.0, 0.5), (0.0, 1e-3))))


@st.composite
def cases(draw):
    dtype, rows = draw(st.sampled_from((*DTYPES, torch.float16))), draw(leading())
    classes = draw(st.sampled_from((1, 2, 5, 40, 129)))
    # Confident rows: a scale of 8 puts most of the probability on one class, often the wrong one.
    logits = draw(tensors((*rows, classes), dtype, draw(st.sampled_from((1.0, 1.0, 8.0)))))
    ignore_index = draw(st.sampled_from((-100, -1, 0)))
    target = draw(targets(rows, classes, ignore_index))
    if draw(st.booleans()):  # The label is the confident one.
        confident = torch.nn.functional.one_hot(target.clamp(0), classes) * 6.0
        logits = logits + confident.to(dtype)
    args = (logits, target, ignore_index, draw(st.sampled_from(REDUCTIONS)), *draw(options()))
    return Case(args, (0,), draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """Calls at the sizes of a small language model, and of an image classifier."""

    def call(tokens, classes, supervised=1.0, smoothing=0.0, softcap=0.0):
        generator = torch.Generator().manual_seed(0)
        target = torch.randint(0, classes, (tokens,), generator=generator)
        target[torch.rand(tokens, generator=generator) >= supervised] = -100
        logits = torch.randn(tokens, classes, generator=generator)
        return Case((logits, target, -100, "mean", smoothing, softcap, 1.0, 0.0), (0,))

    yield "all rows supervised", call(256, 49152)
    yield "20% of rows supervised", call(256, 49152, 0.2)
    yield "soft cap", call(256, 49152, softcap=30.0)
    yield "1,000 classes, smoothed", call(4096, 1000, smoothing=0.1)


def huge() -> Iterator[tuple[str, Case]]:
    """Rows one after the other, and classes one after the other."""
    options = (torch.zeros(HUGE_ROWS, dtype=torch.int64), -100, "mean", 0.1, 0.0, 1.0, 0.0)
    yield "rows", Case((torch.empty(HUGE_ROWS, HUGE_WIDTH), *options), (0,))
    yield "columns", Case((torch.empty(HUGE_WIDTH, HUGE_ROWS).t(), *options), (0,))
