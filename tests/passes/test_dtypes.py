"""Which values fit into 16 bits, where casts go, and the check of every edge."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fxopt.errors import PassError
from fxopt.ir.edit import Edit
from fxopt.ir.facts import LossScale
from fxopt.ir.program import Program, Sample
from fxopt.passes import dtypes, dtypes_cut, dtypes_plan, dtypes_ranges
from fxopt.passes.pipeline import apply, build
from tests.passes.test_precision import LOW, Perceptron, captured, dtype_at, kept

aten = torch.ops.aten


def test_the_cut_is_the_cheapest_and_the_narrowest() -> None:
    rng = random.Random(0)
    for _ in range(60):
        free, fixed = [f"n{i}" for i in range(rng.randint(1, 6))], {True: True, False: False}
        values = [dtypes_cut.Value(tuple(rng.choices([*free, True, False], k=rng.randint(2, 4))), rng.randint(1, 5)) for _ in range(rng.randint(1, 8))]

        def cost(labels: Mapping[Any, bool], values: list[dtypes_cut.Value] = values) -> int:
            return sum(value.cost for value in values if len({labels[member] for member in value.members}) > 1)

        found = {name: True for name in free} | dtypes_cut.choose(fixed, values)
        every = [{**fixed, **dict(zip(free, each))} for each in itertools.product([False, True], repeat=len(free))]
        best = min(map(cost, every))
        assert cost(found) == best
        assert sum(found.values()) == max(sum(labels.values()) for labels in every if cost(labels) == best)


# -- values that do not fit ------------------------------------------------------------------------------------------------


class Ranges(nn.Module):
    """Layers in the middle of the range, and one branch that leaves it: forward, on the way back, or towards zero."""

    def __init__(self, leaves: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.leaves = leaves
        self.usual = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4096, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.usual:
            y = torch.tanh(layer(y))
        z = self.first(x)
        if self.leaves == "forward":
            return y.sum() + (self.second(z * 4e5) * 1e-6).sum()
        if self.leaves == "backward":  # 4,096 gradients of one sign add up; z is small
            return 1e-6 * y.sum() + self.second(z).sum()
        return y.sum() + (self.second(z) * 1e-9).sum() if self.leaves == "zero" else y.sum() + 0.001 * self.second(z).sum()


def ranges(leaves: str) -> tuple[Program, Sample]:
    model = Ranges(leaves)
    with torch.no_grad():
        if leaves == "forward":
            model.second.weight.mul_(1e-3)
        if leaves == "backward":
            model.second.weight.fill_(30.0)
            model.first.weight.mul_(1e-2)
            model.first.bias.fill_(1e-4)
    return captured(model, (torch.randn(4, 8),))


def test_what_overflows_forward_is_named_and_kept() -> None:
    program, sample = ranges("forward")
    after = apply(build("precision", dtype="fp16"), program, sample)
    assert kept(after).keys() == {"mul"} and "it overflows" in kept(after)["mul"]
    reader = next(miss for miss in after.log[-1].misses if "it reads `mul`" in miss.reason)
    assert reader.node == "linear_5" and reader.path == "second"
    assert dtype_at(after, "mul") == dtype_at(after, "linear_5") == torch.float32 and dtype_at(after, "linear") == torch.float16
    step = dtypes_ranges.run(after, sample, scale=64.0)
    assert all(grad.isfinite().all() for grad in step.gradients.values())
    wide = apply(build("precision", dtype="fp16", margin=1.0), program, sample)
    assert "mul" in kept(wide)
    assert not kept(apply(build("precision", dtype="bf16"), program, sample))  # bf16 has fp32's range
    blind = apply(build("precision", dtype="fp16"), program)
    assert not kept(blind) and any("no example call to measure on" in note for note in blind.log[-1].notes)


def test_what_overflows_on_the_way_back_is_named_and_kept() -> None:
    program, sample = ranges("backward")
    after = apply(build("precision", dtype="fp16"), program, sample)
    assert kept(after).keys() == {"linear_4"} and "its gradient overflows" in kept(after)["linear_4"]
    assert next(miss for miss in after.log[-1].misses if miss.node == "linear_4").path == "first"
    assert dtype_at(after, "linear_4") == dtype_at(after, "linear_5") == torch.float32 and dtype_at(after, "linear_3") == torch.float16
    scale = next(fact.scale for fact in after.facts if isinstance(fact, LossScale))
    step = dtypes_ranges.run(after, sample, scale=scale)
    assert all(grad.isfinite().all() for grad in step.gradients.values())
    with pytest.MonkeyPatch.context() as patch:  # without the ranges it does overflow
        patch.setattr(dtypes_ranges, "outside", lambda *args: {})
        worse = apply(build("precision", dtype="fp16"), program, sample)
    assert not all(grad.isfinite().all() for grad in dtypes_ranges.run(worse, sample, scale=scale).gradients.values())


def test_gradients_that_vanish_are_named_and_kept() -> None:
    program, sample = ranges("zero")
    after = apply(build("precision", dtype="fp16"), program, sample)
    found = kept(after)
    assert "linear_5" in found and "its gradient underflows" in found["linear_5"]
    assert not {"linear", "linear_1", "linear_2", "linear_3"} & found.keys()
    assert not kept(apply(build("precision", dtype="fp16"), *ranges("nothing")))


# -- edges -----------------------------------------------------------------------------------------------------------------


def test_a_planted_cast_is_refused_with_its_place() -> None:
    program, _ = captured(Perceptron(), (torch.randn(6, 8), torch.randn(6, 4)))
    for planted, what in ((aten.linear.default, "reads bfloat16 and float32"), (aten.gelu.default, "is recorded")):
        edit = Edit(program, by="wrong")
        before = dtypes.read_dtypes(edit.nodes)
        assert dtypes.check_edges(edit, before) > 10
        node = next(node for node in edit.nodes if node.target is planted)
        edit.set_args(node, (edit.call(aten.to.dtype, (node.args[0], torch.bfloat16), like=node), *node.args[1:]))
        with pytest.raises(PassError, match=what) as error:
            dtypes.check_edges(edit, before)
        assert node.name in str(error.value) and "test_precision.py" in str(error.value)


def test_a_lost_cast_of_the_pass_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program, sample = captured(Perceptron(), (torch.randn(6, 8), torch.randn(6, 4)))
    real = dtypes_plan._Rewriter._version
    monkeypatch.setattr(dtypes_plan._Rewriter, "_version", lambda self, value, *rest: value if value.name == "b_weight" else real(self, value, *rest))
    with pytest.raises(PassError, match=r"linear") as error:
        apply(build("precision", dtype="bf16"), program, sample)
    assert "where: linear_1: b (test_precision.py" in str(error.value)


def test_an_operator_without_a_kernel_stays_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    program, sample = captured(Perceptron(), (torch.randn(6, 8), torch.randn(6, 4)))
    real = dtypes_ranges._Run.run_node

    def refuse(self: Any, n: Any) -> Any:
        if n.target is aten.gelu.default and n.args[0].meta["val"].dtype == torch.float16:
            raise dtypes_ranges.Refused(n, "\"gelu\" not implemented for 'Half'")
        return real(self, n)

    monkeypatch.setattr(dtypes_ranges._Run, "run_node", refuse)
    after = apply(build("precision", dtype="fp16"), program, sample)
    assert dtype_at(after, "gelu") == torch.float32 and dtype_at(after, "linear_1") == torch.float16
    assert any("has no kernel for float16" in miss.reason for miss in after.log[-1].misses if miss.node == "gelu")


class Masked(nn.Module):
    """Attention with an additive mask that hides with the smallest fp32 number: one row is hidden whole."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.qkv = fused, nn.Linear(8, 24)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, -1))
        mask = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)[:, None]
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return torch.softmax(q @ k.mT + mask, -1) @ v


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", LOW)
def test_masks_beyond_the_range_hide_and_make_no_nan(fused: bool, dtype: str) -> None:
    keep = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    keep[0, 3] = False
    program, sample = captured(Masked(fused), (torch.randn(2, 5, 8), keep))
    after = apply(build("precision", dtype=dtype), program, sample)
    exact, found = (dtypes_ranges.run(each, sample).outputs[0] for each in (program, after))
    assert found.isfinite().all()
    # in a row that hides everything, which nobody may read, fp16's smallest number leaves the scores' differences standing
    rows = keep.any(-1)[:, None] if dtype == "fp16" else torch.ones(2, 1, 5, dtype=torch.bool)
    assert float((found - exact)[rows].norm() / exact[rows].norm()) <= torch.finfo(LOW[dtype]).eps
    assert len({node.meta["val"].dtype for node in after.nodes if node.target in (aten.matmul.default, aten.scaled_dot_product_attention.default)} - {LOW[dtype]}) == 0
