"""Inputs of `fxopt::linear_cross_entropy`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import DTYPES, HIDDEN, HUGE_ROWS, HUGE_WIDTH, TOKENS, VOCABULARY, leading, normal, seeds, subset, tensors
from fxopt.kernels.cross_entropy.body import REDUCTIONS
from fxopt.kernels.cross_entropy.cases import options, targets
from fxopt.kernels.op import Case


@st.composite
def cases(draw):
    dtype, rows = draw(st.sampled_from((*DTYPES, torch.float16))), draw(leading(empty=False).filter(bool))
    width, classes = draw(st.sampled_from((1, 5, 32))), draw(st.sampled_from((1, 7, 40, 129)))
    hidden = draw(tensors((*rows, width), dtype))
    weight = draw(tensors((classes, width), dtype, draw(st.sampled_from((1.0, 1.0, 2.0)))))
    bias = draw(st.none() | tensors((classes,), dtype, draw(st.sampled_from((1.0, 4.0)))))
    ignore_index = draw(st.sampled_from((-100, -1, 0)))
    target = draw(targets(rows, classes, ignore_index))
    grads = draw(subset((0, 1) if bias is None else (0, 1, 2)))
    # What is needed but not computed in forward is recomputed: draw the two apart.
    mask = [(place in grads and draw(st.booleans())) for place in range(3)]
    statistics = [draw(st.booleans()) for _ in range(3)]
    reduction, chunk = draw(st.sampled_from(REDUCTIONS)), draw(st.sampled_from((0, 1, 3)))
    labelled = int((target != ignore_index).sum())
    bound = draw(st.sampled_from((-1, 0, labelled, labelled + 1)))
    args = (hidden, weight, bias, target, ignore_index, reduction, *draw(options()), chunk, bound, mask, statistics)
    return Case(args, grads, draw(st.booleans()), draw(seeds()))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) at the sizes of `kernels/cases.py`."""
    hidden, weight = normal(TOKENS, HIDDEN), normal(VOCABULARY, HIDDEN, scale=0.02, seed=1)

    def call(supervised, grads=(0,), bias=None, softcap=0.0, statistics=(False, False, False)):
        generator = torch.Generator().manual_seed(0)
        target = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
        target[torch.rand(TOKENS, generator=generator) >= supervised] = -100
        labelled = int((target != -100).sum())  # A GPU computes no other rows, and need not wait for their number.
        options = (-100, "mean", 0.0, softcap, 1.0, 0.0, 0, labelled)
        mask = [place in grads for place in range(3)]
        return Case((hidden, weight, bias, target, *options, mask, list(statistics)), grads)

    yield "all rows supervised", call(1.0)
    yield "20% of rows supervised", call(0.2)
    yield "trained head", call(0.2, grads=(0, 1))
    yield "soft cap and bias", call(0.2, bias=normal(VOCABULARY, seed=2), softcap=30.0)
    yield "no gradient, with statistics", call(0.2, grads=(), statistics=(True, False, True))


def huge() -> Iterator[tuple[str, Case]]:
    """A huge chunk of logits; many rows and many classes of the kernel that holds none."""

    def call(rows, width, classes, chunk, grads):
        mask, statistics = [place in grads for place in range(3)], [True, False, True]
        options = (torch.zeros(rows, dtype=torch.int64), -100, "mean", 0.0, 0.0, 1.0, 0.0, chunk, 0)
        return Case((torch.empty(rows, width), torch.empty(classes, width), None, *options, mask, statistics), grads)

    many = HUGE_ROWS * HUGE_WIDTH // 1024
    yield "one chunk", call(HUGE_ROWS, HUGE_WIDTH, HUGE_WIDTH, HUGE_ROWS, (0, 1))
    yield "rows without logits", call(many, 1024, 1000, 0, ())
    yield "classes without logits", call(4096, 1024, many, 0, ())
