"""The zoo: a few entries by default, all with -m slow; and that the count and the comparison can fail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.zoo import coverage, examine, page, pool, sites
from tests.zoo.batches import tokens
from tests.zoo.entry import Batch, Written
from tests.zoo.plain import given
from tests.zoo.table import ENTRIES, ZOO

KEPT = page.kept()

# Of different build, and how many norms, layer norms, gated units and rotations they have: counted by hand.
FEW = {
    "Llama": (5, 0, 2, 4),
    "GPT-NeoX": (0, 5, 0, 4),
    "ViT": (0, 5, 0, 0),
    "codebook": (0, 0, 0, 0),
    "recommender with bags": (0, 0, 0, 0),
    "messages on a graph": (0, 0, 0, 0),
}
GOAL, WHOLE = 120, 0.9


def test_there_are_enough() -> None:
    assert len(ZOO) == len(ENTRIES) >= GOAL
    assert set(KEPT) <= set(ZOO) and len(KEPT) >= GOAL, "run `make zoo`"
    assert sum(r.captured == "whole" for r in KEPT.values()) >= WHOLE * len(KEPT)
    assert [r.name for r in KEPT.values() if r.wrong] == []


@pytest.mark.parametrize("name", FEW)
def test_a_few(name: str) -> None:
    result = examine.examine(ZOO[name], modes=("fp32",))
    assert result.wrong == [] and result.captured == "whole" and result.impossible == []
    assert tuple(result.fired["fp32"][kind][1] for kind in page.FULL) == FEW[name]
    assert all(k == n for kind, (k, n) in result.fired["fp32"].items() if kind != "loss"), result.why
    assert result.gradients == len(list(ZOO[name].build().parameters())) and len(result.errors["plain"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_all(name: str) -> None:
    """As the page says."""
    result, said = examine.examine(ZOO[name]), KEPT.get(name)
    assert result.wrong == [] and said is not None, "run `make zoo`"
    assert (result.captured, result.adapters, result.captures, result.impossible) == (said.captured, said.adapters, said.captures, said.impossible)
    assert all(result.fired[mode] == {kind: tuple(pair) for kind, pair in counts.items()} for mode, counts in said.fired.items())


# -- the count can fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.LayerNorm(8), "LayerNorm"),
        (nn.LayerNorm(8, elementwise_affine=False), "LayerNorm"),
        (nn.RMSNorm(8), "RMSNorm"),
        (nn.BatchNorm1d(5), None),
        (nn.GroupNorm(1, 5), None),
        (nn.Softmax(-1), None),
        (nn.Dropout(0.0), None),
        (nn.GELU(), None),
    ],
)
def test_norms_are_known_by_what_they_do(module: nn.Module, kind: str | None) -> None:
    assert sites.norm(module, (torch.randn(3, 5, 8),)) == kind


class Unseen(nn.Module):
    """A gated unit whose parts have names that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.a(x)) * self.b(x)


class Quartic(nn.Module):
    """x over the fourth root of the mean of its fourth powers: in effect an RMSNorm to the count, but there is no op for it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(torch.sqrt(x.pow(4).mean(-1, keepdim=True)) + 1e-6) * self.weight


def _entry(make: Callable[[], nn.Module]) -> Written:
    return Written("x", "test", make, given(x=("B", "L", 8)))


def test_an_op_where_no_place_was_counted_is_told() -> None:
    result = examine.examine(_entry(Unseen), modes=("fp32",), adapters=False)
    assert result.impossible == ["gated MLP in the root"]


def test_a_place_that_stays_has_a_reason() -> None:
    result = examine.examine(_entry(lambda: Named(Quartic(8))), modes=("fp32",), adapters=False)
    (reason,) = result.why["RMSNorm"]["fp32"]
    assert reason.startswith("rms_norm.") and result.fired["fp32"]["RMSNorm"] == (0, 1)


class Named(nn.Module):
    """A module inside another, called with its input by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


# -- the comparison can fail -----------------------------------------------------------------------------------------


def test_another_gradient_is_told() -> None:
    entry = _entry(Unseen)
    opt = examine._optimized(entry.build(), None, entry.inputs())
    with torch.no_grad():
        opt.model.b.weight[0, 0] += 0.5
    result = examine.Result("x", "test")
    examine._compare(result, "plain", entry, entry.build(), opt, coverage.programs(opt), lambda m: dict(examine._learning(m)),
                     lambda: dict(examine._learning(opt.model)))
    assert any("the gradient of a.weight differs" in line for line in result.wrong) and result.where["plain"] != "nothing"


def test_a_missing_gradient_is_told_and_one_of_zeros_is_not() -> None:
    one, zero = torch.ones(2), torch.zeros(2)
    errors = examine.differences({"the gradient of a": one, "the gradient of b": zero, "the gradient of c": None}, {"the gradient of d": one})
    assert errors == {"the gradient of a": float("inf"), "the gradient of b": 0.0, "the gradient of c": 0.0, "the gradient of d": float("inf")}


def test_shares_are_of_what_is_captured() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 24, bias=False))
    batch: Batch = {"": (torch.randn(2, 8),)}
    assert coverage._parameters(model, {"0": None}) == coverage._flops(model, batch, {"0": None}) == 0.25
    assert coverage._flops(model, batch, {"": None}) == 1.0


# -- the pool survives -----------------------------------------------------------------------------------------------


def _work(entry: Written) -> examine.Result:
    if entry.name == "crash":
        os._exit(7)
    if entry.name == "error":
        raise ValueError("no good")
    if entry.name == "endless":
        time.sleep(60)
    return examine.Result(entry.name, entry.family)


def test_a_crash_costs_one_entry() -> None:
    entries = [Written(name, "test", Unseen, tokens) for name in ("crash", "fine", "error", "endless", "good")]
    results = {r.name: r for r in pool.run(entries, jobs=2, limit=2.0, work=_work)}
    assert {name: r.captured for name, r in results.items()} == {"crash": "refused", "fine": "whole", "error": "refused", "endless": "refused", "good": "whole"}
    assert "code 7" in results["crash"].reason and "no good" in results["error"].reason and "not done" in results["endless"].reason
    assert all(r.wrong for r in results.values() if r.captured == "refused")
