"""Which steps are not taken: losses and gradients that are not finite, and spikes."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fxopt.errors import CheckError, DataError

log = logging.getLogger("fxopt")

# The median absolute deviation of a normal distribution, times this, is its standard deviation (1 / Phi^-1(3/4)).
_DEVIATION = 1.4826


@dataclass
class Spikes:
    """Leaves out a step whose loss or gradient norm is far above those of the steps before it.

    Far is `factor` deviations above the median of the last `window` steps; the deviation is the median one, but at least a twentieth of
    the median, so that a flat curve has no spikes of nothing.

    Attributes:
        factor: deviations. window: steps that are looked back on. after: steps before the first judgement. in_a_row: so many left out
            one after the other are an error: then it is no spike.
    """

    factor: float = 6.0
    window: int = 64
    after: int = 16
    in_a_row: int = 5
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    left_out: int = 0

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 4 <= self.after <= self.window and self.in_a_row >= 1):
            raise DataError(f"no detection of spikes: {self}", do="factor is positive, after at least 4 and at most window, in_a_row at least 1")

    def reason(self, loss: float, norm: float) -> str:
        """Why a step is a spike; empty if it is none, and it is remembered then.

        Raises:
            CheckError: too many in a row.
        """
        for what, value, seen in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if len(seen) < self.after:
                continue
            median = statistics.median(seen)
            deviation = max(_DEVIATION * statistics.median(abs(other - median) for other in seen), 0.05 * abs(median))
            if value > median + self.factor * deviation:
                self.left_out += 1
                if self.left_out > self.in_a_row:
                    raise CheckError(f"{self.left_out} steps in a row are spikes (the last: {what} {value:.4g}, median {median:.4g}).", do="Lower the learning rate, or resume from before.")
                return f"{what} {value:.4g} is a spike (median of {len(seen)} steps: {median:.4g})"
        self.left_out = 0
        for value, seen in ((loss, self.losses), (norm, self.norms)):
            seen.append(value)
            del seen[: -self.window]
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"losses": list(self.losses), "norms": list(self.norms), "left_out": self.left_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.losses, self.norms, self.left_out = list(state["losses"]), list(state["norms"]), state["left_out"]


class Guard:
    """Judges each step before the optimizers take it.

    Args:
        not_finite: "raise" or "skip". spikes: None: none are looked for.
    """

    def __init__(self, not_finite: str = "raise", spikes: Spikes | None = None) -> None:
        if not_finite not in ("raise", "skip"):
            raise DataError(f"`not_finite` is {not_finite!r}.", where="the trainer", do="Write raise or skip.")
        self.not_finite, self.spikes = not_finite, spikes

    def judge(self, step: int, losses: Sequence[float], loss: float, elsewhere: Sequence[int], norm: float, model: nn.Module, first_batch: int, scaled: bool,
              locate: Callable[[int], str]) -> str:
        """Why a step is not taken; empty if it is.

        Args:
            step: its number, from 1. losses: of this rank's batches. loss: of all ranks'. elsewhere: ranks that have one that is not
                finite. norm: of its gradients. first_batch: the place of the first batch in its
                epoch. scaled: the run has a loss scaler, which expects overflows. locate: where in the model a batch of the step becomes bad.

        Raises:
            CheckError: something is not finite, and that is not to be skipped; or too many spikes.
        """
        for index, value in enumerate(losses):
            if not math.isfinite(value):
                place = locate(index)
                return self._refuse(f"The loss of step {step} is {value}", f"batch {index + 1} of {len(losses)} in this step, number {first_batch + index} of the epoch"
                                    + (f"; first at {place}" if place else ""), "Lower the learning rate or look at that batch.")
        if elsewhere:
            return self._refuse(f"The loss of step {step} is not finite", f"rank {elsewhere[0]}, which says more", "Lower the learning rate or look at that rank's batches.")
        if not math.isfinite(norm):
            bad = (name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
            where = next(bad, "the norm of all gradients overflows")
            if scaled:
                return f"the gradient of {where} overflows at this loss scale"
            place = next(filter(None, map(locate, range(len(losses)))), "")
            return self._refuse(f"The gradient of step {step} is not finite, though the loss is", where + (f"; first at {place}" if place else ""), "Lower the learning rate.")
        return self.spikes.reason(loss, norm) if self.spikes is not None else ""

    def _refuse(self, what: str, where: str, do: str) -> str:
        if self.not_finite == "raise":
            raise CheckError(f"{what}.", where=where, do=f"{do} The weights are those of the last finished step.")
        return f"{what} ({where})"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {} if self.spikes is None else self.spikes.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if self.spikes is not None and state:
            self.spikes.load_state_dict(state)
