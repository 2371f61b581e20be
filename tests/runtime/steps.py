"""Optimizers over seeded parameters and gradients, ours and torch's."""

from __future__ import annotations

import io

import torch
from torch import nn

from fxopt.runtime.optim import AdamW

STEPS = 12
SHAPES = ((5,), (3, 7), (), (64, 80), (1, 1), (128, 40), (0, 4), (33,))


def parameters(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params, step, missing=()):
    generator = torch.Generator().manual_seed(1000 + step)
    for place, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = None if place in missing else grad


def of_torch(params, **settings):
    return torch.optim.AdamW(params, **{"lr": 1e-2, "fused": True} | settings)


def of_ours(params, **settings):
    return AdamW(params, **{"lr": 1e-2} | settings)


def run(make, steps=STEPS, missing=lambda step: (), params=None, **settings):
    params = params or parameters()
    optimizer = make(params, **settings)
    for step in range(steps):
        give_gradients(params, step, missing(step))
        optimizer.step()
    return params, optimizer


def assert_equal(mine, theirs):
    """Parameters and states, bit for bit."""
    (params, one), (others, other) = mine, theirs
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
        assert set(one.state[a]) == set(other.state[b])
        for name, value in one.state[a].items():
            assert torch.equal(value, other.state[b][name]), name


def saved(optimizer):
    """The state dict through a file, as safe loading gives it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)
