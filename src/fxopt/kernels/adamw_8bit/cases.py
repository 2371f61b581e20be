"""Inputs of `fxopt::adamw_8bit_`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import strategies as st

from fxopt.kernels.adamw.cases import ADAPTERS, drawn_settings, gradients
from fxopt.kernels.adamw_8bit.codes import count, dynamic_maps, encode
from fxopt.kernels.cases import HUGE_ROWS, HUGE_WIDTH, normal, tensors
from fxopt.kernels.op import Case

# Maxima and maps.
FIXED = (3, 5, 6)


def encoded(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, of x's shape, and maxima."""
    codes, absmax = torch.zeros(x.numel(), dtype=torch.uint8), torch.zeros(count(x.numel()))
    encode(x.flatten(), codes, absmax, signed)
    return codes.view(x.shape), absmax


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    # A short block, whole ones, one and a bit; more than one tile of the kernel.
    shape = draw(st.sampled_from(((), (1,), (7,), (0,), (256,), (2, 256), (3, 99), (1, 1300))))
    param, grad, factor, seed = draw(gradients(shape, dtype))
    m = encoded(draw(tensors(shape, torch.float32, 0.1)), True)
    v = encoded(draw(tensors(shape, torch.float32, 0.1)).square(), False)
    return Case((param, grad, *m, *v, dynamic_maps(), factor, *draw(drawn_settings()), seed))


def rows() -> Iterator[tuple[str, Case]]:
    """(label, call) over as many elements as rank-16 adapters have on the model of `kernels/cases.py`."""
    param, grad, exp_avg = (normal(ADAPTERS, seed=seed) for seed in range(3))
    averages = (*encoded(exp_avg, True), *encoded(exp_avg.square().mul_(0.1), False), dynamic_maps())
    settings = (2e-4, 0.9, 0.999, 1e-8, 0.01, 10)
    yield "", Case((param, grad, *averages, None, *settings, None), fixed=FIXED)
    yield "clipped, stochastic", Case((param, grad, *averages, torch.tensor(0.5), *settings, 3), fixed=FIXED)


def huge() -> Iterator[tuple[str, Case]]:
    """One parameter past 2^31 elements."""
    size = HUGE_ROWS * HUGE_WIDTH
    averages = [torch.empty(size, dtype=torch.uint8), torch.empty(count(size))] * 2
    args = (torch.empty(size), torch.empty(size), *averages, torch.empty(2, 256), None, 2e-4, 0.9, 0.999, 1e-8, 0.01, 10)
    yield "", Case((*args, None), fixed=FIXED)
    yield "stochastic", Case((*args, 3), fixed=FIXED)
