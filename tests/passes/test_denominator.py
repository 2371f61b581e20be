"""The denominator of a loss: any split of a batch gives its gradient, and what has none is refused where it mixes samples."""

from __future__ import annotations

from collections.abc import Callable
import functools

from hypothesis import given, strategies as st
import models
import pytest
from splits import BATCH, CLASSES, EXACT, LENGTH, QUICK, WIDTH, assert_split_is_whole, batch, fact, gradients, reason, split
import torch
import torch.nn as nn
import torch.nn.functional as F

from fxopt.ir.capture import Call, capture
from fxopt.ir.program import Program
from fxopt.passes.pipeline import run



class Net(nn.Module):
    """Two linears and a loss given as a function of (logits, labels, mask)."""

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.loss = nn.Linear(WIDTH, 12), nn.Linear(12, CLASSES), loss
        self.register_buffer("weights", torch.rand(CLASSES) + 0.5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.down(F.silu(self.up(x)))
        return {"loss": self.loss(self, logits, labels, mask), "logits": logits}


def rows(net: Net, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")


def token_mean(net, logits, labels, mask):
    return F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))


def weighted_classes(net, logits, labels, mask):
    return F.cross_entropy(logits.transpose(1, 2), labels, weight=net.weights)


def smoothed_with_z(net, logits, labels, mask):
    kept = labels != -100
    z = (logits.logsumexp(-1).square() * kept).sum() / kept.sum()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1) + 1e-2 * z


def masked_mean(net, logits, labels, mask):
    return (rows(net, logits, labels) * mask).sum() / mask.sum()


def clamped_mean(net, logits, labels, mask):
    return (rows(net, logits, labels) * mask).sum() / mask.sum().clamp(min=1) * 0.5


def epsilon_inside(net, logits, labels, mask):
    return (rows(net, logits, labels) * (mask / (mask.sum() + 1e-3))).sum()


def regression(net, logits, labels, mask):
    return F.mse_loss(logits, labels[..., None].expand(-1, -1, CLASSES).to(logits.dtype))


def mean_of_means(net, logits, labels, mask):
    return rows(net, logits, labels).mean(1).mean()


def last_token(net, logits, labels, mask):
    return F.nll_loss(logits[:, -1].log_softmax(-1), labels[:, -1].clamp(min=0))


def by_batch_size(net, logits, labels, mask):
    return rows(net, logits, labels).sum() / logits.shape[0]


def plain_sum(net, logits, labels, mask):
    return rows(net, logits, labels).sum() * 0.25


def with_decay(net, logits, labels, mask):
    return token_mean(net, logits, labels, mask) + 1e-2 * net.up.weight.square().sum()


def probabilities(net, logits, labels, mask):
    return F.cross_entropy(logits.flatten(0, 1), F.one_hot(labels.clamp(min=0), CLASSES).to(logits.dtype).flatten(0, 1))


DERIVED = [token_mean, weighted_classes, smoothed_with_z, masked_mean, clamped_mean, epsilon_inside, regression, mean_of_means, last_token, by_batch_size, plain_sum,
           with_decay, probabilities]


@functools.cache
def captured(loss: Callable[..., torch.Tensor]) -> tuple[Net, Program]:
    net = Net(loss).double()
    return net, run("canonicalize | denominator", capture(net, Call.of((), batch())))


def ragged(draw: st.DrawFn, total: int) -> list[int]:
    """Sizes of one or more that add up to `total`."""
    cuts = draw(st.sets(st.integers(1, total - 1), min_size=1))
    ends = [0, *sorted(cuts), total]
    return [b - a for a, b in zip(ends, ends[1:])]


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], int, float, int]:
    """Sizes of the parts, a seed and a share of ignored labels, and how many leading samples have no label at all."""
    return ragged(draw, BATCH), draw(st.integers(0, 99)), draw(st.sampled_from((0.0, 0.4, 0.9))), draw(st.integers(0, BATCH - 1))


@pytest.mark.parametrize("loss", DERIVED, ids=lambda loss: loss.__name__)
def test_any_split_has_the_gradient_of_the_whole(loss: Callable) -> None:
    net, program = captured(loss)
    by = fact(program)

    @QUICK
    @given(splits())
    def check(drawn: tuple[list[int], int, float, int]) -> None:
        sizes, seed, ignored, empty = drawn
        whole = batch(seed, ignored)
        whole["labels"][:empty] = -100
        whole["labels"][-1, -1] = 0
        whole["mask"] = (whole["labels"] != -100).double()
        assert_split_is_whole(net, by, lambda part: net(**part)["loss"], whole, sizes)

    check()


