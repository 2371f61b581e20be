"""Loss scaling: fp16 gradients are kept in range by a factor that follows what the steps show."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from fxopt.errors import CheckError, DataError
from fxopt.ir.facts import LossScale
from fxopt.ir.program import Program
from fxopt.torch_private import foreach_mul_, foreach_norm

log = logging.getLogger("fxopt")

SMALLEST = 2.0**-24


@dataclass(frozen=True)
class State:
    """Everything a loss scaler knows. A step makes a new one.

    Attributes:
        scale: what the loss is multiplied by.
        growth: what the scale is multiplied by after `interval` steps without an overflow in a row; backoff: after an overflow.
        good: steps without an overflow since the scale last changed.
        skipped: steps left out so far; in_a_row: of them, the latest without a good one between.
    """

    scale: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    good: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def __post_init__(self) -> None:
        counts = min(self.good, self.skipped, self.in_a_row)
        if not (0 < self.scale < math.inf and self.growth >= 1 and 0 < self.backoff < 1 and self.interval >= 1 and counts >= 0):
            raise DataError(f"no state of a loss scaler: {self}", do="scale is positive, growth at least 1, backoff between 0 and 1, interval at least 1")

    def after(self, finite: bool) -> State:
        """The state after a step whose gradients were finite, or were not (Micikevicius et al., 2018,
        https://arxiv.org/abs/1710.03740, section 3.2; the numbers of torch.amp.GradScaler)."""
        if not finite:
            return replace(self, scale=max(self.scale * self.backoff, SMALLEST), good=0, skipped=self.skipped + 1, in_a_row=self.in_a_row + 1)
        if self.good + 1 < self.interval:
            return replace(self, good=self.good + 1, in_a_row=0)
        grown = self.scale * self.growth
        return replace(self, scale=grown if grown < math.inf else self.scale, good=0, in_a_row=0)


class Scaler:
    """Scales losses, takes the scale out of gradients, and says whether the step may be taken.

        scaler.scale(loss).backward()
        finite = scaler.unscale_(parameters)   # clip gradients after this
        if finite:
            optimizer.step()
        scaler.update(finite)

    With several micro-batches: `scale` each loss, the rest once. `state` is the whole memory; it may be replaced at any time.
    """

    def __init__(self, state: State | None = None) -> None:
        self.state = state or State()
        self._unscaled = False

    @classmethod
    def of(cls, program: Program) -> Scaler | None:
        """A scaler that starts where the program's ranges were measured; None for a program without gradients in fp16."""
        found = next((fact for fact in program.facts if isinstance(fact, LossScale)), None)
        return None if found is None else cls(State(scale=found.scale))

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale, in at least fp32. Differentiable."""
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.state.scale

    @torch.no_grad()
    def unscale_(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Divide the gradients by the scale, in place; whether all of them are finite. Waits for the device once.

        Raises:
            CheckError: called twice without `update` between; a gradient in fp16 (dividing it there would round it to zero).
        """
        if self._unscaled:
            raise CheckError("the gradients of this step are unscaled already", do="call `update` at the end of each step")
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter in trained:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
        gradients = [parameter.grad for parameter in trained]
        if any(gradient.dtype == torch.float16 for gradient in gradients):
            raise CheckError("a trained parameter is in fp16, and so is its gradient",
                             do="keep trained parameters in fp32: precision(fp16) computes in fp16 from them")
        self._unscaled = True
        groups: dict[Any, list[torch.Tensor]] = {}
        for gradient in gradients:
            held = gradient._values() if gradient.is_sparse else gradient
            if held.numel():
                groups.setdefault((held.device, held.dtype), []).append(held)
        finite = []
        for group in groups.values():
            finite += [norm.isfinite() for norm in foreach_norm(group, math.inf)]  # NaN is the largest
            foreach_mul_(group, 1.0 / self.state.scale)
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for flag in finite:
            by_device.setdefault(flag.device, []).append(flag)
        return all(bool(torch.stack(flags).all()) for flags in by_device.values())

    def update(self, finite: bool) -> State:
        """Go on to the next step; says what was left out.

        Raises:
            CheckError: the gradients are not finite at the smallest scale either.
        """
        self._unscaled = False
        before, self.state = self.state, self.state.after(finite)
        if not finite:
            if before.scale <= SMALLEST:
                raise CheckError(f"the gradients are not finite at any loss scale ({self.state.in_a_row} steps in a row)",
                                 do="look for NaN or infinity in the inputs and the loss; keep the overflowing nodes in fp32 (precision's margin)")
            log.warning("fxopt: a gradient is not finite at a loss scale of %g: the step is left out, the scale is now %g (%d left out so far)",
                        before.scale, self.state.scale, self.state.skipped)
        return self.state

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Unscale the optimizer's gradients, step unless one of them is not finite, update. Whether the step was taken."""
        finite = self.unscale_(parameter for group in optimizer.param_groups for parameter in group["params"])
        if finite:
            optimizer.step()
        self.update(finite)
        return finite

    def state_dict(self) -> dict[str, float | int]:
        """Plain numbers."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Put a saved state back.

        Raises:
            DataError: entries are missing or unknown, or no state.
        """
        wanted = {field.name for field in fields(State)}
        if set(state) != wanted:
            raise DataError(f"a loss scaler's state has the entries {', '.join(sorted(wanted))}, not {', '.join(sorted(map(str, state)))}")
        self.state, self._unscaled = State(**state), False
