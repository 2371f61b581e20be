"""Whether a certificate catches a mutant."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fxopt.errors import PassError
from fxopt.ir.program import Program, Sample
from fxopt.passes.cases import cases
from fxopt.passes.certify import Certifier
from fxopt.passes.pipeline import apply, run
from mutants.graphs import MUTANTS as GRAPHS
from mutants.mutant import Mutant
from mutants.passes import MUTANTS as PASSES
from mutants.programs import program

MUTANTS = {mutant.name: mutant for mutant in (*GRAPHS, *PASSES)}
assert len(MUTANTS) == len(GRAPHS) + len(PASSES), "two mutants have one name"
RUNS, SEED = 2, 0


@dataclass(frozen=True)
class Verdict:
    """How a mutant was caught: "structure", "values", or "" if it was not; on which case, and what was said."""

    by: str
    case: str
    says: str


@functools.cache
def stage_before(name: str, passes: str) -> Program:
    """The program that a mutant is planted in."""
    captured = program(name)
    return run(passes, captured.program, sample=Sample(captured.inputs, captured.state)) if passes else captured.program


def certifier(name: str, before: Program) -> Certifier:
    """A certifier that has come as far as `before`."""
    captured = program(name)
    history = list(reversed(list(before.history())))
    found = Certifier(cases(history[0], captured.inputs, RUNS, SEED), captured.state)
    for a, b in zip(history, history[1:]):
        found.advance(a, b)
    return found


def hunt(mutant: Mutant) -> Verdict:
    """Plant a mutant and certify the application.

    Raises:
        CheckError: it could not be planted.
    """
    captured = program(mutant.program)
    before = stage_before(mutant.program, mutant.before)
    planted = mutant.planted()
    try:
        after = apply(planted, before, Sample(captured.inputs, captured.state))
    except PassError as error:
        if "failed:" in error.what:
            raise
        return Verdict("structure", "", error.what)
    stage = certifier(mutant.program, before).stage(planted, before, after, stop=True)
    if not stage.problems:
        return Verdict("", "", "")
    facts = [says for name, says in stage.facts.items() if says is not None]
    failed = next((each for each in stage.results if each.status == "failed"), None)
    return Verdict("structure", "", facts[0]) if failed is None else Verdict("values", failed.case, failed.says)


def hunted(names: list[str]) -> dict[str, Verdict]:
    """The verdict of each."""
    torch.set_num_threads(1)
    return {name: hunt(MUTANTS[name]) for name in names}
