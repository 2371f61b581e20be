"""loss: random chains of what programs do between a head and a loss, against the program before: all results and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from captured import Captured, data, function, weight

from fxopt.errors import CheckError
from fxopt.ir.edit import Edit
from fxopt.passes.loss import Loss

BATCH, LENGTH, WIDTH = 2, 5, 8
ROWS = {
    "view": lambda z, y: (z.view(-1, z.shape[-1]), y.view(-1)),
    "flatten": lambda z, y: (z.flatten(0, 1), y.flatten()),
    "shift": lambda z, y: (z[:, :-1].reshape(-1, z.shape[-1]), y[:, 1:].reshape(-1)),
    "shift, contiguous": lambda z, y: (z[..., :-1, :].contiguous().view(-1, z.shape[-1]), y[..., 1:].contiguous().view(-1)),
    "classes second": lambda z, y: (z.transpose(1, 2), y),
}
LOSSES = ("cross_entropy", "nll_loss", "log of softmax", "gathered", "gathered late")
STEPS = {
    "double": lambda z: z * 2.0, "negate": lambda z: z * -0.5, "halve": lambda z: z / 2.0, "cap": lambda z: torch.tanh(z / 3.0) * 3.0,
    "whole": lambda z: z[:], "contiguous": lambda z: z.contiguous(),
}
Z_LOSSES = ("none", "all", "masked", "masked by sums", "chosen")
READS = ("accuracy", "log-probabilities", "entropy", "logits", "trained entropy", "loss alone")


@dataclass(frozen=True)
class Chain:
    """One program: see the tables above. ignored: the label that costs nothing, or None where all rows have one."""

    classes: int = 19
    head: str = "linear"
    steps: tuple[str, ...] = ()
    rows: str = "view"
    loss: str = "cross_entropy"
    reduction: str = "mean"
    ignored: int | None = -100
    smoothing: float = 0.0
    z_loss: str = "none"
    reads: tuple[str, ...] = ()
    keep: bool = False

    def labels(self) -> torch.Tensor:
        """[batch, length], a third of them ignored."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, self.classes, (BATCH, LENGTH), generator=generator)
        hidden = torch.rand(BATCH, LENGTH, generator=generator) < 0.4
        return labels if self.ignored is None else torch.where(hidden, self.ignored, labels)

    def run(self, h: torch.Tensor, y: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The loss, and what else is read."""
        h = h + (y[..., None] < -1000)
        z = F.linear(h, w, b if self.head == "bias" else None)
        z = {"late bias": lambda: z + b, "none": lambda: torch.relu(z), "product": lambda: h @ w.t()}.get(self.head, lambda: z)()
        for step in self.steps:
            z = STEPS[step](z)
        return self._losses(*ROWS[self.rows](z, y), z)

    def _losses(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ignored = -100 if self.ignored is None else self.ignored
        kept, filled = y != ignored, y if self.ignored is None else torch.where(y == ignored, 0, y)
        options = {"ignore_index": ignored, "reduction": self.reduction}
        dim = 1
        log_p = torch.log(torch.softmax(x, dim)) if self.loss == "log of softmax" else F.log_softmax(x, dim)
        if self.loss == "cross_entropy":
            loss = F.cross_entropy(x, y, label_smoothing=self.smoothing, **options)
        elif "gathered" not in self.loss:
            loss = F.nll_loss(log_p, y, **options)
        elif self.loss == "gathered":
            loss = (log_p.gather(dim, filled.unsqueeze(dim)).squeeze(dim) * -kept.float()).mean()
        else:
            loss = ((x.logsumexp(dim) - x.gather(dim, filled.unsqueeze(dim)).squeeze(dim)) * kept).sum()
        if self.z_loss != "none":
            loss = loss + 0.01 * self._z_loss(x.logsumexp(dim), kept)
        if loss.dim():
            loss = (loss * torch.linspace(0.5, 1.5, loss.shape[-1])).mean()
        picked = F.log_softmax(x.detach(), dim).gather(dim, filled.unsqueeze(dim)).squeeze(dim)
        entropy = -(x.log_softmax(dim) * x.softmax(dim)).sum(dim)
        found = {
            "accuracy": lambda: (x.argmax(dim) == y).sum(), "log-probabilities": lambda: picked * kept, "entropy": lambda: (entropy.detach() * kept).sum(),
            "logits": lambda: z, "trained entropy": lambda: entropy.mean(), "loss alone": lambda: loss.detach(),
        }
        return loss, *(found[name]() for name in self.reads)

    def _z_loss(self, lse: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        square = lse**2
        if self.z_loss == "masked by sums" and self.reduction == "mean":
            return (square * kept).sum() / kept.sum()
        if self.z_loss == "chosen" and self.reduction != "none":
            square = square[kept]
        elif self.z_loss != "all":
            square = square * kept
        return {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}[self.reduction](square)

    def captured(self) -> Captured:
        """The program, canonical."""
        return function(self.run, data(BATCH, LENGTH, WIDTH), self.labels(), w=weight(self.classes, WIDTH), b=weight(self.classes, seed=4)).after("canonicalize")


def chains() -> st.SearchStrategy[Chain]:
    one = st.sampled_from
    return st.builds(
        Chain, classes=one((19, 19, 2048)), head=one(("linear", "linear", "bias", "late bias", "product", "none")), steps=st.lists(one(tuple(STEPS)), max_size=3).map(tuple),
        rows=one(tuple(ROWS)), loss=one(LOSSES), reduction=one(("none", "sum", "mean")), ignored=one((None, -100, 4)), smoothing=one((0.0, 0.1)),
        z_loss=one(Z_LOSSES), reads=st.lists(one(READS), max_size=2, unique=True).map(tuple), keep=st.booleans(),
    )


OPS = ("linear_cross_entropy", "cross_entropy")
PLAIN = ("cross_entropy_loss", "nll_loss_nd")


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(chain=chains())
@example(Chain(steps=("halve", "cap"), rows="shift", smoothing=0.1, z_loss="masked by sums", reads=("accuracy", "logits")))
@example(Chain(loss="gathered late", ignored=None, reads=("entropy", "log-probabilities")))
@example(Chain(classes=2048, head="none", rows="classes second", loss="nll_loss", reduction="none", ignored=4, z_loss="masked"))
def test_chains(chain: Chain) -> None:
    before = chain.captured()
    after = before.check(Loss(logits="keep" if chain.keep else "lazy"))
    assert sum(len(after.calls(op)) for op in OPS) or after.misses, "nothing fired, and nothing is said"
    left = sum(len(after.calls(op)) for op in PLAIN)
    assert not left or after.misses, "a loss is left, and nothing is said"


@dataclass(frozen=True)
class Blind(Loss):
    """The planted fault: no label is ignored."""

    def run(self, edit: Edit) -> None:
        super().run(edit)
        for node in edit.nodes:
            place = {"fxopt.linear_cross_entropy.default": 4, "fxopt.cross_entropy.default": 2}.get(str(node.target))
            if place is not None:
                edit.set_args(node, (*node.args[:place], -7, *node.args[place + 1 :]))


@pytest.mark.parametrize("classes", [19, 2048])
def test_a_wrong_label_would_show(classes: int) -> None:
    with pytest.raises(CheckError, match="differs"):
        Chain(classes=classes, head="none" if classes == 2048 else "linear", ignored=4).captured().check(Blind())
