"""A residual add and the norm that reads it become one op: where, where not and why, and what is saved for the backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from captured import FAMILIES, Captured, data, family, function, module, weight

import fxopt
from fxopt.ir import regions
from fxopt.ir.capture import Call, capture
from fxopt.kernels.tolerance import same
from fxopt.passes import residual
from fxopt.passes.fuse import Fuse
from tests.models import MODELS, loss_of

X, Y, W = data(2, 6, 8), data(2, 6, 8, seed=2), weight(8)


def fused(fn, *tensors, **parameters) -> Captured:
    """A function after fuse, values and gradients compared with fp64."""
    return function(fn, *tensors, **parameters).after("canonicalize").check(Fuse())


def norm(x, w):
    return F.rms_norm(x, (8,), w, 1e-5)


# -- where it fires --------------------------------------------------------------------------------------------------


def test_other_readers_read_the_sum() -> None:
    captured = fused(lambda x, r, w: (s := x + r, norm(s, w) * s + s.relu())[1], X, Y, w=W)
    (call,) = captured.calls("add_rms_norm")
    assert not captured.calls("add")[1:] and not captured.calls("rms_norm")
    total = next(user for user in call.users if user.args[1] == 1)
    assert {str(user.target) for user in total.users} == {"aten.mul.Tensor", "aten.relu.default"}
    assert captured.rules == {"rms_norm.native": 1, "add_rms_norm": 1}


def test_a_sum_that_only_the_norm_reads() -> None:
    captured = fused(lambda x, r, w, b: F.layer_norm(x + r, (8,), w, b), X, Y, w=W, b=weight(8, seed=3))
    (call,) = captured.calls("add_layer_norm")
    assert [user.args[1] for user in call.users] == [0]
    assert [arg.target for arg in call.args[2:4]] == ["w", "b"]


def test_a_reader_before_the_norm() -> None:
    captured = fused(lambda x, r, w: (s := x + r, t := s.exp(), norm(s, w) + t)[2], X, Y, w=W)
    order = [node.name for node in captured.program.nodes]
    (call,), (reader,) = captured.calls("add_rms_norm"), captured.calls("exp")
    assert order.index(call.name) < order.index(reader.name)


def test_two_norms_of_one_sum() -> None:
    captured = fused(lambda x, r, w, v: (s := x + r, norm(s, w) + norm(s, v))[1], X, Y, w=W, v=weight(8, seed=3))
    assert len(captured.calls("add_rms_norm")) == len(captured.calls("rms_norm")) == 1


def test_an_operand_twice() -> None:
    assert fused(lambda x, w: norm(x + x, w), X, w=W).calls("add_rms_norm")


def test_only_where_asked_for() -> None:
    def both(x, r, w):
        return norm(x + r, w)

    program = function(both, X, Y, w=W).after("canonicalize")
    assert program.check(Fuse(ops=("rms_norm",))).calls("rms_norm")
    assert program.check(Fuse(ops=("rms_norm", "add_layer_norm"))).calls("rms_norm")
    assert program.check(Fuse(ops=("rms_norm", "add_rms_norm"))).calls("add_rms_norm")


# -- where it does not -----------------------------------------------------------------------------------------------

NEAR = {
    "broadcast": (lambda x, r, w: norm(x + r[:1], w), "the add broadcasts float32["),
    "factor": (lambda x, r, w: norm(torch.add(x, r, alpha=2), w), "it is no sum of two tensors"),
    "number": (lambda x, r, w: norm(x * r + 1, w), "it is no sum of two tensors"),
    "dtypes": (lambda x, r, w: norm(x + r.bfloat16(), w), " and bfloat16["),
    "written": (lambda x, r, w: (c := r.detach() * 2, v := c[0], y := norm(x + c, w), c.add_(1))[2] + v, "is written in place"),
    "view": (lambda x, r, w: (s := x.transpose(0, 1) + r.transpose(0, 1), norm(s, w).sum() + s.transpose(0, 1).view(2, -1))[1], "other strides"),
    "late weight": (lambda x, r, w: (s := x + r, t := s.exp(), norm(s, w * t[0, 0]) + t)[2], "reads the sum before"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    fn, reason = NEAR[name]
    captured = fused(fn, X, Y, w=W)
    assert not captured.calls("add_rms_norm") and captured.calls("rms_norm")
    assert any(reason in said for said in captured.misses), captured.misses


class Checkpointed(nn.Module):
    """The norm, but not the add, is computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-5)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda s: self.norm(s).relu(), x + residual, use_reentrant=False)


