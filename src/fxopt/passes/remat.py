"""Which values are saved for the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.ir.edit import Edit
from fxopt.ir.facts import Budget
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class Remat(Pass):
    """save the fewest bytes that need no heavy recomputation

    When a region's joint graph is traced, the saved set is a minimum cut: no matrix product, convolution or attention
    is computed twice, no random operation is ever repeated, everything pointwise may be.
    """

    name: ClassVar[str] = "remat"
    establishes: ClassVar[frozenset[str]] = frozenset({"remat"})
    promise: ClassVar[Promise] = Promise(values="same")

    def run(self, edit: Edit) -> None:
        """Leaves the graph alone: the fact decides how regions are partitioned."""
        if any(isinstance(fact, Budget) for fact in edit.facts):
            edit.note("the memory pass plans what each region saves, so this changes nothing")
        else:
            edit.note("the saved set of each region is a minimum cut, made when its joint graph is traced")
