"""`quantize(bits=...)`: the plan against all plans, what is measured against a direct computation, and both on a model."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt.errors import PassError
from fxopt.ir.capture import Call, capture
from fxopt.ir.facts import Stored
from fxopt.ir.program import Sample
from fxopt.kernels.formats import FORMATS
from fxopt.kernels.tolerance import same
from fxopt.passes.sensitivity import CANDIDATES, ROWS, Measured, bits_of, choose, measure
from tests.models import gpt2, tokens

Weights = dict[str, tuple[tuple[int, ...], torch.dtype]]
SHAPES = ((64, 64), (3, 128), (200, 16), (1, 7))


@st.composite
def instances(draw: st.DrawFn) -> tuple[dict[str, dict[str, float]], Weights]:
    """Up to four weights with errors in any order, some of them equal."""
    weights = {name: (draw(st.sampled_from(SHAPES)), draw(st.sampled_from((torch.float32, torch.bfloat16)))) for name in "abcd"[: draw(st.integers(1, 4))]}
    error = st.sampled_from((0.0, 0.5, 1.0, 2.0)) | st.floats(1e-6, 1e3)
    return {name: {format: draw(error) for format in CANDIDATES} for name in weights}, weights


def points(errors: Mapping[str, float], weight: tuple[tuple[int, ...], torch.dtype]) -> list[tuple[float, float, str]]:
    """(bits, error, format) of everything that one weight can be."""
    shape, dtype = weight
    return [(bits_of(shape, dtype, format) * math.prod(shape), error, format) for format, error in (*errors.items(), ("dense", 0.0))]


def cost(plan: Mapping[str, str], errors: Mapping[str, Mapping[str, float]], weights: Weights) -> tuple[float, float]:
    """(bits, error) of a plan."""
    found = [next(p for p in points(errors[name], weights[name]) if p[2] == format) for name, format in plan.items()]
    return math.fsum(p[0] for p in found), math.fsum(p[1] for p in found)


def least(weights: Weights, errors: Mapping[str, Mapping[str, float]]) -> float:
    """Bits per weight of the smallest plan."""
    return math.fsum(min(p[0] for p in points(errors[n], w)) for n, w in weights.items()) / elements(weights)


def elements(weights: Weights) -> int:
    return sum(math.prod(shape) for shape, _ in weights.values())


def first_that_does_not_fit(errors: Mapping[str, Mapping[str, float]], weights: Weights, budget: float) -> float:
    """What the first step beyond the budget would save, in the order of saving per bit: steps between the points of each weight that are
    best at some price of a bit."""
    steps, spent = [], 0.0
    for name, weight in weights.items():
        every = points(errors[name], weight)
        turns = sorted({(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.permutations(every, 2) if b[0] > a[0] and a[1] > b[1]})
        prices = [2 * turns[-1] + 1, *((a + b) / 2 for a, b in itertools.pairwise(reversed([0.0, *turns])))] if turns else [1.0]
        ladder = list(dict.fromkeys(min(every, key=lambda p, price=price: (p[1] + price * p[0], p[0])) for price in prices))
        spent += ladder[0][0]
        steps += [((a[1] - b[1]) / (b[0] - a[0]), b[0] - a[0], a[1] - b[1]) for a, b in itertools.pairwise(ladder)]
    for _, bits, saved in sorted(steps, reverse=True):
        spent += bits
        if spent > budget:
            return saved
    return 0.0


@settings(max_examples=150, deadline=None)
@given(instances(), st.floats(0.0, 1.2), st.randoms(use_true_random=False))
def test_the_plan_is_the_best_up_to_the_last_step(instance: tuple[dict[str, dict[str, float]], Weights], share: float, shuffle: random.Random) -> None:
    errors, weights = instance
    low, high = least(weights, errors), 32.0
    bits = low + share * (high - low) + 1e-9
    plan = choose(errors, weights, bits)
    spent, error = cost(plan, errors, weights)
    budget = bits * elements(weights)
    assert list(plan) == list(weights) and spent <= budget
    best = min(total for formats in itertools.product((*CANDIDATES, "dense"), repeat=len(weights))
               for used, total in [cost(dict(zip(weights, formats)), errors, weights)] if used <= budget)
    assert best <= error <= (best + first_that_does_not_fit(errors, weights, budget)) * (1 + 1e-9) + 1e-12
    names = list(weights)
    shuffle.shuffle(names)
    again = choose({name: dict(sorted(errors[name].items())) for name in names}, {name: weights[name] for name in names}, bits)
    assert again == plan


@settings(max_examples=50, deadline=None)
@given(instances(), st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6))
def test_more_bits_never_cost_more(instance: tuple[dict[str, dict[str, float]], Weights], shares: list[float]) -> None:
    errors, weights = instance
    low = least(weights, errors) + 1e-9
    found = [cost(choose(errors, weights, low + share * (32 - low)), errors, weights)[1] for share in sorted(shares)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(found))


def test_equal_gains_go_by_name() -> None:
    errors = {name: {"nf4": 1.0, "int8": 0.0} for name in "cab"}
    weights: Weights = {name: ((64, 64), torch.float32) for name in "cab"}
    assert choose(errors, weights, 6.0) == {"c": "nf4", "a": "int8", "b": "nf4"}


@settings(max_examples=30, deadline=None)
@given(instances())
def test_a_budget_that_is_too_small_is_refused_with_the_least_that_works(instance: tuple[dict[str, dict[str, float]], Weights]) -> None:
    errors, weights = instance
    with pytest.raises(PassError) as caught:
        choose(errors, weights, least(weights, errors) * 0.99)
    wanted = float(re.search(r"raise `bits` to ([\d.]+) or more", str(caught.value))[1])
    choose(errors, weights, wanted)
    with pytest.raises(PassError):
        choose(errors, weights, wanted - 0.0011)


# -- what is measured ------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Every way to write a linear: nn.Linear, one called twice, a transposed weight (Conv1D), a product with a cast parameter."""

    def __init__(self, returned: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.returned = returned
        self.plain, self.twice, self.conv, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), Conv1D(64, 64), nn.BatchNorm1d(64)
        self.raw, self.last, self.unread = nn.Parameter(torch.randn(64, 24) / 8), nn.Linear(24, 5), nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.norm(self.conv(torch.tanh(self.twice(torch.tanh(self.twice(self.plain(x)))))))
        return self.returned(self.last(nn.functional.dropout(x, 0.1) @ self.raw.double().to(x.dtype))), self.unread(x.detach()).argmax(-1)


