"""A budget of bytes: kept as measured by the allocator, with the gradients of eager, or refused with the smallest that could be."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from torch.utils._pytree import tree_leaves

import fxopt
from fxopt.errors import CallError
from fxopt.ir.facts import Budget
from fxopt.kernels.catalog import linear_cross_entropy
from fxopt.kernels.tolerance import same
from fxopt.runtime.dry_run import run
from fxopt.runtime.memory import Allocations
from fxopt.runtime.plan import Plan, Planned
from fxopt.runtime.sizes import measure
from fxopt.runtime.solver import Option, smallest, solve
from strategies import Spec, build, inputs, specs
from tests.models import MODELS, loss_of, llama, tokens

SLACK = 64 << 10  # bytes of small tensors that are made outside the regions: sums of losses, first gradients
PLAIN = "canonicalize | causal | fuse | loss"


def planned(opt: fxopt.Optimized) -> Plan:
    return opt.dispatcher.last.binding.saving.last


def step(opt: torch.nn.Module, data: dict) -> dict[str, torch.Tensor]:
    for parameter in opt.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    loss_of(opt(**data)).backward()
    return {name: p.grad.clone() for name, p in opt.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_eager_at_every_budget(name: str) -> None:
    """Dropout is on in these models: one seed must draw the same masks at every budget."""
    make, data = MODELS[name]
    opt = fxopt.optimize(make(), "canonicalize | memory(least)", check=False)
    expected = step(fxopt.optimize(make(), "canonicalize", check=False), data())
    found = step(opt, data())
    assert found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    least = planned(opt).peak.total
    for share in (1.02, 1.1):
        opt.dispatcher.last.binding.saving = Planned(Budget(int(least * share)))
        found = step(opt, data())
        assert all(same(found[key], expected[key]) for key in expected), share
        assert planned(opt).peak.total <= least * share


def fxopt_of(make, data: dict, passes: str) -> fxopt.Optimized:
    opt = fxopt.optimize(make(), passes, check=False)
    step(opt, data)
    return opt


def measured(opt: fxopt.Optimized, data: dict) -> int:
    """Bytes above what is there before the step; gradients are not there before it, as in the plan."""
    step(opt, data)
    step(opt, data)
    for parameter in opt.parameters():
        parameter.grad = None
    with Allocations() as allocations:
        loss_of(opt(**data)).backward()
    return allocations.peak


def test_the_predicted_peak_is_the_measured_one() -> None:
    data = tokens(4, 64)
    opt = fxopt_of(lambda: llama(layers=3, hidden_size=128, intermediate_size=256, max_position_embeddings=128), data, f"{PLAIN} | memory(least)")

    def above(plan: Plan) -> int:
        return plan.peak.total - sum(plan.peak.parts[part] for part in ("weights", "optimizer", "inputs"))

    least = planned(opt).peak.total
    for budget in (None, int(least * 1.1), 100 << 30):
        opt.dispatcher.last.binding.saving = Planned(Budget(budget))
        found, plan = measured(opt, data), planned(opt)
        assert abs(found - above(plan)) <= 0.05 * found, (found, str(plan))
        assert budget is None or found + plan.peak.total - above(plan) <= budget


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_that_can() -> None:
    data = tokens(4, 32)
    with pytest.raises(CallError, match="the least that it can be made to take") as refused:
        step(fxopt.optimize(llama(), f"{PLAIN} | memory(100KiB)", check=False), data)
    least = re.search(r"memory\((\d+MiB)\)", refused.value.do)[1]
    step(fxopt.optimize(llama(), f"{PLAIN} | memory({least})", check=False), data)


def test_no_product_is_computed_twice_while_the_budget_can_be_met_without() -> None:
    opt = fxopt_of(llama, tokens(4, 32), f"{PLAIN} | memory(1GiB)")
    assert not any(level.again for level in planned(opt).levels)
    least = fxopt_of(llama, tokens(4, 32), f"{PLAIN} | memory(least)")
    assert any(level.again for level in planned(least).levels)


def test_gradients_that_are_there_already_count() -> None:
    data = tokens(4, 32)
    opt = fxopt.optimize(llama(), f"{PLAIN} | memory(1GiB)", check=False)
    step(opt, data)
    first = planned(opt).peak.parts["gradients"]
    loss_of(opt(**data)).backward()
    assert planned(opt).peak.parts["gradients"] > first


OPTION = st.builds(Option, st.integers(0, 20), st.integers(0, 20), st.integers(0, 20), st.floats(0, 10))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(OPTION, min_size=1, max_size=3), min_size=1, max_size=5), st.integers(0, 80), st.data())
def test_the_solver_finds_the_best_choice(options: list[list[Option]], budget: int, data: st.DataObject) -> None:
    behind = data.draw(st.lists(st.integers(0, 5), min_size=len(options), max_size=len(options)))

    def need(choice: tuple[int, ...]) -> int:
        saved = most = 0
        for at, index in enumerate(choice):
            option = options[at][index]
            most = max(most, saved + option.forward)
            saved += option.saved
            most = max(most, saved + option.backward + behind[at])
        return most

    every = list(itertools.product(*(range(len(o)) for o in options)))
    fitting = [sum(options[at][i].seconds for at, i in enumerate(c)) for c in every if need(c) <= budget]
    found = solve(options, budget, behind)
    assert (found is None) == (not fitting)
    if found is not None:
        assert need(found) <= budget
        assert sum(options[at][i].seconds for at, i in enumerate(found)) <= min(fitting) + 1e-9
    assert smallest(options, behind) == min(need(c) for c in every)


def test_the_plan_is_shown_before_a_step_and_is_what_the_step_does() -> None:
    opt = fxopt.optimize(llama(), f"{PLAIN} | memory(1GiB)", inputs=tokens(2, 16), check=False)
    small, large = opt.plan(), opt.plan(tokens(4, 32))
    assert large.peak.total > small.peak.total
    step(opt, tokens(4, 32))
    assert planned(opt).peak == large.peak
    text = str(large)
    assert "weights" in text and large.peak.node in text and "predicted time" in text
    assert opt.plan(optimizer="none").peak.parts["optimizer"] == 0 < small.peak.parts["optimizer"]
    with pytest.raises(CallError, match="no optimizer"):
        opt.plan(optimizer="lion")


def test_the_largest_batch_is_found_from_plans_and_holds_when_it_is_run() -> None:
    opt = fxopt.optimize(llama(), f"{PLAIN} | remat", inputs=tokens(2, 16, ignored=0), check=False)  # a plan counts all rows as labelled
    limit = int(opt.plan(batch=40).peak.total * 1.01)
    number, plan, call = opt.largest_call(limit)
    assert number >= 40 and plan.peak.total <= limit < opt.plan(batch=number + 1).peak.total
    assert call.tensors[0].shape == (number, 16)
    _, given = call.rebuild(call.tensors)
    found = measure(lambda: loss_of(opt(**given)), plan, [p for p in opt.parameters() if p.requires_grad], repeats=1)
    assert abs(found.peak - plan.peak.total) <= 0.05 * found.peak, found.beside(plan)
    assert opt.largest_call(limit, "length", batch=2)[0] > 16
    with pytest.raises(CallError, match="cannot hold a step of size 1"):
        opt.largest_call(1000)


@settings(max_examples=3, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(specs(), st.floats(0.0, 1.0))
def test_random_programs_stay_within_random_budgets(spec: Spec, share: float) -> None:
    """What is measured counts all that the allocator gave, and the budget all that the plan counts beside."""
    spec = dataclasses.replace(spec, dtype=torch.float32)
    given_ = inputs(spec)
    opt = fxopt.optimize(build(spec), "canonicalize | fuse | loss | memory(least)", check=False)

    def run() -> torch.Tensor:
        torch.manual_seed(3)
        return sum(x.float().sum() for x in tree_leaves(opt(**given_)) if isinstance(x, torch.Tensor) and x.requires_grad)

    parameters = [p for p in opt.parameters() if p.requires_grad]
    if not isinstance(total := run(), torch.Tensor) or not parameters:
        return  # nothing in it is trained
    total.backward()
    least = planned(opt).peak
    expected = [p.grad for p in parameters]
    opt.dispatcher.last.binding.saving = Planned(Budget(budget := int(least.total * (1.0 + share))))
    found = measure(run, opt.plan(), parameters, repeats=1)
    assert planned(opt).peak.total <= budget
    assert found.peak <= budget + SLACK, (found.peak, str(planned(opt)))
    assert all((a is None) == (b is None) and (a is None or same(a, b)) for a, b in zip((p.grad for p in parameters), expected, strict=True))


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.0625, 0.0), (1.0, 30.0)])
def test_scratch_of_an_op_is_counted_as_it_is_taken(scale: float, cap: float) -> None:
    """A loss works in blocks: what is left of one while the next is made counts, though a dry run makes two alone."""
    args = (torch.randn(512, 256), torch.randn(4096, 256), None, torch.randint(0, 4096, (512,)), 0, "mean", 0.0, cap, scale, 0.0, 0, -1, [True, False, False], [False] * 3)
    args[3][:9] = 0
    with torch.no_grad(), Allocations() as used:
        out = linear_cross_entropy.overload(*args)
    graph = torch.fx.Graph()
    given_ = [graph.placeholder(name) for name in ("hidden", "weight", "target")]
    for node, value in zip(given_, (args[0], args[1], args[3]), strict=True):
        node.meta["val"] = value
    call = graph.call_function(linear_cross_entropy.overload, (*given_[:2], None, given_[2], *args[4:]))
    graph.output(tuple(graph.call_function(operator.getitem, (call, place)) for place, value in enumerate(out) if value is not None))
    found = run(torch.fx.GraphModule(torch.nn.Module(), graph), int)
    assert used.peak <= 1.01 * found.peak and found.peak <= 1.03 * used.peak


def test_a_product_that_is_computed_alone_stands_behind_the_factor_that_it_reads() -> None:
    """Three adapted layers outside of blocks: in the backward of the first, the factor is an argument behind the layer's input."""
    def chain() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(*(layer for _ in range(3) for layer in (torch.nn.Linear(8, 8), torch.nn.ReLU())))

    x, found = torch.randn(4, 8), []
    for passes in ("lora(rank=2)", "lora(rank=2) | memory(least)"):
        opt = fxopt.optimize(chain(), passes, inputs=(x,), check=False)
        opt(x).square().sum().backward()
        found.append({name: p.grad for name, p in opt.named_parameters() if p.grad is not None})
    assert len(found[0]) == 4 and found[0].keys() == found[1].keys() and all(same(found[1][name], grad) for name, grad in found[0].items())
