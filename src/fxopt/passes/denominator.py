"""denominator: what the loss is the mean of, read from the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.ir.denominator import Denominator as Count, derive
from fxopt.ir.edit import Edit
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class Denominator(Pass):
    """find what the loss is the mean of, for steps of several batches

    Leaves the graph as it is and sets a fact: the loss as a sum over the samples divided by a count, with the graph that computes
    the count of a batch from its inputs. Accumulation then equals one large batch for any split. The terminal mean is found
    behind scalar arithmetic, and that no sample has an influence on another is proven from the operators; where it cannot be
    (contrastive losses, batch norm in training mode), the record says why and where.
    """

    name: ClassVar[str] = "denominator"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset()
    promise: ClassVar[Promise] = Promise(values="same")

    def run(self, edit: Edit) -> None:
        """Derive it from the program as it was before other passes: they compute the same loss."""
        edit.facts -= {fact for fact in edit.facts if isinstance(fact, Count)}
        found = derive(edit.source)
        if isinstance(found, Count):
            edit.facts.add(found)
            edit.note(str(found))
        else:
            edit.note(f"the loss has no denominator that batches could share: {found.reason}" + (f" ({found.where})" if found.where else ""))
