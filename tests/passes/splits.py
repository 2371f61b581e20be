"""A batch in parts against the whole, for the tests of denominators."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings
import torch
import torch.nn as nn

from fxopt.ir.capture import Call, capture
from fxopt.ir.denominator import Denominator, Underivable, derive
from fxopt.ir.edit import Edit
from fxopt.ir.program import Program
from fxopt.passes.pipeline import run
from fxopt.runtime.counting import Items, shares

BATCH, LENGTH, WIDTH, CLASSES = 6, 5, 8, 7
EXACT = 2.0**-40  # of the largest gradient: 9e-13
QUICK = settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])


def batch(seed: int = 0, ignored: float = 0.4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(BATCH, LENGTH, generator=generator) < ignored] = -100
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": labels, "mask": (labels != -100).double()}


def fact(program: Program) -> Denominator:
    return next(each for each in program.facts if isinstance(each, Denominator))


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def gradients(loss: torch.Tensor, model: nn.Module) -> torch.Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found)])


def split(whole: dict[str, torch.Tensor], sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    assert sum(sizes) == len(next(iter(whole.values())))
    pieces = {key: value.split(sizes) for key, value in whole.items()}
    return [{key: value[i] for key, value in pieces.items()} for i in range(len(sizes))]


def assert_split_is_whole(model: nn.Module, by: Denominator, loss: Callable[[dict], torch.Tensor], whole: dict, sizes: list[int]) -> None:
    """The gradient of `whole` against the weighted gradients of its parts; parts that count nothing are not run, as in `fit`."""
    state = state_of(model)
    parts = []
    for part in split(whole, sizes):
        counts = tuple(by.measure(list(part.values()), state))
        parts.append((part, Items(by.divisor(counts, state), counts, by, state)))
    parts = [(part, items) for part, items in parts if items.number]
    expected_loss = loss(whole)
    weights, total = shares([items for _, items in parts])
    assert total == by.divisor(by.measure(list(whole.values()), state), state)
    losses = [loss(part) * weight for (part, _), weight in zip(parts, weights)]
    expected, found = gradients(expected_loss, model), sum(gradients(each, model) for each in losses)
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()
    assert (sum(losses) - expected_loss).abs() <= EXACT * expected_loss.abs()


def reason(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> Underivable:
    program = run("canonicalize | denominator", capture(model, Call.of(args, kwargs)))
    found = derive(program)
    assert isinstance(found, Underivable)
    assert not any(isinstance(each, Denominator) for each in program.facts)
    assert found.reason in program.log[-1].notes[0] and found.where in program.log[-1].notes[0]
    return found


def in_fp64(program: Program) -> Program:
    """The program without its casts to fp32: some models compute norms and the loss in fp32 whatever they are given."""
    edit = Edit(program, by="test")
    for node in edit.nodes:
        if torch.float32 in node.args:
            edit.set_args(node, tuple(torch.float64 if arg is torch.float32 else arg for arg in node.args))
    return edit.finish("casts to fp64")
