"""loss: heads in all the forms that models write them, what is left alone and why, which gradients are asked for."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from captured import Captured, data, family, function, weight

import fxopt
from fxopt.errors import CheckError, PassError
from fxopt.ir.edit import Edit
from fxopt.ir.program import Lazy
from fxopt.passes.base import Pass, Promise
from fxopt.passes.loss import Loss

# scale, softcap, whether there is a bias
EXPECTED = {
    "llama": (1.0, 0.0, False), "gemma2": (1.0, 30.0, False), "granite": (0.5, 0.0, False), "cohere": (0.0625, 0.0, False), "gptj": (1.0, 0.0, True),
    "gpt2": (1.0, 0.0, False), "bert": (1.0, 0.0, True), "t5": (1.0, 0.0, False), "neox": (1.0, 0.0, False),
}


def only(captured: Captured) -> dict[str, object]:
    """The arguments of the one fused loss, by name."""
    (node,) = captured.calls("linear_cross_entropy")
    return {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args)}


@pytest.mark.parametrize("name", EXPECTED)
def test_models(name: str) -> None:
    captured = family(name).after("canonicalize")
    guards = len(captured.program.fake_mode.shape_env.guards)
    fused = captured.check(Loss())
    got, (scale, softcap, bias) = only(fused), EXPECTED[name]
    assert (got["logit_scale"], got["softcap"], got["bias"] is not None) == (scale, softcap, bias)
    assert got["grad_mask"] == [True, True, bias] and not fused.misses
    assert not fused.calls("cross_entropy_loss")
    assert [fact.index for fact in fused.program.facts if isinstance(fact, Lazy)] == [1]
    assert len(captured.program.fake_mode.shape_env.guards) == guards


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_models_in_low_precision(name: str) -> None:
    only(family(name, dtype=torch.bfloat16).after("canonicalize").check(Loss()))


def test_rows_without_labels() -> None:
    captured = family("llama").after("canonicalize")
    ignored = tuple(t if t.dtype != torch.int64 or not bool((t == -100).any()) else torch.where(torch.arange(t.shape[1]) < 6, -100, t) for t in captured.inputs)
    dataclasses.replace(captured, inputs=ignored).check(Loss())


@dataclasses.dataclass(frozen=True)
class Freeze(Pass):
    """freeze slots by name"""

    names: tuple[str, ...] = ()
    name: ClassVar[str] = "freeze"
    promise: ClassVar[Promise] = Promise(gradients="declared")

    def run(self, edit: Edit) -> None:
        edit.freeze(self.names)


def test_a_frozen_head_takes_no_gradient() -> None:
    frozen = family("llama").after("canonicalize", Freeze(("lm_head.weight",)))
    assert only(frozen.check(Loss()))["grad_mask"] == [True, False, False]


def test_a_frozen_model_takes_none() -> None:
    captured = family("llama").after("canonicalize")
    assert only(captured.after(Freeze(tuple(captured.program.slots)), Loss()))["grad_mask"] == [False, False, False]


# -- hand-written heads ----------------------------------------------------------------------------------------------

H, LABELS = data(2, 6, 8), torch.randint(0, 19, (2, 6), generator=torch.Generator().manual_seed(3))
W, B = weight(19, 8), weight(19, seed=4)

FORMS = {
    "shifted by slices": lambda h, y, w, b: F.cross_entropy((h @ w.t())[:, :-1].reshape(-1, 19), y[:, 1:].reshape(-1)),
    "contiguous slices": lambda h, y, w, b: F.cross_entropy(F.linear(h, w, b)[..., :-1, :].contiguous().view(-1, 19), y[..., 1:].contiguous().view(-1)),
    "flattened": lambda h, y, w, b: F.cross_entropy(F.linear(h, w).flatten(0, 1), y.flatten()),
    "sizes spelled out": lambda h, y, w, b: F.cross_entropy(F.linear(h, w).view(h.shape[0] * h.shape[1], 19), y.view(-1)),
    "hidden flattened first": lambda h, y, w, b: F.cross_entropy(F.linear(h.view(-1, 8), w, b), y.view(-1)),
    "summed": lambda h, y, w, b: F.cross_entropy(F.linear(h, w).view(-1, 19), y.view(-1), reduction="sum") / 7,
    "not reduced": lambda h, y, w, b: (F.cross_entropy(F.linear(h, w).view(-1, 19), y.view(-1), reduction="none") * torch.arange(12)).mean(),
    "smoothed": lambda h, y, w, b: F.cross_entropy(F.linear(h, w, b).view(-1, 19), y.view(-1), label_smoothing=0.1),
    "other ignored label": lambda h, y, w, b: F.cross_entropy(F.linear(h, w).view(-1, 19), y.view(-1), ignore_index=4),
    "capped and scaled": lambda h, y, w, b: F.cross_entropy((torch.tanh(F.linear(h, w) * 0.5 / 3.0) * 3.0).view(-1, 19), y.view(-1)),
    "scaled by two factors": lambda h, y, w, b: F.cross_entropy((F.linear(h, w) / 4.0 * 2.0).view(-1, 19), y.view(-1)),
    "bias added": lambda h, y, w, b: F.cross_entropy((F.linear(h, w) + b).view(-1, 19), y.view(-1)),
    "bias of rank two": lambda h, y, w, b: F.cross_entropy((b[None, :] + F.linear(h, w)).view(-1, 19), y.view(-1)),
    "in fp32": lambda h, y, w, b: F.cross_entropy(F.linear(h.bfloat16(), w.bfloat16()).float().view(-1, 19), y.view(-1)),
    "in bf16": lambda h, y, w, b: F.cross_entropy(F.linear(h.bfloat16(), w.bfloat16()).view(-1, 19), y.view(-1)),
    "nll_loss": lambda h, y, w, b: F.nll_loss(F.log_softmax(F.linear(h, w, b).view(-1, 19), -1), y.view(-1), ignore_index=4, reduction="sum"),
    "nll_loss of three dimensions": lambda h, y, w, b: F.nll_loss(F.log_softmax(F.linear(h, w), -1).view(-1, 19), y.view(-1)),
    "nll_loss in fp32": lambda h, y, w, b: F.nll_loss(F.log_softmax(F.linear(h.bfloat16(), w.bfloat16()).view(-1, 19), -1, dtype=torch.float32), y.view(-1)),
    "nll_loss of a log": lambda h, y, w, b: F.nll_loss(torch.log(torch.softmax(F.linear(h, w).view(-1, 19) * 0.5, -1)), y.view(-1)),
    "classes in front": lambda h, y, w, b: F.cross_entropy(F.linear(h, w).transpose(1, 2), y, ignore_index=4),
    "classes in front, not reduced": lambda h, y, w, b: (F.cross_entropy(F.linear(h, w, b).permute(0, 2, 1), y, reduction="none") * torch.arange(6)).mean(),
    "classes in front, four dimensions": lambda h, y, w, b: F.cross_entropy(F.linear(h.view(2, 3, 2, 8), w).permute(0, 3, 1, 2), y.view(2, 3, 2)),
    "nll_loss, classes in front": lambda h, y, w, b: F.nll_loss(F.log_softmax(F.linear(h, w), -1).transpose(1, 2), y),
    "gathered": lambda h, y, w, b: -(torch.log_softmax(F.linear(h + (y[..., None] < 0), w) / 2.0, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1) * torch.arange(6)).mean(),
    "gathered in two dimensions": lambda h, y, w, b: torch.log_softmax(F.linear((h + (y[..., None] < 0)).view(-1, 8), w).float(), 1).gather(1, y.view(-1, 1)).exp().sum(),
}


def head(fn) -> Captured:
    """A hand-written head after `loss`, values compared."""
    return function(lambda h, y, w, b: fn(h, y, w, b) + 0.0 * b.sum() + 0.0 * w.sum(), H, LABELS, w=W, b=B).after("canonicalize").check(Loss())


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    captured = head(FORMS[name])
    got = only(captured)
    assert got["hidden"].meta["val"].shape[-1] == 8
    wide = [node for node in captured.program.nodes if node.op == "call_function" and getattr(node.meta["val"], "ndim", 0) > 1 and node.meta["val"].shape[-1] == 19
            and node.meta["val"].shape[0] != 1]
    assert not wide, "no logits are left"


def test_shifted_rows_never_reach_the_head() -> None:
    assert [int(size) for size in only(head(FORMS["shifted by slices"]))["hidden"].meta["val"].shape[-1:]] == [8]
    assert head(FORMS["shifted by slices"]).calls("slice")


LEFT = {
    "weighted classes": (lambda h, y, w, b: F.cross_entropy(F.linear(h, w).view(-1, 19), y.view(-1), weight=b.detach().abs()), "the classes are weighted"),
    "probabilities": (lambda h, y, w, b: F.cross_entropy(F.linear(h, w).view(-1, 19), torch.softmax(y.view(-1, 1) * b.detach(), -1)), "not one class for each row"),
    "classes in front, two heads": (lambda h, y, w, b: F.cross_entropy(torch.stack((F.linear(h, w), F.linear(h, w)), 1).flatten(2, 3), y.repeat(1, 1)[:, :1].expand(2, 114) % 2), "the classes are not the last dimension in memory"),
    "fp64": (lambda h, y, w, b: F.cross_entropy(F.linear(h, w).double().view(-1, 19), y.view(-1)), "widens the logits to torch.float64"),
    "normalized twice": (lambda h, y, w, b: F.nll_loss(F.linear(h, w).view(-1, 19), y.view(-1)), "not from a log_softmax"),
    "normalized over rows": (lambda h, y, w, b: F.nll_loss(F.log_softmax(F.linear(h, w).view(-1, 19), 0), y.view(-1)), "not taken over the classes"),
    "weighted nll_loss": (lambda h, y, w, b: F.nll_loss(F.log_softmax(F.linear(h, w).view(-1, 19), 1), y.view(-1), weight=b.detach().abs()), "the classes are weighted"),
    "two classes a row": (lambda h, y, w, b: F.log_softmax(F.linear(h, w), -1).gather(-1, y.view(2, 3, 2).repeat(1, 2, 1)).sum(), "one class for each row"),
    "some rows": (lambda h, y, w, b: ((z := F.linear(h, w)).logsumexp(-1, keepdim=True) - z.gather(-1, y[:, :1, None])).sum(), "may select some of the rows"),
    "an entropy": (lambda h, y, w, b: F.nll_loss((p := F.log_softmax(F.linear(h, w).view(-1, 19), 1)), y.view(-1)) + (p * p.exp()).sum(), "also reach the loss"),
    "some classes": (lambda h, y, w, b: F.cross_entropy(F.linear(h, w)[..., :10].reshape(-1, 10), y.view(-1) % 10), "selects some of the classes"),
    "mixed rows": (lambda h, y, w, b: F.cross_entropy(F.linear(h, w).view(-1, 38), y[:, ::2].reshape(-1)), "mixes rows and classes"),
    "another function": (lambda h, y, w, b: F.cross_entropy(torch.relu(F.linear(h, w)).view(-1, 19), y.view(-1)), "not from a linear head"),
    "a second bias": (lambda h, y, w, b: F.cross_entropy((F.linear(h, w, b) + b).view(-1, 19), y.view(-1)), "without bias"),
    "a scaled product": (lambda h, y, w, b: F.cross_entropy((F.linear(h, w) * 2.0 + b).view(-1, 19), y.view(-1)), "without bias"),
    "a bias per row": (lambda h, y, w, b: F.cross_entropy((F.linear(h, w) + h[..., :1]).view(-1, 19), y.view(-1)), "not from a linear head"),
    "two caps": (lambda h, y, w, b: F.cross_entropy(torch.tanh(torch.tanh(F.linear(h, w))).view(-1, 19), y.view(-1)), "second tanh"),
    "a negative cap": (lambda h, y, w, b: F.cross_entropy((torch.tanh(F.linear(h, w)) * -3.0).view(-1, 19), y.view(-1)), "not positive"),
    "narrowed": (lambda h, y, w, b: F.cross_entropy(F.linear(h, w).bfloat16().view(-1, 19), y.view(-1)), "narrows the logits"),
    "another term": (lambda h, y, w, b: F.cross_entropy((z := F.linear(h, w)).view(-1, 19), y.view(-1)) + z.logsumexp(-1).pow(2).mean(), "also reach the loss"),
    "a small head": (lambda h, y, w, b: F.cross_entropy(F.linear(h, w[:4]).view(-1, 4), y.view(-1) % 4), "there is nothing to save"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name: str) -> None:
    fn, reason = LEFT[name]
    captured = head(fn)
    assert not captured.calls("linear_cross_entropy") and not captured.calls("cross_entropy")
    assert any(reason in said for said in captured.misses), captured.misses


# -- without a head --------------------------------------------------------------------------------------------------

MANY = 2048
WIDE, WIDE_LABELS = weight(MANY, 8), torch.randint(0, MANY, (2, 6), generator=torch.Generator().manual_seed(3))


def linear(h, w):
    """Logits that the loss pass cannot make itself, [2, 6, 2048]."""
    return torch.relu(F.linear(h, w))


# the function, and scale, softcap and dtype of the op's logits
ALONE = {
    "logits": (lambda h, y, w: F.cross_entropy(linear(h, w).view(-1, MANY), y.view(-1)), (1.0, 0.0, torch.float32)),
    "in bf16": (lambda h, y, w: F.cross_entropy(linear(h.bfloat16(), w.bfloat16()).view(-1, MANY), y.view(-1)), (1.0, 0.0, torch.bfloat16)),
    "widened": (lambda h, y, w: F.cross_entropy(linear(h.bfloat16(), w.bfloat16()).float().view(-1, MANY), y.view(-1)), (1.0, 0.0, torch.bfloat16)),
    "shifted": (lambda h, y, w: F.cross_entropy(linear(h.bfloat16(), w.bfloat16()).float()[:, :-1].reshape(-1, MANY), y[:, 1:].reshape(-1)), (1.0, 0.0, torch.bfloat16)),
    "narrowed": (lambda h, y, w: F.cross_entropy(linear(h, w).bfloat16().view(-1, MANY), y.view(-1)), (1.0, 0.0, torch.bfloat16)),
    "capped and scaled": (lambda h, y, w: F.cross_entropy((torch.tanh(linear(h, w) * 0.5 / 3.0) * 3.0).view(-1, MANY), y.view(-1), ignore_index=4), (0.5, 3.0, torch.float32)),
    "capped with a negative cap": (lambda h, y, w: F.cross_entropy((torch.tanh(linear(h, w)) * -3.0).view(-1, MANY), y.view(-1)), (-3.0, 0.0, torch.float32)),
    "capped twice": (lambda h, y, w: F.cross_entropy((torch.tanh(torch.tanh(linear(h, w)) / 2) * 2).view(-1, MANY), y.view(-1)), (1.0, 2.0, torch.float32)),
    "a bias": (lambda h, y, w: F.cross_entropy(((linear(h, w) + w[:, 0]) * 2.0).view(-1, MANY), y.view(-1)), (2.0, 0.0, torch.float32)),
    "smoothed": (lambda h, y, w: F.cross_entropy(linear(h, w).view(-1, MANY), y.view(-1), label_smoothing=0.1, reduction="sum"), (1.0, 0.0, torch.float32)),
    "not reduced": (lambda h, y, w: (F.cross_entropy(linear(h, w).transpose(1, 2), y, reduction="none") * torch.arange(6)).sum(), (1.0, 0.0, torch.float32)),
    "nll_loss": (lambda h, y, w: F.nll_loss(F.log_softmax(linear(h.bfloat16(), w.bfloat16()).float(), -1).view(-1, MANY), y.view(-1)), (1.0, 0.0, torch.bfloat16)),
    "gathered": (lambda h, y, w: torch.log_softmax(linear(h + (y[..., None] < 0), w) * 0.5, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1).mean(), (0.5, 0.0, torch.float32)),
    "another term": (lambda h, y, w: F.cross_entropy((z := F.linear(h, w)).view(-1, MANY), y.view(-1)) + z.logsumexp(-1).pow(2).mean(), (1.0, 0.0, torch.float32)),
    "a read cast": (lambda h, y, w: F.cross_entropy((z := linear(h.bfloat16(), w.bfloat16()).float()).view(-1, MANY) * 0.5, y.view(-1)) + z.amax(), (0.5, 0.0, torch.float32)),
    "fp64": (lambda h, y, w: F.cross_entropy(linear(h, w).double().view(-1, MANY), y.view(-1)), (1.0, 0.0, torch.float64)),
}


def alone(fn, **more) -> Captured:
    """Logits of many classes after `loss`, values compared."""
    return function(lambda h, y, w: fn(h, y, w) + 0.0 * w.sum(), H, WIDE_LABELS, w=WIDE).after("canonicalize").check(Loss(**more))


@pytest.mark.parametrize("name", ALONE)
def test_logits_without_a_head(name: str) -> None:
    fn, (scale, softcap, dtype) = ALONE[name]
    captured = alone(fn)
    (node,) = captured.calls("cross_entropy")
    got = {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args)}
    assert (got["logit_scale"], got["softcap"], got["logits"].meta["val"].dtype) == (scale, softcap, dtype)
    assert captured.misses and not captured.calls("linear_cross_entropy")
    assert not any(captured.calls(gone) for gone in ("cross_entropy_loss", "nll_loss_nd", "log_softmax", "gather"))


def test_kept_logits_of_many_classes() -> None:
    def fn(h, y, w):
        logits = F.linear(h, w)
        return F.cross_entropy(logits.view(-1, MANY), y.view(-1)), logits

    captured = function(fn, H, WIDE_LABELS, w=WIDE).after("canonicalize")
    kept = captured.check(Loss(logits="keep"))
    assert kept.calls("cross_entropy") and not [fact for fact in kept.program.facts if isinstance(fact, Lazy)]
    assert captured.check(Loss()).calls("linear_cross_entropy")


def test_log_probabilities_that_others_read_stay() -> None:
    captured = alone(lambda h, y, w: F.nll_loss((p := F.log_softmax(linear(h, w).view(-1, MANY), 1)), y.view(-1)) + (p * p.exp()).sum())
    assert not captured.calls("cross_entropy") and any("is also read by others" in said for said in captured.misses)


def test_the_rows_of_a_gpu_are_an_argument() -> None:
    for rows in (-1, 0, 12):
        captured = function(lambda h, y, w: F.cross_entropy(F.linear(h, w).view(-1, 19), y.view(-1)), H, LABELS, w=W).after("canonicalize")
        assert only(captured.check(Loss(rows=rows)))["rows"] == rows
    with pytest.raises(PassError, match="rows must be"):
        Loss(rows=-2)


def test_what_the_caller_derives_from_logits_is_lazy_too() -> None:
    def fn(h, y, w):
        logits = F.linear(h, w)
        return logits.argmax(-1), F.cross_entropy(logits.view(-1, 19), y.view(-1)), logits[:, -1:], h.sum()

    captured = function(fn, H, LABELS, w=W).after("canonicalize").check(Loss())
    assert sorted(fact.index for fact in captured.program.facts if isinstance(fact, Lazy)) == [0, 2]


def test_kept_logits() -> None:
    captured = family("llama").after("canonicalize")
    assert captured.check(Loss(logits="keep")).calls("cross_entropy_loss")
    assert only(function(lambda h, y, w: F.cross_entropy(F.linear(h, w).view(-1, 19), y.view(-1)), H, LABELS, w=W).after("canonicalize").check(Loss(logits="keep")))


def test_it_is_not_fused_twice() -> None:
    fused = family("llama").after("canonicalize", Loss())
    assert len(fused.check(Loss()).calls("linear_cross_entropy")) == 1


@dataclasses.dataclass(frozen=True)
class Unscaled(Loss):
    """The planted fault: the scale of the logits is forgotten."""

    def run(self, edit: Edit) -> None:
        super().run(edit)
        for node in edit.nodes:
            place = {"fxopt.linear_cross_entropy.default": 8, "fxopt.cross_entropy.default": 6}.get(str(node.target))
            if place is not None:
                edit.set_args(node, (*node.args[:place], 1.0, *node.args[place + 1 :]))


def test_a_wrong_rule_would_show() -> None:
    with pytest.raises(CheckError, match="differs"):
        family("granite").after("canonicalize").check(Unscaled())
    with pytest.raises(CheckError, match="differs"):
        function(ALONE["gathered"][0], H, WIDE_LABELS, w=WIDE).after("canonicalize").check(Unscaled())


def test_an_ignored_label_that_is_a_size_is_left_alone() -> None:
    """As in question answering: positions behind the last one are clamped to the length, which the loss then ignores."""

    class Answers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            logits = self.head(x).squeeze(-1)
            return F.cross_entropy(logits, start.clamp(0, logits.shape[1]), ignore_index=logits.shape[1])

    opt = fxopt.optimize(Answers(), "canonicalize | loss", inputs=(torch.randn(3, 6, 4), torch.tensor([1, 9, 2])))
    assert "the label that it ignores is a size of the call" in opt.report
