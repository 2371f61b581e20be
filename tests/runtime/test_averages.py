"""The averages of 16-bit parameters, and averages of 8 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from steps import assert_equal, of_ours, parameters, run
from torch import nn

from fxopt.runtime import averages
from fxopt.runtime.averages import SMALLEST_CODED, Coded, Flat, Listed
from fxopt.runtime.optim import AdamW

# -- 16-bit parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_of_16_bit_parameters_count(dtype):
    """Twenty updates of a twentieth of a rounding step each: lost when rounded to nearest, one step on average otherwise."""
    step = torch.finfo(dtype).eps
    moved = {}
    for rounding in ("stochastic", "nearest"):
        params = [nn.Parameter(torch.ones(100, 100, dtype=dtype)), nn.Parameter(torch.ones(7, dtype=dtype))]
        optimizer = AdamW(params, lr=step / 20, weight_decay=0.0, rounding=rounding)
        for _ in range(20):
            for param in params:
                param.grad = torch.full_like(param, -1.0)
            optimizer.step()
        assert all(value.dtype == torch.float32 for param in params for value in optimizer.state[param].values())
        moved[rounding] = float(params[0].detach().double().mean() - 1) / step
    assert moved["nearest"] == 0 and 0.9 < moved["stochastic"] < 1.1


def test_the_seed_decides_the_rounding():
    ends = [run(of_ours, params=parameters(dtype=torch.bfloat16), seed=seed)[0] for seed in (1, 1, 2)]
    assert all(map(torch.equal, ends[0], ends[1]))
    assert not all(map(torch.equal, ends[0], ends[2]))


@pytest.mark.parametrize("settings", [{"bits": 8}, {"rounding": "nearest"}], ids=str)
def test_gathered_and_alone_are_the_same(monkeypatch, settings):
    """Large parameters are stepped where they are, small ones gathered up to a limit."""
    ends = []
    for alone, together in ((1 << 20, 1 << 24), (1, 1), (5000, 1), (1 << 20, 6000)):
        monkeypatch.setattr(averages, "ALONE", alone)
        monkeypatch.setattr(averages, "TOGETHER", together)
        # Whole vectors: ATen rounds the elements of the last, incomplete one differently.
        shapes = ((64, 80), (5, 1024), (64, 72), (64,), (96, 48))
        ends.append(run(of_ours, missing=lambda step: (1,) if step == 3 else (), params=parameters(shapes, torch.bfloat16),
                        **{"rounding": "nearest"} | settings))  # fmt: skip
    for other in ends[1:]:
        assert_equal(ends[0], other)


# -- 8-bit averages


def state_bytes(params, optimizer):
    return sum(value.numel() * value.element_size() for param in params for name, value in optimizer.state[param].items() if name != "step")


def test_eight_bits_are_a_quarter_of_the_memory():
    shapes = ((512, 1024), (4096,), (SMALLEST_CODED - 1,))
    (params, eight), (others, full) = (run(of_ours, steps=1, params=parameters(shapes), bits=bits) for bits in (8, 32))
    for place, ratio in ((0, 3.93), (1, 3.93), (2, 1.0)):
        small, large = state_bytes(params[place : place + 1], eight), state_bytes(others[place : place + 1], full)
        assert large / small > ratio - 0.01
    assert set(eight.state[params[2]]) == {"step", "exp_avg", "exp_avg_sq"}
    coded, plain = (eight._places[params[place]][0] for place in (0, 2))
    assert isinstance(coded, Coded) and isinstance(plain, Listed) and not isinstance(coded, Listed) and isinstance(coded, Flat)
    assert sum(flat.numel() * flat.element_size() for flat in coded.flat) == state_bytes(params[:2], eight)


def trained(make, steps=120):
    """Losses of a small network that learns sums modulo 97 by heart."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(97, 64), nn.Flatten(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 97)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 97, (256, 4), generator=generator)
    y = (x * torch.tensor([1, 2, 3, 5])).sum(1) % 97
    optimizer, losses = make(model.parameters()), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_training_with_eight_bits_follows_full_precision():
    """The loss falls from 4.6 to 1e-4 and is never farther from that of fp32 averages than a learning rate 1% larger leads."""
    full = trained(lambda params: torch.optim.AdamW(params, lr=2e-3))
    eight = trained(lambda params: AdamW(params, lr=2e-3, bits=8))
    larger = trained(lambda params: torch.optim.AdamW(params, lr=2.02e-3))
    assert full[0] > 4 and full[-1] < 1e-3
    assert 0 < (eight - full).abs().max() < (larger - full).abs().max()
