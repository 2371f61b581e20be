"""loss: what else a program reads of the logits: z-losses, accuracy, log-probabilities and entropy as results of the op."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from captured import Captured, data, function, weight

import fxopt
from fxopt.errors import CaptureError, CheckError
from fxopt.ir.edit import Edit
from fxopt.ir.program import Lazy
from fxopt.passes.logits import NEVER
from fxopt.passes.loss import Loss
from fxopt.runtime.lazy import LazyOutput

H, W, B = data(2, 6, 8), weight(19, 8), weight(19, seed=4)
CLEAN = torch.randint(0, 19, (2, 6), generator=torch.Generator().manual_seed(3))
LABELS = CLEAN.index_fill(1, torch.tensor([1, 4]), -100)
CE = F.cross_entropy


def given(captured: Captured) -> dict[str, object]:
    """The arguments of the one fused loss, by name."""
    (node,) = captured.calls("linear_cross_entropy")
    return {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args)}


def fused(fn, labels=LABELS, pass_: Loss | None = None) -> Captured:
    """A program of hidden states, labels and logits of a head after `loss`, values and gradients compared."""
    return function(lambda h, y, w: fn(y, F.linear(h + (y[..., None] < -1000), w)), H, labels, w=W).after("canonicalize").check(pass_ or Loss())


def lse(z):
    return z.logsumexp(-1)


# -- z-loss ----------------------------------------------------------------------------------------------------------

FOLDED = {
    "masked mean": lambda y, z: CE(z.view(-1, 19), y.view(-1)) + 1e-2 * ((lse(z) ** 2 * (y != -100)).sum() / (y != -100).sum()),
    "masked mean in floats": lambda y, z: CE(z.view(-1, 19), y.view(-1)) + ((m := (y != -100).float()) * lse(z).square()).sum() / m.sum().clamp(min=1) * 1e-2,
    "chosen rows": lambda y, z: CE(z.view(-1, 19), y.view(-1)) + 1e-2 * (lse(z)[y != -100] ** 2).mean(),
    "summed": lambda y, z: CE(z.view(-1, 19), y.view(-1), reduction="sum") + 1e-2 * lse(z).pow(2).masked_fill(y < 0, 0.0).sum(),
    "of a sum, divided": lambda y, z: CE(z.view(-1, 19), y.view(-1), reduction="sum") / (n := y.numel()) + 1e-2 * (lse(z).pow(2) * (y >= 0)).sum() / n,
    "of a sum, divided by a tensor": lambda y, z: CE(z.view(-1, 19), y.view(-1), reduction="sum") / (n := (y >= 0).sum()) + 1e-2 * (lse(z).pow(2) * (y >= 0)).sum() / n,
    "by rows": lambda y, z: (CE(z.view(-1, 19), (y := y.view(-1)), reduction="none") + 1e-2 * lse(z).view(-1) ** 2 * (y != -100)).mean(),
    "where": lambda y, z: CE(z.view(-1, 19), y.view(-1), reduction="sum") + 1e-2 * torch.where(y != -100, lse(z) ** 2, 0.0).sum(),
    "multiplied by itself": lambda y, z: CE(z.view(-1, 19), y.view(-1)) + 1e-2 * ((s := lse(z)[y != -100]) * s).mean(),
    "alpha": lambda y, z: torch.add(CE(z.view(-1, 19), y.view(-1)), (lse(z)[y != -100] ** 2).mean(), alpha=1e-2),
    "no label is ignored": lambda y, z: CE(z.view(-1, 19), (y := y.clamp(min=0)).view(-1)) + 1e-2 * (lse(z) ** 2).mean(),
    "behind another term": lambda y, z: (CE(z.view(-1, 19), y.view(-1)) + y.float().mean()) * 2.0 + 2e-2 * (lse(z)[y != -100] ** 2).mean(),
    "shifted": lambda y, z: CE((s := z[:, :-1]).reshape(-1, 19), (t := y[:, 1:]).reshape(-1)) + 1e-2 * (lse(s)[t != -100] ** 2).mean(),
    "shifted late": lambda y, z: CE(z[:, :-1].reshape(-1, 19), y[:, 1:].reshape(-1)) + 1e-2 * (lse(z)[:, :-1][(y != -100)[:, 1:]] ** 2).mean(),
    "capped": lambda y, z: CE((c := torch.tanh(z / 3.0) * 3.0).view(-1, 19), y.view(-1)) + 1e-2 * (lse(c)[y != -100] ** 2).mean(),
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_z_loss_is_folded(name: str) -> None:
    captured = fused(FOLDED[name])
    assert given(captured)["z_loss"] == pytest.approx(1e-2)
    assert not captured.calls("logsumexp") and captured.rules == {"head and loss": 1, "z-loss": 1} and not captured.misses


APART = {
    "all rows": (lambda y, z: CE(z.view(-1, 19), y.view(-1)) + 1e-2 * (lse(z) ** 2).mean(), "rows whose label is -100 count in it"),
    "masked, over all": (lambda y, z: CE(z.view(-1, 19), y.view(-1)) + 1e-2 * (lse(z) ** 2 * (y != -100)).mean(), "its mean is over all rows"),
    "another mask": (lambda y, z: CE(z.view(-1, 19), y.view(-1)) + 1e-2 * (lse(z)[y != 3] ** 2).mean(), "not known to be the rows with a label"),
    "other labels": (lambda y, z: CE(z.view(-1, 19), y.view(-1)) + 1e-2 * (lse(z)[y.flip(1) != -100] ** 2).mean(), "not known to be the rows with a label"),
    "the mask of other rows": (lambda y, z: CE(z[:, 1:].reshape(-1, 19), y[:, 1:].reshape(-1)) + 1e-2 * (lse(z[:, 1:])[y[:, :-1] != -100] ** 2).mean(), "not known to be"),
    "another number": (lambda y, z: CE(z.view(-1, 19), y.view(-1)) + 1e-2 * (lse(z) ** 2 * (y != -100)).sum() / (y != 3).sum(), "the number of rows with a label"),
    "other rows": (lambda y, z: CE(z[:, 1:].reshape(-1, 19), y[:, 1:].reshape(-1)) + 1e-2 * (lse(z)[y != -100] ** 2).mean(), "of other logits"),
    "other logits": (lambda y, z: CE((z * 2.0).view(-1, 19), y.view(-1)) + 1e-2 * (lse(z)[y != -100] ** 2).mean(), "of other logits"),
    "another reduction": (lambda y, z: CE(z.view(-1, 19), y.view(-1)) + 1e-2 * (lse(z) ** 2 * (y != -100)).sum(), "its reduction is sum"),
    "every pair of rows": (lambda y, z: CE(z.view(-1, 19), y.view(-1), reduction="sum") + 1e-3 * (lse(z).view(-1) ** 2 * (y != -100).view(-1, 1)).sum(), "also reach the loss"),
    "the square of a sum": (lambda y, z: CE(z.view(-1, 19), y.view(-1), reduction="sum") + 1e-3 * (lse(z) * (y != -100)).sum() ** 2, "also reach the loss"),
    "the loss is read without it": (lambda y, z: ((a := CE(z.view(-1, 19), y.view(-1))) + 1e-2 * (lse(z)[y != -100] ** 2).mean(), a.detach()), "without it"),
}


@pytest.mark.parametrize("name", APART)
def test_a_z_loss_that_stays(name: str) -> None:
    fn, reason = APART[name]
    captured = fused(fn)
    assert captured.calls("logsumexp") and any(reason in said for said in captured.misses), captured.misses
    assert not captured.calls("linear_cross_entropy") and not captured.calls("cross_entropy"), "the logits must exist, of 19 classes"


def test_a_z_loss_that_is_returned_is_lazy() -> None:
    def fn(y, z):
        extra = 1e-2 * (lse(z)[y != -100] ** 2).mean()
        return CE(z.view(-1, 19), y.view(-1)) + extra, extra.detach()

    captured = fused(fn)
    assert given(captured)["z_loss"] == 1e-2
    assert [fact.index for fact in captured.program.facts if isinstance(fact, Lazy)] == [1]


# -- statistics ------------------------------------------------------------------------------------------------------


def loss(y, z):
    return CE(z.view(-1, 19), y.view(-1))


def chosen(y, z):
    return F.log_softmax(z, -1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def entropy(z):
    return -((p := z.log_softmax(-1)).exp() * p).sum(-1)


# name: program, labels, statistics
SERVED = {
    "accuracy": (lambda y, z: (loss(y, z), (z.argmax(-1) == y).float().mean()), LABELS, "correct"),
    "accuracy of rows": (lambda y, z: (loss(y, z), ((z.view(-1, 19).argmax(1) == y.view(-1)) & (y.view(-1) != -100)).sum() / (y != -100).sum()), LABELS, "correct"),
    "accuracy by max": (lambda y, z: (loss(y, z), y.eq(z.detach().max(-1)[1]).sum()), LABELS, "correct"),
    "accuracy first": (lambda y, z: ((z.softmax(-1).argmax(-1) == y).sum(), loss(y, z)), LABELS, "correct"),
    "accuracy, shifted late": (lambda y, z: (CE(z[:, :-1].reshape(-1, 19), y[:, 1:].reshape(-1)), (z.argmax(-1)[:, :-1] == y[:, 1:]).sum()), LABELS, "correct"),
    "accuracy of capped": (lambda y, z: (CE((torch.tanh(z / 3) * 3).view(-1, 19), y.view(-1)), (z.argmax(-1) == y).sum()), LABELS, "correct"),
    "log-probabilities": (lambda y, z: (loss(y, z), (chosen(y, z) * (y != -100)).sum().detach()), LABELS, "log_prob"),
    "losses": (lambda y, z: (loss(y, z), CE(z.detach().view(-1, 19), y.view(-1), reduction="none")), LABELS, "log_prob"),
    "log-probabilities, no label ignored": (lambda y, z: (loss(y, z), z.detach().log_softmax(-1).gather(-1, y[..., None])), CLEAN, "log_prob"),
    "log-probabilities by sums": (lambda y, z: (loss(y, z), (z.gather(-1, y[..., None]).squeeze(-1) - lse(z)).detach()), CLEAN, "log_prob"),
    "entropy": (lambda y, z: (loss(y, z), torch.where(y != -100, entropy(z), 0.0).sum().detach()), LABELS, "entropy"),
    "entropy, no label ignored": (lambda y, z: (-chosen(y, z).mean(), entropy(z.detach())), CLEAN, "entropy"),
    "entropy by softmax": (lambda y, z: (-chosen(y, z).mean(), (F.softmax(z, -1) * -F.log_softmax(z, -1)).sum(-1).detach()), CLEAN, "entropy"),
    "all three": (lambda y, z: (-chosen(y, z).mean(), entropy(z.detach()).mean(), (z.argmax(-1) == y.clamp(min=0)).sum()), CLEAN, "entropy correct"),
}


@pytest.mark.parametrize("name", SERVED)
def test_statistics_are_results_of_the_op(name: str) -> None:
    fn, labels, wanted = SERVED[name]
    captured = fused(fn, labels)
    got = given(captured)
    assert " ".join(name for name, on in zip(("log_prob", "entropy", "correct"), got["statistics"]) if on) == wanted
    assert not any(isinstance(fact, Lazy) for fact in captured.program.facts) and not captured.calls("linear")


def test_without_gradients() -> None:
    def fn(y, z):
        with torch.no_grad():
            return (z.argmax(-1) == y).sum(), -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)

    captured = fused(lambda y, z: (-chosen(y, z).mean(), *fn(y.clamp(min=0), z)))
    assert given(captured)["statistics"] == [False, True, True] and not captured.calls("softmax")


LAZY = {
    "other labels": (lambda y, z: (loss(y, z), (z.argmax(-1) == y.flip(1)).sum()), "at other labels"),
    "shifted": (lambda y, z: (loss(y, z), (z[:, 1:].argmax(-1) == y[:, :-1]).sum()), None),
    "an ignored class": (lambda y, z: (CE(z.view(-1, 19), y.clamp(min=0).view(-1), ignore_index=0), (z.argmax(-1) == y.clamp(min=0)).sum()), "rows without a label"),
    "other logits": (lambda y, z: (loss(y, z), (entropy(z * 2.0) * (y != -100)).detach()), None),
    "rows without a label": (lambda y, z: (loss(y, z), entropy(z.detach())), "rows without a label"),
    "log-probabilities without a label": (lambda y, z: (loss(y, z), chosen(y, z).detach()), "rows without a label"),
    "a gradient": (lambda y, z: (loss(y, z), (entropy(z) * (y != -100)).sum()), "a gradient may flow"),
    "negative": (lambda y, z: (CE((z * -2.0).view(-1, 19), y.view(-1)), (z.argmax(-1) == y).sum()), "negative"),
    "over another dimension": (lambda y, z: (loss(y, z), (z.argmax(1)[:, :6] == y[:, :1]).sum()), None),
}


@pytest.mark.parametrize("name", LAZY)
def test_what_is_no_statistic_is_computed_when_it_is_read(name: str) -> None:
    fn, reason = LAZY[name]
    captured = fused(fn)
    assert given(captured)["statistics"] == [False] * 3 and [fact.index for fact in captured.program.facts if isinstance(fact, Lazy)] == [1]
    assert captured.misses == [] if reason is None else any(reason in said for said in captured.misses), captured.misses


def test_an_entropy_in_the_loss_needs_the_logits() -> None:
    captured = fused(lambda y, z: loss(y, z) + 0.1 * (entropy(z) * (y != -100)).mean())
    assert captured.calls("linear") and any("also reach the loss" in said for said in captured.misses)


def test_chosen_log_probabilities_train() -> None:
    """A policy gradient: the log-probabilities are the loss's input, old ones a constant."""

    def fn(y, z):
        logp = chosen(y, z / 0.7)
        ratio = (logp - logp.detach()).exp()
        return -(torch.min(ratio * 0.3, ratio.clamp(0.8, 1.2)) * (y != -100)).sum() / (y != -100).sum(), logp

    got = given(fused(fn))
    assert got["reduction"] == "none" and got["logit_scale"] == pytest.approx(1 / 0.7) and got["statistics"] == [False] * 3


