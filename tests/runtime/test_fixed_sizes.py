"""Operators whose backward fixes a size when it is traced, or cannot be traced: gradients are those of eager code all the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

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


class Warped(nn.Module):
    """The backward of an affine grid takes no symbolic sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Linear(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = F.affine_grid(self.where(x.mean((2, 3))).view(-1, 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False).square().mean()


def test_what_has_no_joint_graph_runs_and_is_said() -> None:
    torch.manual_seed(0)
    model = Warped()
    eager, opt = copy.deepcopy(model), fxopt.optimize(model)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 6, 6)
        for each in (eager, opt):
            each.zero_grad()
            each(x).backward()
        assert same(eager.where.weight.grad, opt.model.where.weight.grad) and float(eager.where.weight.grad.norm()) > 0
    assert "runs operator by operator" in opt.report
