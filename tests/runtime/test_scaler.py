"""The loss scaler against torch's, its state, and what it refuses."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import CheckError, DataError
from fxopt.ir.capture import Call, capture
from fxopt.ir.facts import LossScale
from fxopt.runtime.scaler import SMALLEST, Scaler, State


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def backward(model: nn.Module, loss_of: object, finite: bool) -> None:
    """One backward with a scaled loss; an overflow is planted in one element of one gradient."""
    x = torch.linspace(-1, 1, 12).view(3, 4)
    loss_of(model(x).square().mean()).backward()  # type: ignore[operator]
    if not finite:
        model.bias.grad[1] = math.inf


@settings(max_examples=15, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 3))
def test_steps_and_scales_are_those_of_torch(pattern: list[bool], interval: int) -> None:
    mine, theirs = layer(), layer()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (mine, theirs)]
    scaler = Scaler(State(scale=8.0, interval=interval))
    oracle = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=interval)
    for finite in pattern:
        backward(mine, scaler.scale, finite)
        backward(theirs, oracle.scale, finite)
        assert scaler.step(optimizers[0]) == finite
        oracle.step(optimizers[1])
        oracle.update()
        assert scaler.state.scale == oracle.get_scale()
        for a, b in zip(mine.parameters(), theirs.parameters()):
            assert torch.equal(a, b)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert scaler.state.skipped == pattern.count(False)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_bad_element_is_seen(value: float) -> None:
    model, scaler = layer(), Scaler()
    model.unused = nn.Parameter(torch.ones(3))  # has no gradient
    model.empty = nn.Parameter(torch.ones(0))
    model.empty.grad = torch.ones(0)
    backward(model, scaler.scale, True)
    assert scaler.unscale_(model.parameters())
    scaler.update(True)
    model.weight.grad[1, 3] = value
    assert not scaler.unscale_(model.parameters())


def test_gradients_of_embeddings_in_rows() -> None:
    table, scaler = nn.Embedding(5, 3, sparse=True), Scaler(State(scale=4.0))
    scaler.scale(table(torch.tensor([1, 1, 2])).sum()).backward()
    assert scaler.unscale_(table.parameters())
    assert torch.equal(table.weight.grad.to_dense().sum(1), torch.tensor([0.0, 6.0, 3.0, 0.0, 0.0]))


def test_a_skipped_step_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, scaler = layer(), Scaler(State(scale=64.0))
    before = [p.clone() for p in model.parameters()]
    backward(model, scaler.scale, False)
    with caplog.at_level(logging.WARNING, logger="fxopt"):
        assert not scaler.step(torch.optim.SGD(model.parameters(), lr=1.0))
    assert "the step is left out, the scale is now 32" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_16_bit_loss_is_scaled_in_fp32() -> None:
    scaled = Scaler().scale(torch.tensor(4.0, dtype=torch.float16))
    assert scaled.dtype == torch.float32 and float(scaled) == 4.0 * 2**16
    assert Scaler().scale(torch.tensor(1.0, dtype=torch.float64)).dtype == torch.float64


def test_state_there_and_back() -> None:
    scaler, other = Scaler(State(scale=256.0, interval=3)), Scaler()
    for finite in (True, False, True, True):
        scaler.update(finite)
    other.load_state_dict(scaler.state_dict())
    assert other.state == scaler.state == State(scale=128.0, interval=3, good=2, skipped=1)
    assert scaler.update(True) == other.update(True) == State(scale=256.0, interval=3, skipped=1)
    with pytest.raises(DataError, match="has the entries"):
        other.load_state_dict({"scale": 1.0})
    for wrong in ({"scale": 0.0}, {"scale": math.inf}, {"backoff": 1.0}, {"growth": 0.5}, {"interval": 0}, {"good": -1}):
        with pytest.raises(DataError, match="no state"):
            other.load_state_dict({**scaler.state_dict(), **wrong})


def test_what_is_refused() -> None:
    model, scaler = layer(), Scaler()
    backward(model, scaler.scale, True)
    scaler.unscale_(model.parameters())
    with pytest.raises(CheckError, match="unscaled already"):
        scaler.unscale_(model.parameters())
    half = nn.Parameter(torch.ones(2, dtype=torch.float16))
    half.grad = torch.ones(2, dtype=torch.float16)
    with pytest.raises(CheckError, match="is in fp16"):
        Scaler().unscale_([half])
    hopeless = Scaler(State(scale=SMALLEST * 2))
    assert hopeless.update(False).scale == SMALLEST
    with pytest.raises(CheckError, match="at any loss scale"):
        hopeless.update(False)
    largest = Scaler(State(scale=2.0**1023, interval=1))
    assert largest.update(True).scale == 2.0**1023


def test_it_starts_where_the_program_was_measured() -> None:
    program = capture(layer(), Call.of((torch.randn(3, 4),), {}))
    assert Scaler.of(program) is None
    found = Scaler.of(program.replace(facts=program.facts | {LossScale(512.0)}))
    assert found is not None and found.state == State(scale=512.0)
