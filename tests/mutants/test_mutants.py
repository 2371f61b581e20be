"""The certificate catches planted wrong rewrites: a sample in every run, all of them with -m slow (`make mutants` writes the table)."""

from __future__ import annotations

import pytest

from mutants.hunt import MUTANTS, hunt

# two programs, so that little is captured; every kind of mutant
SAMPLE = [name for name, mutant in MUTANTS.items() if mutant.program in ("decoder", "mixed")][::13]


def test_there_are_enough_of_each_kind() -> None:
    kinds = [mutant.kind for mutant in MUTANTS.values()]
    assert len(kinds) >= 100
    assert all(3 * kinds.count(kind) >= 100 for kind in ("graph", "pass", "op"))
    assert {MUTANTS[name].kind for name in SAMPLE} == {"graph", "pass", "op"}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    assert hunt(MUTANTS[name]).by


@pytest.mark.slow
def test_all() -> None:
    missed = [name for name, mutant in MUTANTS.items() if not hunt(mutant).by]
    assert len(missed) <= len(MUTANTS) / 100, missed
