"""A failing plan made smaller, by leaving out steps and then nodes, while it fails in the same pass (Zeller and Hildebrandt, 2002, delta debugging)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fuzz.build import Plan, build
from fuzz.run import Failure, check
from fuzz.steps import HEADS, KINDS


def fails(plan: Plan) -> str | None:
    """The failure, or None. A plan that cannot be built does not fail."""
    try:
        build(plan, KINDS, HEADS)
    except Exception:
        return None
    try:
        check(plan)
    except Failure as failure:
        return str(failure)
    return None


def smaller(plan: Plan, failing: Callable[[Plan], bool] = lambda plan: fails(plan) is not None) -> Plan:
    """The smallest plan found that still fails."""
    steps = list(plan.steps)
    i = 0
    while i < len(steps) and len(steps) > 1:
        tried = dataclasses.replace(plan, steps=tuple(steps[:i] + steps[i + 1:]))
        if failing(tried):
            steps, plan = list(tried.steps), tried
        else:
            i += 1
    for change in ({"head": "none"}, {"dynamic": False}, {"ids": False}, {"dtype": "float32"}):
        tried = dataclasses.replace(plan, **change)
        if tried != plan and failing(tried):
            plan = tried
    for number in range(nodes(dataclasses.replace(plan, dropped=()))):
        tried = dataclasses.replace(plan, dropped=(*plan.dropped, number))
        if nodes(tried) < nodes(plan) and failing(tried):
            plan = tried
    return plan


def nodes(plan: Plan) -> int:
    """How many operations the plan's program has."""
    return sum(node.op == "call_function" for node in build(plan, KINDS, HEADS).program.graph.nodes)
