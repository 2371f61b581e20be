"""A small transformer in fp64 that is given padding, its losses, and batches: for the passes that leave rows out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from fxopt.ir.capture import Call, capture
from fxopt.ir.program import Program
from fxopt.passes.pipeline import run
from tests.models import VOCABULARY

BEFORE = "canonicalize | causal(assume=false) | fuse | loss"
WIDTH, HEADS = 16, 2


class Tokens(nn.Module):
    """Learned positions, attention that sees no padding; `head` takes the loss. Returns it and the last states, or what `returns` makes."""

    def __init__(self, head: Callable[..., torch.Tensor], causal: bool = True, added: bool = False, mix: Callable[..., torch.Tensor] | None = None,
                 returns: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(32, WIDTH) * 0.2)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm, self.to_class = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        self.head, self.causal, self.added, self.mix, self.returns = head, causal, added, mix, returns
        self.double()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Any:
        batch, length = ids.shape
        x = self.embed(ids) + self.position[:length]
        places = torch.arange(length)
        allowed = mask[:, None, None, :].bool()
        allowed = allowed & (places[None, :] <= places[:, None]) if self.causal else allowed.expand(-1, -1, length, -1)
        if self.added:
            allowed = torch.zeros_like(allowed, dtype=x.dtype).masked_fill(~allowed, torch.finfo(torch.float64).min)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            x = x + out(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).reshape(batch, length, WIDTH))
            if self.mix is not None:
                x = self.mix(x)
        x = self.norm(x)
        loss = self.head(self, x, mask, labels)
        return (loss, x) if self.returns is None else self.returns(self, loss, x)


def shifted(model: Tokens, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, model.embed.weight)
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


def padded_labels(model: Tokens, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    target = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(F.linear(x, model.embed.weight).view(-1, VOCABULARY), target.view(-1), reduction="sum")


def here(model: Tokens, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, model.embed.weight).view(-1, VOCABULARY), labels.view(-1))


def first_token(model: Tokens, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model.to_class(torch.tanh(x[:, 0])), labels[:, 0] % 5)


def masked_mean(model: Tokens, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(x.dtype)
    pooled = (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    return F.cross_entropy(model.to_class(pooled), labels[:, 0] % 5)


def plain_mean(model: Tokens, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model.to_class(x.mean(1)), labels[:, 0] % 5)


def batch(rows: int, length: int, mask: torch.Tensor | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, a mask and labels that count where the mask is not zero."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, VOCABULARY, (rows, length), generator=generator) for _ in range(2))
    mask = torch.ones_like(ids) if mask is None else mask
    return ids, mask, labels.masked_fill(mask == 0, -100)


def right(lengths: list[int], seq: int) -> torch.Tensor:
    return (torch.arange(seq)[None] < torch.tensor(lengths)[:, None]).long()


def program_of(model: nn.Module, before: str = BEFORE) -> Program:
    """The program of a model of three sequences of seven tokens."""
    return run(before, capture(model, Call.of((), dict(zip(("ids", "mask", "labels"), batch(3, 7), strict=True)))))