NAMES = ("plain.weight", "twice.weight", "conv.weight", "raw", "last.weight", "unread.weight")


def measured(model: nn.Module, x: torch.Tensor, names: set[str] | None = None) -> Measured:
    program = capture(model, Call.of((x,), {}))
    state = {name: dict((*model.named_parameters(), *model.named_buffers()))[name] for name in program.slots}
    return measure(program, Sample((x,), state), set(NAMES) if names is None else names)


def directly(model: Mixed, x: torch.Tensor, loss: Callable[[Any], torch.Tensor]) -> dict[str, dict[str, float]]:
    """The formula of `measure`, from hooks of PyTorch's own."""
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            y.retain_grad() if y.requires_grad else None
            seen.append((name, args[0], y))
        return see

    handles = [getattr(model, name).register_forward_hook(hook(f"{name}.weight")) for name in ("plain", "twice", "conv", "last", "unread")]
    with torch.random.fork_rng():
        loss(model(x)[0]).backward()
    for handle in handles:
        handle.remove()
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:ROWS]
    weights = dict(model.named_parameters())
    errors: dict[str, dict[str, float]] = {}
    for name, read, y in seen:
        weight = weights[name].detach()
        for format in CANDIDATES:
            stored = FORMATS[format].dequantize(FORMATS[format].quantize(weight), weight.shape, torch.float32) - weight
            change = read.detach() @ (stored if name == "conv.weight" else stored.t())
            gradient = torch.zeros_like(y) if y.grad is None else y.grad
            error = len(x) / 2 * len(x) / len(rows) * float((gradient[rows] * change[rows]).square().sum())
            errors.setdefault(name, {})[format] = errors.get(name, {}).get(format, 0.0) + error
    return errors


