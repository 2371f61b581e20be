"""Random programs through every legal pass and random orders; failures of the past; torch's operators. Many more: `make fuzz`, `make fuzz-ops`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fxopt.ir.edit import Edit
from fxopt.passes.base import Pass
from fuzz import run
from fuzz.build import Plan, build
from fuzz.minimize import nodes, smaller
from fuzz.operators import OPERATORS, name_of, outcome
from fuzz.run import Counts, Failure, check, plan_of
from fuzz.steps import HEADS, KINDS

REGRESSIONS = sorted((Path(__file__).resolve().parent.parent / "regressions").glob("*.json"))
PROGRAMS = 1000  # of a default run, 0.2 CPU seconds each; `make fuzz N=20000` runs more
BATCH = 25


@pytest.mark.parametrize("first", range(0, PROGRAMS, BATCH))
def test_random_programs(first: int) -> None:
    counts = Counts()
    for seed in range(first, first + BATCH):
        check(plan_of(seed), counts)
    assert counts.changed > 5 * BATCH and counts.unproven < counts.changed / 10


@pytest.mark.slow
def test_many_random_programs() -> None:
    for seed in range(10_000, 12_000):
        check(plan_of(seed))


@pytest.mark.parametrize("file", REGRESSIONS, ids=lambda file: file.stem)
def test_what_failed_once(file: Path) -> None:
    check(Plan.read(file.read_text()))


def test_plans_are_data_and_their_programs_run_at_any_size() -> None:
    for seed in range(20):
        plan = plan_of(seed)
        assert Plan.read(plan.json()) == plan
        made = build(plan, KINDS, HEADS)
        outputs = made.program.run([t.detach().clone() for t in made.inputs], {name: t.clone() for name, t in made.state.items()})
        assert all(isinstance(out, torch.Tensor) for out in outputs)


def test_a_failure_is_made_small() -> None:
    """A pass that is wrong for one operation is found by a program of little else."""
    plan = Plan((("linear", 0, 0, 1), ("norm", 0, 0, 1), ("activation", 0, 0, 3), ("gated", 0, 0, 1), ("special", 0, 0, 3)), head="shift", ids=True, seed=4)

    def tanh(plan: Plan) -> bool:
        return any(node.target is torch.ops.aten.tanh.default for node in build(plan, KINDS, HEADS).program.nodes)

    small = smaller(plan, tanh)
    assert tanh(small) and nodes(small) <= 10 and len(small.steps) == 1 and small.head == "none"


def test_a_wrong_result_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong pass in place of another is caught."""

    @dataclasses.dataclass(frozen=True)
    class Wrong(Pass):
        """tanh becomes sigmoid"""

        name: ClassVar[str] = "dead_code"

        def run(self, edit: Edit) -> None:
            for node in edit.nodes:
                if node.target is torch.ops.aten.tanh.default:
                    edit.set_target(node, torch.ops.aten.sigmoid.default)

    monkeypatch.setitem(run._ONE_BY_ONE, "dead_code", Wrong())
    with pytest.raises(Failure, match="canonicalize . dead_code.*differs"):
        check(Plan((("activation", 0, 0, 3),), dynamic=False))


@pytest.mark.parametrize("op", OPERATORS[::60], ids=name_of)
def test_operators(op: object) -> None:
    assert outcome(op).what in ("equal", "refused", "no sample")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS, ids=name_of)
def test_all_operators(op: object) -> None:
    assert outcome(op).what in ("equal", "refused", "no sample")  # type: ignore[arg-type]
