"""What each region of a program saves for its backward: one rule for all, or a plan for the sizes of the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from fxopt.ir.facts import Budget
from fxopt.ir.partition import Policy, min_cut, save_all
from fxopt.ir.program import Program
from fxopt.runtime.plan import Planned

if TYPE_CHECKING:
    from fxopt.runtime.binding import Binding


class Saving(Protocol):
    """How the regions' policies are chosen."""

    def policies(self, binding: Binding, tensors: Sequence[torch.Tensor]) -> Sequence[Policy]:
        """One policy for each step of the binding, for a call with these tensors."""


class Always:
    """The same policy for every region and call."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def policies(self, binding: Binding, tensors: Sequence[torch.Tensor]) -> Sequence[Policy]:
        """The policy, once for each step."""
        return (self.policy,) * len(binding.steps)


def of(program: Program) -> Saving:
    """What the passes of a program asked for."""
    budget = next((fact for fact in program.facts if isinstance(fact, Budget)), None)
    if budget is not None:
        return Planned(budget)
    return Always(min_cut if "remat" in program.facts else save_all)
