"""canonicalize: one spelling for equal computations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.ir.edit import Edit
from fxopt.ir.normal import normalize
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class Canonicalize(Pass):
    """one spelling for equal computations; erases what does nothing

    Erases metadata asserts, casts, views and arithmetic that change nothing; turns in-place operators on private
    values into ordinary ones; computes equal values of one module once; drops dead code. Every rewrite is exact.
    """

    name: ClassVar[str] = "canonicalize"
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical"})
    promise: ClassVar[Promise] = Promise(values="exact")

    def run(self, edit: Edit) -> None:
        """Rewrite to a fixed point: erasing one no-op can make two values equal."""
        while normalize(edit):
            pass
