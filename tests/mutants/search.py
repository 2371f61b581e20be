"""Whether bisecting a mutant names the sabotaged pass and the sabotaged site."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass

from fxopt.ir.edit import Edit
from fxopt.ir.program import Program, Sample
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
    """The number of the rewrite that made the node which a mutant changes; None if no rewrite did."""
    planted = mutant.planted()
    assert isinstance(planted, Sabotaged)
    if planted.inner is None or not planted.at:
        return planted.nth if planted.inner is not None else None
    captured = program(mutant.program)
    edit = Edit(before, "search", Sample(captured.inputs, captured.state))
    planted.inner.run(edit)
    node = planted.site(edit)
    names = [node.name, *(user.name for user in node.users if user.target is operator.getitem)]
    return next((i for i, rewrite in enumerate(edit.rewrites) if rewrite.node in names), None)


def searchable(mutant: Mutant) -> bool:
    """Whether a rewrite of the pass made what is changed."""
    return bool(mutant.inner) and site_of(mutant, stage_before(mutant.program, mutant.before)) is not None


def search(mutant: Mutant) -> Found:
    """Apply a sabotaged pass in a pipeline, and bisect."""
    captured = program(mutant.program)
    before = stage_before(mutant.program, mutant.before)
    index = site_of(mutant, before)
    assert index is not None
    planted = dataclasses.replace(mutant.planted(), at="", nth=index)
    object.__setattr__(planted, "promise", mutant.planted().promise)
    sample = Sample(captured.inputs, captured.state)
    wrong = apply(planted, before, sample, promised=False)
    expected = wrong.log[-1].rewrites[index]
    stage = certifier(mutant.program, before).stage(planted, before, wrong, stop=True)
    stages = (*(Stage(record.text, {}, "", "", 0, {}, ()) for record in before.log), stage)
    certificate = Certificate("", None, "", True, RUNS, SEED, {}, "", {}, stages)
    found = bisect(wrong, [*applied(before), planted], captured.inputs, captured.state, certificate=certificate)
    return Found(found.pass_ is planted, len(found.site) <= 2 and expected in found.site, found.of, found.tried, found.repro.text.count("\n") if found.repro else 0)
