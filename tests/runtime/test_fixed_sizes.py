"""Operators whose backward fixes a size when it is traced: calls of other sizes have their own gradients all the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn

import fxopt
from fxopt.kernels.tolerance import same


class Products(nn.Module):
    """Its forward is of any length; the derivative of a cumulative product is traced for one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x).sigmoid().cumprod(1)).square().mean()


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("first", [5, 9])  # the length of the first call: that of the capture, or another
def test_every_length_has_its_gradients(check: bool, first: int) -> None:
    torch.manual_seed(0)
    model = Products()
    eager, opt = copy.deepcopy(model), fxopt.optimize(model, inputs=(torch.randn(2, 5, 3),), check=check)
    for length in (first, 5, 9, 7, 5):
        x, losses = torch.randn(3, length, 3), []
        for each in (eager, opt):
            each.zero_grad()
            losses.append(each(x))
            losses[-1].backward()
        assert same(losses[0].detach(), losses[1].detach())
        for (name, a), b in zip(eager.named_parameters(), opt.model.parameters(), strict=True):
            assert same(a.grad, b.grad), (name, length)
