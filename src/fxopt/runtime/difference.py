"""How far the outputs of two models are apart on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.errors import CheckError
from fxopt.ir.structure import opened
from fxopt.runtime.lazy import LazyOutput
from fxopt.torch_private import pytree

_ROWS = 64  # of logits at a time in fp64: 24 MiB each for 50,000 classes
_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Outputs:
    """What a model returned: its floating point tensors, and which one are the logits (None: none looks like them)."""

    tensors: tuple[torch.Tensor, ...]
    logits: torch.Tensor | None


@dataclass(frozen=True)
class Difference:
    """One model's outputs against another's.

    Attributes:
        relative: ||difference|| / ||output|| of the output that differs most (Frobenius norms).
        largest: largest absolute difference of a logit.
        kl: mean over positions of KL(p || q) in nats, p and q being the softmax of the two models' logits.
        top1: part of the positions at which the two have the same largest logit.
        positions: how many positions that is. 0: there are no logits, and the three numbers above are NaN.
    """

    relative: float
    largest: float
    kl: float
    top1: float
    positions: int

    def __str__(self) -> str:
        if not self.positions:
            return f"relative difference {self.relative:.1e}, no logits"
        return f"largest logit difference {self.largest:.2e}, KL {self.kl:.2e}, top-1 agreement {100 * self.top1:.1f}%, relative difference {self.relative:.1e}"


def outputs(returned: Any) -> Outputs:
    """The floating point tensors that a model returned. The logits are what it calls so, or its first tensor [..., classes]."""
    found = returned.get("logits") if isinstance(returned, Mapping) else getattr(returned, "logits", None)
    tensors = tuple(_plain(leaf) for leaf in pytree.tree_leaves(opened(returned)) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
    logits = _plain(found) if isinstance(found, torch.Tensor) else next((t for t in tensors if t.dim() >= 2 and t.shape[-1] > 1), None)
    return Outputs(tensors, logits)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.value() if isinstance(tensor, LazyOutput) else tensor).detach()


def difference(p: Outputs, q: Outputs) -> Difference:
    """The outputs `q` against the outputs `p`.

    Raises:
        CheckError: they are not the same kind of outputs.
    """
    shapes, others = ([tuple(t.shape) for t in each.tensors] for each in (p, q))
    if shapes != others or (p.logits is None) != (q.logits is None):
        raise CheckError(f"the two models do not return the same outputs: {shapes} and {others}", do="compare them on inputs that both return the same outputs for")
    relative = max((_relative(a, b) for a, b in zip(p.tensors, q.tensors)), default=0.0)
    if p.logits is None or q.logits is None or not p.logits.numel():
        return Difference(relative, float("nan"), float("nan"), float("nan"), 0)
    a, b = (logits.reshape(-1, logits.shape[-1]) for logits in (p.logits, q.logits))
    largest = kl = agreed = 0.0
    for rows, others in zip(a.split(_ROWS), b.split(_ROWS)):
        rows, others = rows.double(), others.double()
        largest = max(largest, float(_gap(rows, others).abs().max()))
        log_p, log_q = rows.log_softmax(-1), others.log_softmax(-1)
        terms = log_p.exp() * (log_p - log_q)
        kl += float(torch.where(log_p == -torch.inf, 0.0, terms).sum())  # a class that p rules out adds nothing
        agreed += int((rows.argmax(-1) == others.argmax(-1)).sum())
    return Difference(relative, largest, max(kl / len(a), 0.0), agreed / len(a), len(a))


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """In the Frobenius norm."""
    gap = norm = 0.0
    for x, y in zip(a.reshape(-1).split(_ELEMENTS), b.reshape(-1).split(_ELEMENTS)):
        x, y = x.double(), y.double()
        gap += float(_gap(x, y).square().sum())
        norm += float(torch.where(x.isfinite(), x, 0.0).square().sum())
    return gap**0.5 / max(norm**0.5, torch.finfo(torch.float64).tiny)


def _gap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a - b; zero where both are the same infinity."""
    return torch.where(a == b, torch.zeros_like(a), a - b)