@pytest.mark.parametrize("fill", ["clamp", "where", "masked_fill", "shifted"])
def test_filled_labels_that_are_masked_never_reach_the_head(fill: str) -> None:
    """A preference loss: log-probabilities of answers, summed over their tokens."""

    def fn(y, z):
        if fill == "shifted":
            z, y = z[:, :-1], y[:, 1:]
        filled = {"clamp": y.clamp(min=0), "where": torch.where(y != -100, y, 0), "masked_fill": y.masked_fill(y == -100, 0)}.get(fill, y.clamp(min=0))
        sums = (z.log_softmax(-1).gather(-1, filled.unsqueeze(-1)).squeeze(-1) * (y != -100)).sum(-1)
        return -F.logsigmoid(sums[0] - sums[1]), (z.argmax(-1) == y).sum()

    got = given(fused(fn))
    assert (got["ignore_index"], got["reduction"], got["statistics"]) == (-100, "none", [False, False, True])


def test_filled_labels_that_are_read_stay() -> None:
    got = given(fused(lambda y, z: (chosen(y, z) * (y != 3)).sum()))
    assert got["ignore_index"] < -100
    got = given(fused(lambda y, z: (chosen(y, z).exp() * (y != -100)).sum()))
    assert got["ignore_index"] < -100