def test_equal_weights_would_not_do() -> None:
    """The check can fail: with weights of 1/n the split is off."""
    net, program = captured(token_mean)
    whole = batch()
    whole["labels"][0, :-1] = -100
    by = fact(program)
    measured = by.measure(list(whole.values()), {})
    assert measured == [int((whole["labels"] != -100).sum())]
    parts = split(whole, [1, 5])
    wrong = sum(gradients(net(**part)["loss"] / 2, net) for part in parts)
    expected = gradients(net(**whole)["loss"], net)
    assert (wrong - expected).abs().max() > EXACT * expected.abs().max()


# -- what is refused -----------------------------------------------------------------------------------------------------


class Contrastive(nn.Module):
    """The symmetric loss of pairs: every sample against all others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = F.normalize(self.a(x), dim=-1), F.normalize(self.b(y), dim=-1)
        return F.cross_entropy(a @ b.T, torch.arange(x.shape[0]))


def test_contrastive_and_batch_norm_are_refused_by_place() -> None:
    found = reason(Contrastive(), torch.randn(4, WIDTH), torch.randn(4, WIDTH))
    assert "multiplies different samples" in found.reason and found.where.startswith("matmul") and "test_denominator.py" in found.where
    found = reason(models.convnet(), **models.images())
    assert "batch norm in training mode" in found.reason and "stem.1" in found.where


class Function(nn.Module):
    """A loss written as a function of features [batch, length, classes] and a mask [batch, length]."""

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(WIDTH, CLASSES), loss

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.loss(self.linear(x), mask)


@pytest.mark.parametrize(("loss", "message", "node"), [
    (lambda y, m: (y - y.mean(0)).square().mean(), "each sample reads", "sub"),
    (lambda y, m: y.softmax(0).mean(), "taken over the samples", "softmax"),
    (lambda y, m: y.mean((0, 1)).square().sum(), "no longer a sum", "square"),
    (lambda y, m: y.mean() * y.square().mean(), "no longer a sum", "mul"),
    (lambda y, m: y.square().mean().sqrt(), "no longer a sum", "sqrt"),
    (lambda y, m: y.std(0).mean(), "taken over the samples", "std"),
    (lambda y, m: y[0].square().mean(), "single samples", "select"),
    (lambda y, m: y[1:].square().mean(), "some of the samples", "slice"),
    (lambda y, m: (y.flip(0) * y).mean(), "taken over the samples", "flip"),
    (lambda y, m: y.transpose(0, 1).reshape(y.shape).square().mean() + (y * y.transpose(0, 1).reshape(y.shape)).mean(), "several samples", "reshape"),
    (lambda y, m: (y.square().mean(-1) * m).sum() / m.sum() + y.mean(), "different counts", ""),
    (lambda y, m: ((y.square().mean(-1) * m).sum(0) / m.sum(0)).mean(), "no longer a sum", "div"),
    (lambda y, m: (y.square().mean(-1) * m).sum() / (m.sum() + y.sum()), "no longer a sum", "div"),
    (lambda y, m: y.square().mean(-1).amax(), "taken over the samples", "amax"),
    (lambda y, m: torch.cdist(y.mean(1), y.mean(1)).mean(), "not known", "cdist"),
    (lambda y, m: (y * torch.arange(y.shape[0])[:, None, None]).mean(), "place of a sample", "mul"),
    (lambda y, m: (y.mean(1).T @ y.mean(1)).mean(), "multiplies different samples", "matmul"),
    (lambda y, m: torch.einsum("bsc,bsd->cd", y, y).mean(), "multiplies different samples", "einsum"),
    (lambda y, m: y.square().sum() / m.sum().expand(y.shape[0]).sum(), "repeats for each sample", "expand"),
    (lambda y, m: y.square().sum() / torch.full((), y.shape[0]), "made a value", "full"),
    (lambda y, m: (y * torch.full((3, 1, 1), y.shape[0]).sum()).mean(), "made a value", "full"),
], ids=range(21))
def test_what_mixes_samples_is_named(loss: Callable, message: str, node: str) -> None:
    found = reason(Function(loss), torch.randn(BATCH, LENGTH, WIDTH), torch.rand(BATCH, LENGTH))
    assert message in found.reason and found.where.startswith(node), found
