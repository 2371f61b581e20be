"""The programs that mutants are planted in: captured training steps of small models."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from captured import Captured, family, state_of
from models import bert, gpt2

from fxopt.ir.capture import Call, capture

IDS = 97


class Mixed(nn.Module):
    """What language models do not have: convolutions, statistics of a batch, buffers, ties, scatters, sums over several dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(6, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Linear(8, 5)
        self.scale, self.shift = nn.Parameter(1 + 0.1 * torch.randn(8)), nn.Parameter(0.1 * torch.randn(8))
        self.drop, self.late = nn.Dropout(0.3), nn.Dropout(0.4)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.drop(torch.relu(self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)))
        self.steps.add_(1)
        self.average.mul_(0.9).add_(y.detach().mean((0, 1)), alpha=0.1)
        y = y * self.scale + self.shift - self.average
        y = torch.where(y > 0.5, y, y.square())
        y = y.masked_fill(mask[..., None] == 0, 0.0)
        top = torch.maximum(y, y.flip(1))
        z = top.cumsum(1) / (1 + torch.arange(y.shape[1], device=y.device)[None, :, None])
        weights = torch.softmax(z @ z.transpose(1, 2) / 8**0.5, -1)
        z = self.late(weights @ y) + z.sum(dim=(0, 1)) / (z.shape[0] * z.shape[1]) + y.amax(1, keepdim=True)
        level = z.std(-1, keepdim=True, unbiased=False).detach()
        found = self.out(z / (level + 1e-3)).clamp(-4, 4)
        return F.mse_loss(torch.tanh(found), torch.sin(x[..., :5])) + found.logsumexp(-1).mean(), found


def mixed() -> Captured:
    """`Mixed`, with a mask that leaves out some positions."""
    torch.manual_seed(0)
    model = Mixed().train()
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    call = Call.of((torch.randn(3, 7, 6).requires_grad_(), mask), {})
    return Captured(capture(model, call), call.tensors, state_of(model))


def _tokens(model: nn.Module) -> Captured:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, IDS, (2, 10), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, -100, torch.randint(3, IDS, ids.shape, generator=generator))
    call = Call.of((), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return Captured(capture(model, call), call.tensors, state_of(model))


PROGRAMS: dict[str, Callable[[], Captured]] = {
    "decoder": lambda: family("llama", 2), "decoder with layer norm": lambda: _tokens(gpt2(0.1, layers=1)), "encoder": lambda: _tokens(bert(0.1)), "mixed": mixed,
}


@functools.cache
def program(name: str) -> Captured:
    """A captured program with its inputs and state."""
    return PROGRAMS[name]()