MASKED = {
    "mean": lambda y, p: -p.mean(),
    "masked": lambda y, p: -(p * (m := y != -100)).sum() / m.sum(),
    "masked in floats, returned": lambda y, p: (-((m := (y != -100).float()) * p).sum() / m.sum(), (p * m).detach()),
}


@pytest.mark.parametrize("name", MASKED)
def test_gathered_at_labels_of_other_sizes(name: str) -> None:
    """Nothing ties the sizes of the labels to those of the logits: gather reads the first rows, as many as there are labels."""
    captured = function(lambda h, y, w: MASKED[name](y, chosen(y, F.linear(h, w))), H, LABELS[:, :5], w=W).after("canonicalize").check(Loss())
    got = given(captured)
    assert got["reduction"] == "none" and len(captured.calls("slice")) == 2 and not captured.calls("log_softmax") and not captured.misses
    assert got["ignore_index"] == (-100 if name != "mean" else NEVER)


def test_log_probabilities_at_the_labels_of_the_loss() -> None:
    """As many labels as rows, and none of more rows than there are: the sizes must be the same."""
    captured = function(lambda h, y, w: (loss(y, z := F.linear(h, w)), (chosen(y, z) * (y != -100)).detach()), H, LABELS, w=W)
    captured = captured.after("canonicalize").check(Loss())
    assert given(captured)["statistics"] == [True, False, False] and not captured.misses