def test_a_checkpointed_region_keeps_its_border() -> None:
    captured = module(Checkpointed(), X, Y).after("canonicalize").check(Fuse())
    assert captured.calls("rms_norm") and any("checkpointed region" in said for said in captured.misses)


# -- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_those_that_regions_are_cut_at(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name](2)
    assert residual.repeated(family(name, layers=2).program.nodes) == set(regions.repeated_blocks(model))


def test_sequential_blocks() -> None:
    block = lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))  # noqa: E731
    model = nn.Sequential(block(), nn.Sequential(block(), block()))
    program = capture(model, Call.of((X,), {}))
    assert residual.repeated(program.nodes) == set(regions.repeated_blocks(model)) == {"0", "1"}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_blocks_stay_apart_and_equal(name: str) -> None:
    before, after = (family(name, layers=2).after("canonicalize", each) for each in (Fuse(ops=("rms_norm",)), Fuse()))
    blocks = residual.repeated(after.program.nodes)
    cuts = [regions.cut(captured.program, blocks) for captured in (before, after)]
    assert [region.path for region in cuts[0].regions] == [region.path for region in cuts[1].regions] and not cuts[1].dissolved
    assert len({region.key for region in cuts[0].regions}) == len({region.key for region in cuts[1].regions})
    assert [len(region.inputs) for region in cuts[0].regions] == [len(region.inputs) for region in cuts[1].regions]
    apart = [said for said in after.misses if "blocks are compiled apart" in said]
    assert len(apart) == {"llama": 2, "t5": 4}[name]


# -- what is saved ---------------------------------------------------------------------------------------------------


class Parallel(nn.Module):
    """(x + a) + b, of which a norm reads the whole: the operand x + a is needed for nothing else."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.a, self.b, self.out = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        x = (x + self.a(y)) + self.b(y)
        return (x + self.out(self.second(x))).square().mean()


CASES = {name: MODELS[name] for name in ("handwritten", "bert")} | {  # the norm before and behind the branch
    "parallel": (Parallel, lambda: {"x": torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))}),
}


def trained(name: str, passes: str) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
    """(bytes saved by all regions, the loss, the gradients) of one step."""
    make, batch = CASES[name]
    torch.manual_seed(0)
    model = make()
    opt = fxopt.optimize(model, passes, check=False)
    torch.manual_seed(0)
    out = opt(**batch())
    loss = out if isinstance(out, torch.Tensor) else loss_of(out)
    loss.backward()
    splits = [compiled.split for runner in opt.dispatcher.runners.values() for compiled in runner.compiled.values()]
    return sum(split.saved_bytes for split in splits), loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("remat", ["", " | remat"], ids=["all", "remat"])
@pytest.mark.parametrize("name", CASES)
def test_no_more_is_saved_and_a_step_is_equal(name: str, remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, loss, grads = trained(name, f"canonicalize | fuse{remat}")
    monkeypatch.setattr(residual, "fold", lambda edit, ops: None)
    apart, expected, others = trained(name, f"canonicalize | fuse{remat}")
    assert found <= apart
    assert torch.equal(loss, expected) and grads.keys() == others.keys()
    assert all(same(grads[key], others[key]) for key in grads)


def test_recomputing_from_the_operands_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the second way, the norm's result costs both operands."""
    found, *_ = trained("parallel", "canonicalize | fuse | remat")
    monkeypatch.setattr("fxopt.ir.partition.sources", lambda graph: {})
    monkeypatch.setattr("fxopt.ir.partition.take", lambda graph, saved: [])
    assert trained("parallel", "canonicalize | fuse | remat")[0] > found


def test_the_backward_recomputes_the_norm_alone() -> None:
    make, batch = CASES["handwritten"]
    opt = fxopt.optimize(make(), "canonicalize | fuse | remat", check=False)
    loss_of(opt(**batch())).backward()
    graphs = [c.split.backward.graph for runner in opt.dispatcher.runners.values() for c in runner.compiled.values() if c.split.backward]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    assert "fxopt.add_layer_norm_backward.default" in targets and "fxopt.layer_norm.default" in targets
    assert "fxopt.add_layer_norm.default" not in targets


def test_a_norm_that_nothing_learns_through_stays_apart() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x + self.linear(x)
            with torch.no_grad():
                y = self.norm(total)
            return (y * total).pow(2).mean()

    model = Frozen()
    opt = fxopt.optimize(model, inputs=(X,))
    assert "nothing takes a gradient through the norm's result" in str(opt.report)
    opt(X).backward()
    assert model.norm.weight.grad is None and model.linear.weight.grad.any()