@pytest.mark.parametrize("rows", [17, ROWS + 88])
def test_the_errors_are_those_of_a_direct_computation(rows: int) -> None:
    torch.manual_seed(0)
    model, x = Mixed(lambda y: y.square().mean()), torch.randn(rows, 64)
    torch.manual_seed(1)
    before, state = {n: b.clone() for n, b in model.named_buffers()}, torch.get_rng_state()
    found = measured(model, x)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers()) and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and found.note is None and found.unit == "estimated rise of the loss"
    wanted = directly(model, x, lambda loss: loss)
    assert set(found.errors) == set(NAMES) and set(found.errors["unread.weight"].values()) == {0.0}
    assert all(found.errors["raw"][format] > 0 for format in CANDIDATES)
    for name, errors in wanted.items():
        assert same(torch.tensor([found.errors[name][f] for f in CANDIDATES]), torch.tensor([errors[f] for f in CANDIDATES])), name
    assert set(measured(model, x, {"conv.weight"}).errors) == {"conv.weight"}


def test_without_a_loss_it_is_the_relative_error_of_what_is_returned() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(64, 32, bias=False), torch.randn(9, 64)
    found = measured(model, x, {"weight"})
    assert found.note is None and "relative error of the outputs" in found.unit
    weight, y = model.weight.detach(), model(x).detach()
    for format, error in found.errors["weight"].items():
        change = x @ (FORMATS[format].dequantize(FORMATS[format].quantize(weight), weight.shape, torch.float32) - weight).t()
        assert same(torch.tensor(error), 9 / 2 * change.square().sum() / y.square().sum())


@pytest.mark.parametrize(("returned", "reason"), [(lambda y: y.argmax(-1), "no floating point output"), (lambda y: (y * 0).sum(), "no weight changes it"),
                                                  (lambda y: (y.mean() - y.mean()).sqrt(), "gradient is not finite")])
def test_without_a_gradient_it_says_so(returned: Callable[[torch.Tensor], Any], reason: str) -> None:
    torch.manual_seed(0)
    model, x = Mixed(returned), torch.randn(8, 64)
    found = measured(model, x)
    assert found.note is not None and reason in found.note and "relative output error" in found.unit
    weight = model.plain.weight.detach()
    change = x @ (FORMATS["nf4"].dequantize(FORMATS["nf4"].quantize(weight), weight.shape, torch.float32) - weight).t()
    assert same(torch.tensor(found.errors["plain.weight"]["nf4"]), change.square().sum() / (x @ weight.t()).square().sum())


def test_a_call_with_infinities_is_refused() -> None:
    with pytest.raises(PassError, match="not finite"):
        measured(Mixed(lambda y: y.square().mean()), torch.full((4, 64), math.inf))


# -- on models -------------------------------------------------------------------------------------------------------------


def formats(opt: fxopt.Optimized) -> dict[str, str]:
    facts = [slot.made.facts for slot in opt.program.slots.values() if slot.made is not None]
    return {fact.target: fact.format for fact in facts if isinstance(fact, Stored)}


class Branches(nn.Module):
    """Four linears that do the same for the loss, and a fifth that does nothing for it."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(5))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = [branch(x) for branch in self.branches]
        return {"loss": torch.stack(y[:4]).sum(0).square().mean(), "other": y[4]}


def test_a_weight_with_outliers_gets_more_bits_and_one_that_does_not_matter_does_not() -> None:
    torch.manual_seed(0)
    model = Branches().requires_grad_(False)
    for planted in (2, 4):
        model.branches[planted].weight[:, 7] *= 40  # the largest of each block: the others keep few levels
    opt = fxopt.optimize(model, "quantize(bits=5.1)", inputs=(torch.randn(32, 64),))
    assert formats(opt) == {f"branches.{i}.weight": "fp8" if i == 2 else "nf4_nested" for i in range(5)}
    assert "branches.2.weight is fp8 (errors: nf4_nested" in opt.report and "estimated rise of the loss" in opt.report


@pytest.mark.parametrize("autocast", [False, True])
def test_everything_that_is_quantized_is_measured(autocast: bool) -> None:
    """Conv1D, adapters in front, an autocast around it: the plan covers what one format would."""
    model = gpt2(0.0, layers=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        opt = fxopt.optimize(model, "lora(rank=2, targets=[c_attn]) | quantize(bits=6)", inputs=tokens(), check=False)
    block = "transformer.h.0."
    assert set(formats(opt)) == {f"{block}{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert len(set(formats(opt).values())) > 1 and "was not seen" not in opt.report