def test_log_probabilities_of_the_same_rows() -> None:
    def fn(h, y, w):
        z, m = F.linear(h, w), y != -100
        return -(chosen(y, z) * m).sum() / m.sum(), chosen(y, z.detach()) * m

    captured = function(fn, H, LABELS[:, :5], w=W).after("canonicalize").check(Loss())
    assert given(captured)["statistics"] == [True, False, False] and not captured.misses


def test_an_entropy_of_more_rows_than_the_loss_is_apart() -> None:
    captured = function(lambda h, y, w: (-chosen(y, z := F.linear(h, w)).mean(), entropy(z.detach())), H, LABELS[:, :5], w=W)
    captured = captured.after("canonicalize").check(Loss())
    assert given(captured)["statistics"] == [False] * 3 and any("fewer rows" in said for said in captured.misses)


class Scored(nn.Module):
    """Log-probabilities of the labels that are given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(19, 8), nn.Linear(8, 19)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return chosen(labels, self.head(self.embed(ids)))


def test_labels_of_any_sizes_that_gather_takes() -> None:
    eager = Scored().train()
    opt = fxopt.optimize(copy.deepcopy(eager), "loss", inputs={"ids": CLEAN, "labels": LABELS})
    assert "head and loss" in str(opt.report) and "select some" not in str(opt.report)
    for ids, labels in ((CLEAN, LABELS), (CLEAN[:, :5], LABELS[:, :3]), (CLEAN.repeat(2, 1), LABELS)):
        results = []
        for model in (eager, opt):
            model.zero_grad()
            results.append(model(ids=ids, labels=labels))
            results[-1].square().sum().backward()
        torch.testing.assert_close(*results)
        for mine, theirs in zip(opt.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    with pytest.raises(CaptureError, match="no larger than"):
        opt(ids=CLEAN[:, :5], labels=LABELS)


@dataclasses.dataclass(frozen=True)
class Wrong(Loss):
    """The planted fault: one argument of the op is another."""

    place: int = 9
    value: object = 0.0

    def run(self, edit: Edit) -> None:
        super().run(edit)
        for node in edit.nodes:
            if str(node.target) == "fxopt.linear_cross_entropy.default":
                edit.set_args(node, (*node.args[: self.place], self.value, *node.args[self.place + 1 :]))


def test_a_wrong_result_would_show() -> None:
    with pytest.raises(CheckError, match="differs"):
        fused(FOLDED["masked mean"], pass_=Wrong())
    with pytest.raises(CheckError, match="differs"):
        fused(SERVED["entropy, no label ignored"][0], CLEAN, Wrong(place=8, value=2.0))


class Trained(nn.Module):
    """A head over tokens that returns its loss with z-loss, its accuracy and entropy, and its logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(19, 8), nn.Linear(8, 19)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.head(torch.tanh(self.embed(ids)))
        kept = labels != -100
        with torch.no_grad():
            correct = (z.argmax(-1) == labels).sum() / kept.sum()
            spread = (entropy(z) * kept).sum() / kept.sum()
        return {"loss": loss(labels, z) + 1e-2 * (lse(z)[kept] ** 2).mean(), "accuracy": correct, "entropy": spread, "logits": z}


def test_a_training_step_reads_them_from_the_op() -> None:
    ids = CLEAN.flip(1)
    eager = Trained().train()
    opt = fxopt.optimize(copy.deepcopy(eager), "loss", inputs={"ids": ids, "labels": LABELS})
    for labels in (LABELS, LABELS.flip(1), CLEAN):
        wanted, got = eager(ids, labels), opt(ids=ids, labels=labels)
        for model, result in ((eager, wanted), (opt, got)):
            model.zero_grad()
            result["loss"].backward()
        assert type(got["accuracy"]) is type(got["entropy"]) is torch.Tensor and isinstance(got["logits"], LazyOutput)
        for name, value in wanted.items():
            torch.testing.assert_close(got[name].detach() + 0, value.detach())
        for mine, theirs in zip(opt.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
