"""Inputs of `fxopt::adamw_`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.cases import HUGE_ROWS, HUGE_WIDTH, dtypes, leading, normal, tensors, widths
from fxopt.kernels.op import Case


@st.composite
def drawn_settings(draw):
    """lr, beta1, beta2, eps, weight_decay, step. Not both eps and beta2 at the edge: dividing by rounding noise is no test."""
    lr, weight_decay = draw(st.sampled_from((1e-3, 0.1))), draw(st.sampled_from((0.0, 0.01, 0.5)))
    beta1, beta2 = draw(st.sampled_from((0.9, 0.0))), draw(st.sampled_from((0.999, 0.9)))
    return lr, beta1, beta2, draw(st.sampled_from((1e-8, 1e-2, 1.0))), weight_decay, draw(st.sampled_from((1, 2, 1000)))


@st.composite
def gradients(draw, shape, dtype):
    """(param, grad, grad_factor, seed) of one shape: a gradient in the parameter's dtype or in fp32, any strides."""
    param = draw(tensors(shape, dtype)).contiguous()
    grad = draw(tensors(shape, draw(st.sampled_from((dtype, torch.float32)))))
    factor = draw(st.none() | st.sampled_from((1.0, 0.3)).map(torch.tensor))
    return param, grad, factor, draw(st.sampled_from((None, 3)))


@st.composite
def cases(draw):
    dtype, shape = draw(dtypes()), (*draw(leading()), draw(widths()))
    param, grad, factor, seed = draw(gradients(shape, dtype))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    exp_avg, exp_avg_sq = (draw(tensors(shape, acc, 0.1)).contiguous() for _ in range(2))
    return Case((param, grad, exp_avg, exp_avg_sq.square(), factor, *draw(drawn_settings()), seed))


# Rank-16 adapters on the seven linears of 30 layers, in the sizes of `kernels/cases.py`.
ADAPTERS = 4_884_480


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) over as many elements as rank-16 adapters have on the model of `kernels/cases.py`."""
    param, grad, exp_avg = (normal(ADAPTERS, seed=seed) for seed in range(3))
    args = (param, grad, exp_avg, exp_avg.square().mul_(0.1))
    settings = (2e-4, 0.9, 0.999, 1e-8, 0.01, 10)
    yield "", Case((*args, None, *settings, None), fixed=(2, 3))
    yield "clipped, stochastic", Case((*args, torch.tensor(0.5), *settings, 3), fixed=(2, 3))


def huge() -> Iterator[tuple[str, Case]]:
    """One parameter past 2^31 elements."""
    tensors = [torch.empty(HUGE_ROWS * HUGE_WIDTH) for _ in range(4)]
    yield "", Case((*tensors, None, 2e-4, 0.9, 0.999, 1e-8, 0.01, 10, None), fixed=(2, 3))
    yield "stochastic", Case((*tensors, None, 2e-4, 0.9, 0.999, 1e-8, 0.01, 10, 3), fixed=(2, 3))
