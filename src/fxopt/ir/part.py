"""A program of a part of a model: what passes must know of the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PartOf:
    """A fact: the program is one of several that a model's Python code calls. A pass that has to find something in the model may
    find nothing in one of its parts, and what the part returns is no output of the model.

    Attributes:
        path: of the module that was captured.
        last: no weight is multiplied with anything behind it in the model's call, so that an output head may be in it.
        first: none before it either.
    """

    path: str
    last: bool = False
    first: bool = False


def part_of(facts: Iterable[Any]) -> PartOf | None:
    """What part of a model the program with these facts is; None for a whole one."""
    return next((fact for fact in facts if isinstance(fact, PartOf)), None)
