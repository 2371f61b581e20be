"""loss: heads in all the forms that models write them, what is left alone and why, which gradients are asked for."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from zoo import Captured, data, family, function, weight

from fxopt.errors import CheckError
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
    "classes in front": (lambda h, y, w, b: F.cross_entropy(F.linear(h, w).transpose(1, 2), y), "not one class for each row"),
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
    assert captured.calls("cross_entropy_loss") and any(reason in said for said in captured.misses), captured.misses


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
            if str(node.target) == "fxopt.linear_cross_entropy.default":
                edit.set_args(node, (*node.args[:8], 1.0, *node.args[9:]))


def test_a_wrong_rule_would_show() -> None:
    with pytest.raises(CheckError, match="differs"):
        family("granite").after("canonicalize").check(Unscaled())
