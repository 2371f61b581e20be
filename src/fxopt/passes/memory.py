"""A budget of bytes for the training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fxopt.errors import PassError
from fxopt.ir.edit import Edit
from fxopt.ir.facts import Budget
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class Memory(Pass):
    """keep a training step within a budget of bytes

    What each region saves for its backward is planned for the sizes of each call, so that the step stays within the budget and
    takes least time: keep, recompute what is pointwise, recompute products, and on a device with memory of its own wait on the host
    (`ir/offload.py`: exact, the values of two regions in transfer at a time). No product is computed twice while the budget can be met without. Random operations are never repeated: what they drew is kept. A call that cannot be held is refused, with
    the smallest budget that could.

    With `compress`, saved values may also be kept in 8 bits (`ir/compress.py`: which, and how far they are off): where the budget cannot be kept
    otherwise, or where that is faster than computing products again. Losses and outputs stay exact, gradients do not.

    Args:
        budget: bytes of weights, gradients, optimizer state, activations and scratch together, such as 6GiB; or "least", which
            takes as little as can be, whatever the time.
        optimizer: whose state is counted: "adamw", "adamw_8bit", "momentum", "sgd" or "none" (the state is elsewhere).
        compress: allow saved values of 8 bits. The check of a capture compares all gradients with the exact ones, says the largest difference,
            and refuses more than `kernels.tolerance.COMPRESSED`.
    """

    budget: int | Literal["least"]
    optimizer: Literal["adamw", "adamw_8bit", "momentum", "sgd", "none"] = "adamw"
    compress: bool = False

    name: ClassVar[str] = "memory"
    establishes: ClassVar[frozenset[str]] = frozenset({"remat"})
    promise: ClassVar[Promise] = Promise(values="same")

    def __post_init__(self) -> None:
        if self.budget != "least" and self.budget < 1:
            raise PassError(f"memory: the budget must be above 0, got {self.budget}", do="write memory(6GiB), or memory(least)")

    def run(self, edit: Edit) -> None:
        """Leaves the graph alone: the fact decides how regions are partitioned."""
        edit.facts -= {fact for fact in edit.facts if isinstance(fact, Budget)}
        edit.facts.add(Budget(None if self.budget == "least" else self.budget, self.optimizer, self.compress))
        edit.note("what each region saves is planned for the sizes of each call: see `plan()`")
        if self.compress:
            edit.note("values may be saved in 8 bits: gradients are then approximate; `plan()` names the regions, the check says by how much")
