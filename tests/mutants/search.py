"""Whether bisecting a mutant names the sabotaged pass and the sabotaged site."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass

from fxopt.ir.edit import Edit
from fxopt.ir.program import Program, Rewrite, Sample
from fxopt.passes.bisect import bisect
from fxopt.passes.certificate import Certificate, Stage
from fxopt.passes.pipeline import applied, apply
from mutants.hunt import RUNS, SEED, certifier, stage_before
from mutants.mutant import Mutant, Sabotaged
from mutants.programs import program


@dataclass(frozen=True)
class Found:
    """What a search found: whether the pass is right, whether the site is, how many rewrites the pass makes, how many programs were tried, and
    the number of lines of the script (0: none)."""

    pass_: bool
    site: bool
    of: int
    tried: int
    lines: int


def site_of(mutant: Mutant, before: Program) -> int | None:
    """The number of the rewrite that made the node which a mutant changes, or that reads it as part of what it made; None if no rewrite did."""
    planted = mutant.planted()
    assert isinstance(planted, Sabotaged)
    if planted.inner is None or not planted.at:
        return planted.nth if planted.inner is not None else None
    captured = program(mutant.program)
    edit = Edit(before, "search", Sample(captured.inputs, captured.state))
    planted.inner.run(edit)
    node = planted.site(edit)
    known = {each.name for each in before.nodes}
    waiting = [node]
    while waiting:  # forward through what the pass made
        names = [each.name for each in waiting] + [user.name for each in waiting for user in each.users if user.target is operator.getitem]
        found = [i for i, rewrite in enumerate(edit.rewrites) if rewrite.node in names]
        if found:
            return max(found)  # of several rewrites that became one operation, it is made with the last
        waiting = [user for each in waiting if each.name not in known for user in each.users if user.name not in known]
    return None


def _same(a: Rewrite, b: Rewrite) -> bool:
    """Whether two records are of one rewrite. Results of rotations are numbered anew when two become one operation: their place tells."""
    return a == b or a.rule.startswith("rope") and dataclasses.replace(a, node=b.node) == b


def searchable(mutant: Mutant) -> bool:
    """Whether there is a pass around the change."""
    return bool(mutant.inner)


def search(mutant: Mutant) -> Found:
    """Apply a sabotaged pass in a pipeline, and bisect."""
    captured = program(mutant.program)
    before = stage_before(mutant.program, mutant.before)
    index = site_of(mutant, before)
    planted = dataclasses.replace(mutant.planted(), needs=index)
    object.__setattr__(planted, "promise", mutant.planted().promise)
    sample = Sample(captured.inputs, captured.state)
    wrong = apply(planted, before, sample, promised=False)
    expected = wrong.log[-1].rewrites[-1 if index is None else index]
    stage = certifier(mutant.program, before).stage(planted, before, wrong, stop=True)
    stages = (*(Stage(record.text, {}, "", "", 0, {}, ()) for record in before.log), stage)
    certificate = Certificate("", None, "", True, RUNS, SEED, {}, "", {}, stages)
    found = bisect(wrong, [*applied(before), planted], captured.inputs, captured.state, certificate=certificate)
    return Found(found.pass_ is planted, len(found.site) <= 2 and any(_same(each, expected) for each in found.site), found.of, found.tried, found.repro.text.count("\n") if found.repro else 0)
