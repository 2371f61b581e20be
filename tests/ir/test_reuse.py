"""In-place reuse: the same values bit for bit, less memory, nothing overwritten that somebody reads later."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
import torch.nn as nn
from hypothesis import given, settings, strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import fxopt
from fxopt.ir import reuse as reuses
from fxopt.ir.reuse import reuse
from fxopt.runtime.memory import Allocations
from tests.models import MODELS, loss_of


def traced(function, *args: torch.Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="symbolic")(*args)


def targets(module: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


X = torch.randn(4, 6)


@pytest.mark.parametrize(("function", "in_place"), [
    (lambda x: ((x + 1) * 2,), 1),  # x is the caller's, x + 1 is not
    (lambda x: (x * 2,), 0),
    (lambda x: (lambda y: (y * 2, y))(x + 1), 0),  # y is returned
    (lambda x: (lambda y: (y * 2 + y,))(x + 1), 1),  # y is read again; y * 2 is not
    (lambda x: (lambda y: (y * 2, y.t()))(x + 1), 0),  # a view of y is returned
    (lambda x: (lambda y: (lambda v: (y * 2 + v.sum(),))(y[0]))(x + 1), 1),  # a view is read later: the product is new, the sum is in it
    (lambda x: (lambda y: (y.t() * y.t(),))(x + 1), 0),
    (lambda x: (lambda y: (y[:4, :4] * y[:4, :4].t() + 1,))(x + 1), 1),
    (lambda x: ((x + 1).to(torch.float64) * 2,), 1),
    (lambda x: ((x + 1) * torch.ones(3, 4, 6),), 1),  # the result is larger than one operand, as large as the other
    (lambda x: ((((x + 1) * 2 - 3).tanh(),)), 3),
    (lambda x: (lambda y: (lambda z: (z * 3 + y,))(y * 2))((x + 1) * 5), 3),  # y is read once more at the end
    (lambda x: (x[0] + (x + 1),), 1),  # the second operand dies
    (lambda x: (torch.sub(x, x + 1),), 0),  # it does, but a difference is no sum
])
def test_what_is_written_in_place(function, in_place: int) -> None:
    module, expected = traced(function, X), function(X)
    assert reuse(module) == in_place, targets(module)
    before = X.clone()
    assert all(torch.equal(a, b) for a, b in zip(module(X), expected, strict=True)) and torch.equal(X, before)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_random_chains_keep_their_values(data: st.DataObject) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x, y]
        for kind, i, j in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append((a + b, a * b, a - b, a.t().contiguous().t(), a.t(), a[:, :], torch.tanh(a), a.clone(), a.relu(), torch.where(a > b, a, b))[kind]
                          if a.shape == b.shape else torch.sigmoid(a))
        return tuple(values[-1 - k % len(values)] for k in kept)

    steps = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=12))
    kept = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    x, y = torch.randn(5, 5), torch.randn(5, 5)
    module = traced(function, x, y)
    expected = function(x, y)
    reuse(module)
    assert all(torch.equal(a, b) for a, b in zip(module(x, y), expected, strict=True))


def test_a_wrong_liveness_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuses, "_dies", lambda operand, *_: operand.op == "call_function")
    module = traced(lambda x: (lambda y: (y * 2 + y,))(x + 1), X)
    assert reuse(module) and not torch.equal(module(X)[0], (X + 1) * 3)


def test_a_plain_chain_needs_less_memory_and_a_second_backward_is_right() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(512))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = (x * self.scale).sigmoid()
            return (((y * 2 - 1) * 0.5 + 3) * 1.5).sum()

    x = torch.randn(512, 512)
    model = Chain()
    opt = fxopt.optimize(model, "canonicalize | remat", inputs=(x,), check=False)
    opt(x).backward()
    with Allocations() as used:
        loss = opt(x)
    assert used.peak < 1.1 * x.numel() * 4  # one tensor, written over and over; without reuse two
    loss.backward(retain_graph=True)
    model.scale.grad = None
    loss.backward()
    first = model.scale.grad.clone()
    model.scale.grad = None
    model(x).backward()
    assert torch.allclose(first, model.scale.grad)


@pytest.mark.parametrize("name", ["gpt2"])
def test_whole_models_are_bitwise_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data = MODELS[name]
    grads = []
    for off in (False, True):
        if off:
            monkeypatch.setattr("fxopt.runtime.region.reuse", lambda module: 0)
        opt = fxopt.optimize(make(), "canonicalize | remat", check=False)
        torch.manual_seed(0)
        loss_of(opt(**data())).backward()
        grads.append([p.grad for p in opt.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
