"""Gradients that are differentiated again: inside the model, and by the loop around it."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn as nn

import fxopt
from fxopt.errors import DifferentiatedTwice
from tests.zoo.plain_others import Physics


class Critic(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 16), *([nn.RMSNorm(16)] if norm else []), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def penalty(critic: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of a gradient whose norm is not one."""
    x = x.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (slope.norm(dim=-1) - 1).square().mean()


def equal_gradients(model: nn.Module, other: nn.Module) -> bool:
    return all(a.grad is None and b.grad is None or torch.allclose(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_derivatives_inside_the_model() -> None:
    eager = Physics()
    opt = fxopt.optimize(copy.deepcopy(eager))
    for batch in (5, 9):
        x = torch.randn(batch, 2)
        for model in (eager, opt):
            model.zero_grad()
            model(x).backward()
        assert any(p.grad is not None for p in eager.parameters()) and equal_gradients(eager, opt.model)
    assert "operator by operator" in str(opt.report) and [part.name for part in opt.parts if part.captured] == ["body"]
    assert re.search(r"plain_others.py:\d+: \(slope,\) = torch.autograd.grad.*asks autograd for derivatives: take them in the loop", str(opt.report))


def test_a_penalty_of_gradients_is_refused_or_right() -> None:
    """torch's `once_differentiable` gives a penalty without gradients, and says nothing."""
    eager = Critic()
    opt, x = fxopt.optimize(copy.deepcopy(eager)), torch.randn(8, 4)
    with pytest.raises(DifferentiatedTwice, match="create_graph=True"):
        penalty(opt, x)
    penalty(eager, x).backward()
    with fxopt.differentiable_twice():
        penalty(opt, x).backward()
    assert equal_gradients(eager, opt.model)
    first = torch.autograd.grad(opt(x).sum(), opt.model.body[0].weight)  # ordinary gradients come as ever
    assert torch.allclose(first[0], torch.autograd.grad(eager(x).sum(), eager.body[0].weight)[0])


def test_fused_ops_and_adapters_are_differentiated_twice() -> None:
    x = torch.randn(8, 4)
    eager = Critic(norm=True)
    opt = fxopt.optimize(copy.deepcopy(eager), "fuse", inputs=(x,))
    assert "rms_norm" in opt.program.text()
    penalty(eager, x).backward()
    with fxopt.differentiable_twice():
        loss = penalty(opt, x)
    loss.backward()
    assert equal_gradients(eager, opt.model)
    opt = fxopt.optimize(Physics(), "lora(rank=2)", inputs=(x[:, :2],))
    opt(x[:, :2]).backward()
    with torch.no_grad():
        opt.model.body[0].lora_B["default"].fill_(0.5)
    opt.zero_grad()
    opt(x[:, :2]).backward()
    found = {name: p.grad for name, p in opt.named_parameters() if p.requires_grad}
    merged = opt.model(x[:, :2])
    wanted = torch.autograd.grad(merged, [p for p in opt.parameters() if p.requires_grad])
    assert len(found) == 6 and all(torch.allclose(a, b) for a, b in zip(found.values(), wanted, strict=True))
