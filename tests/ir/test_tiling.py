"""Row tiling: the same gradients, less memory inside, and never across an operation in which rows meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fxopt
from fxopt.ir import tiling
from fxopt.ir.partition import MinCut, heavy, min_cut
from fxopt.ir.tiling import Tiling
from fxopt.kernels.tolerance import same
from fxopt.runtime.region import RegionRunner
from fxopt.runtime.saving import Always
from tests.models import llama, loss_of, tokens


class Mlp(nn.Module):
    """A norm, a gated unit, and `meet`, which may bring rows together."""

    def __init__(self, meet: Any = None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.up, self.gate, self.down = nn.Linear(16, 48), nn.Linear(16, 48, bias=False), nn.Linear(48, 16)
        self.meet = meet

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        y = F.silu(self.gate(y)) * self.up(y)
        if self.meet is not None:
            y = self.meet(y)
        return x + self.down(y)


def gradients(opt: fxopt.Optimized, x: torch.Tensor, policy: Any) -> list[torch.Tensor]:
    opt.dispatcher.last.binding.saving = Always(policy)
    x = x.clone().requires_grad_()
    opt.zero_grad()
    opt(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in opt.parameters())]


def prepared(model: nn.Module, x: torch.Tensor) -> tuple[fxopt.Optimized, MinCut, RegionRunner]:
    opt = fxopt.optimize(model, "canonicalize | fuse", inputs=(x.clone().requires_grad_(),), check=False)
    opt(x.clone().requires_grad_()).sum().backward()
    (_, runner, *_), = opt.dispatcher.last.binding.steps
    joint = next(iter(runner.joints.values()))[0]
    return opt, MinCut(frozenset(n.name for n in joint.graph.nodes if heavy(n))), runner


def tiled(runner: RegionRunner) -> list[str]:
    return [name for compiled in runner.compiled.values() for name in compiled.split.tiled]


@pytest.mark.parametrize(("dim", "shapes"), [(1, [(2, 130, 16), (1, 64, 16), (3, 7, 16), (2, 1, 16)]), (0, [(5, 9, 16), (3, 4, 16)])])
def test_gradients_are_the_same_with_a_remainder_and_with_one_tile(dim: int, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "FEWEST", 2)
    torch.manual_seed(0)
    opt, base, runner = prepared(Mlp(), torch.randn(3, 20, 16))
    for shape in shapes:
        x = torch.randn(shape)
        expected, found = (gradients(opt, x, policy) for policy in (min_cut, Tiling(base, dim, 4)))
        assert all(same(a, b) for a, b in zip(found, expected, strict=True)), shape
    assert [name for name in tiled(runner) if "mm" in name] and [name for name in tiled(runner) if "backward" in name]


@pytest.mark.parametrize("meet", [lambda y: y.softmax(1), lambda y: y.cumsum(1), lambda y: y - y.mean(1, keepdim=True), lambda y: y.flip(1), lambda y: y @ (y.transpose(1, 2) @ y)])
def test_what_brings_rows_together_is_never_in_a_tile(meet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "FEWEST", 2)
    torch.manual_seed(0)
    x = torch.randn(3, 20, 16)
    opt, base, runner = prepared(Mlp(meet), x)
    expected, found = (gradients(opt, x, policy) for policy in (min_cut, Tiling(base, 1, 4)))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    joined = {"softmax", "cumsum", "mean", "flip", "bmm"}
    assert not [name for name in tiled(runner) if joined & set(name.split("_"))]


def test_a_rule_that_lets_rows_meet_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "FEWEST", 2)
    rule = tiling.Rows._row_by_row
    monkeypatch.setattr(tiling.Rows, "_row_by_row", lambda self, node: rule(self, node) or "softmax" in node.name)
    torch.manual_seed(0)
    x = torch.randn(3, 20, 16)
    opt, base, _ = prepared(Mlp(lambda y: y.softmax(1)), x)
    expected, found = (gradients(opt, x, policy) for policy in (min_cut, Tiling(base, 1, 4)))
    assert not all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_a_block_of_a_language_model_needs_less_inside_in_tiles() -> None:
    data = tokens(3, 60)
    opt = fxopt.optimize(llama(layers=2, hidden_size=64, intermediate_size=256), "canonicalize | causal | lora(rank=4) | siblings | fuse | loss | memory(least)",
                         inputs=data, check=False)
    loss_of(opt(**data)).backward()
    plan = opt.dispatcher.last.binding.saving.last
    least = {name: p.grad.clone() for name, p in opt.named_parameters() if p.grad is not None}
    assert [level for level in plan.levels if level.split.tiled]
    opt.zero_grad()
    opt.dispatcher.last.binding.saving = Always(min_cut)
    loss_of(opt(**data)).backward()
    assert all(same(least[name], p.grad) for name, p in opt.named_parameters() if p.grad is not None)
