"""What is asked of a whole program, asked of a model in parts: the answer for each part, by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn as nn

from fxopt.certified import bisected, certified
from fxopt.dispatch.account import summary
from fxopt.dispatch.lowered import Lowered
from fxopt.dispatch.parts import Candidate, Parts
from fxopt.errors import CheckError, FxoptError
from fxopt.explain import Explanation, explain
from fxopt.ir.capture import Call
from fxopt.passes.bisect import Culprit, Judge
from fxopt.passes.certificate import Certificate
from fxopt.passes.pipeline import Pipeline
from fxopt.runtime.plan import OPTIMIZERS, Plan, planned, size, weights_bytes

Answer = TypeVar("Answer")
_OF_THE_MODEL = ("weights", "optimizer", "gradients")  # what a plan of one part counts of its own, and the model has once


@dataclass(frozen=True, eq=False)
class Asked:
    """A program of a part, with the latest call that it covers, and the names of the parts with equal regions and call (its own first).

    Attributes:
        model: holds the part at its path, so that the names of its state are the model's.
    """

    names: tuple[str, ...]
    model: nn.Module
    passes: Pipeline
    lowered: Lowered
    call: Call

    @property
    def name(self) -> str:
        """The part's path, and how many there are like it."""
        return self.names[0] + (f" and {len(self.names) - 1} like it" if len(self.names) > 1 else "")


def asked(parts: Parts) -> list[Asked]:
    """One for each different program that the latest calls of the parts run, in the order of the model."""
    found: dict[Any, Asked] = {}
    for candidate in parts.captured:
        call, lowered = _latest(candidate)
        key = tuple(region.key for region in lowered.schedule.regions), tuple((t.shape, t.dtype, t.requires_grad) for t in call.tensors)
        before = found[key].names if key in found else ()
        if before:
            found[key] = dataclasses.replace(found[key], names=(*before, candidate.path))
        else:
            found[key] = Asked((candidate.path,), candidate.dispatcher.model, candidate.dispatcher.passes, lowered, call)
    return list(found.values())


def _latest(candidate: Candidate) -> tuple[Call, Lowered]:
    """A part's latest call with the gradients that its inputs take, and the program that it ran."""
    dispatcher, call = candidate.dispatcher, candidate.example
    assert call is not None
    kinds = [(t.dtype, t.dim(), t.device) for t in call.tensors]
    for key, entries in reversed(dispatcher.entries.items()):
        spec, _, tensors, *_ = key
        if spec == call.spec and [kind[:3] for kind in tensors] == kinds:
            given = dataclasses.replace(call, tensors=tuple(t.detach().requires_grad_(kind[3]) for t, kind in zip(call.tensors, tensors)))
            for entry in reversed(entries):
                lowered = entry.plain or entry.assuming
                if lowered is not None and lowered.binding is not None and entry.guards.check(tuple(tuple(t.shape) for t in call.tensors)) in ("ok", "edge"):
                    return given, lowered
    raise FxoptError(f"the latest call of {candidate.path} was not run by a program", where=candidate.path, do="call the model once more, then ask again")


@dataclass(frozen=True)
class ByPart(Generic[Answer]):
    """Answers by part; `print` it, or take `json()`.

    Attributes:
        parts: the answer of each different program, by the name of its part ("blocks.0 and 2 like it").
        rest: what runs as Python code, of which nothing is said, in words.
    """

    parts: Mapping[str, Answer]
    rest: str

    def json(self) -> dict[str, Any]:
        """The same as data."""
        return {"rest": self.rest, "parts": {name: answer.json() if hasattr(answer, "json") else dataclasses.asdict(answer) for name, answer in self.parts.items()}}

    def __str__(self) -> str:
        return "\n\n".join([self.rest, *(f"part {name}:\n{answer}" for name, answer in self.parts.items())])


@dataclass(frozen=True)
class PlanOfParts(ByPart[Plan]):
    """Plans of a model in parts, with what they add up to.

    Attributes:
        peak: bytes of a step at most: the weights, the optimizer's state and the gradients of the model once, and what each part
            needs beside them at its own peak, as if all parts were at it at once. What the Python code between the parts keeps is not
            counted, nor a part's second call.
        seconds: of forward and backward of all parts, each called once.
    """

    peak: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return "\n".join([f"peak at most {size(self.peak)}, with all parts at their own peaks at once; forward and backward {self.seconds:.3g} s",
                          "not counted: what the Python code around the parts keeps and takes, and further calls of a part in one step", super().__str__()])


def each(parts: Parts, answer: Callable[[Asked], Answer]) -> ByPart[Answer]:
    """The answer of each different program."""
    return ByPart({one.name: answer(one) for one in asked(parts)}, summary(parts))


def explained(parts: Parts, predict: str) -> ByPart[Explanation]:
    """See `explain.explain`."""
    return each(parts, lambda one: explain(one.lowered.program, one.model, one.call, predict=predict, checks=one.lowered.checks))


def plan(parts: Parts, optimizer: str | None) -> PlanOfParts:
    """The plan of a step of each part on its latest call, and their sum."""
    trained = [p for p in parts.root.model.parameters() if p.requires_grad]
    state = int(OPTIMIZERS[optimizer or "adamw"] * sum(p.numel() * 4 for p in trained))  # no pass of a model in parts has an optimizer in its budget
    total = weights_bytes(parts.root.model) + sum(p.numel() * p.element_size() for p in trained) + state
    seconds = 0.0
    found: dict[str, Plan] = {}
    for one in asked(parts):
        step = found[one.name] = planned(one.lowered.binding, one.call.tensors, optimizer)
        total += len(one.names) * (step.peak.total - sum(step.peak.parts.get(kind, 0) for kind in _OF_THE_MODEL))
        seconds += len(one.names) * step.seconds
    return PlanOfParts(found, summary(parts), total, seconds)


def verified(parts: Parts, *, runs: int, seed: int, original: Mapping[str, torch.Tensor] | None, name: str | None, inputs: Sequence[str] | None) -> Certificate:
    """One certificate: the stages and cases of each different program, with the part's name before theirs. See `certified.certified`."""
    name = name or type(parts.root.model).__name__
    made = each(parts, lambda one: certified(one.lowered.program, one.model, one.passes, one.call.tensors, one.lowered.binding, runs=runs, seed=seed, original=original,
                                             name=name, inputs=inputs))
    return Certificate.joined(made.parts, parts.root.passes.text())


def bisect(parts: Parts, predicate: Judge | None, original: Mapping[str, torch.Tensor] | None) -> Culprit:
    """The pass and the rewrite that are wrong in the first part that is.

    Raises:
        CheckError: no part is wrong.
    """
    for one in asked(parts):
        try:
            found = bisected(one.lowered.program, one.model, one.passes, one.call.tensors, predicate=predicate, certificate=None, original=original)
        except CheckError:  # of this part, nothing is wrong
            continue
        return dataclasses.replace(found, says=f"in part {one.name}: {found.says}")
    raise CheckError("nothing is wrong in any part: there is nothing to find", do="give a predicate; what runs as Python code is not looked at")
