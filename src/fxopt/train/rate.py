"""The learning-rate finder: a sweep over rates, and where the loss falls fastest (Smith, 2017, https://arxiv.org/abs/1506.01186)."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.errors import DataError
from fxopt.runtime.files import replace_file
from fxopt.train.callbacks import Callback, State
from fxopt.train.optimizers import Optimizer
from fxopt.train.quiet import trial
from fxopt.train.report import PAGE_STYLE, curve, shown, table

if TYPE_CHECKING:
    from fxopt.train.trainer import Trainer

SMOOTHING = 0.9  # weight of what was before, of each step
DIVERGED = 4.0  # times the largest loss of the first steps: there the sweep ends
FALL = 1e-3  # of the loss: what falls less does not fall
FEWEST = 10  # steps of a sweep before it may end, and that a suggestion needs


@dataclass(frozen=True)
class RateCurve:
    """What a sweep found.

    Attributes:
        rates, losses: of the first parameter group, of each step. smoothed: the losses, exponentially averaged and corrected for the
            start. suggestion: the rate at which the smoothed loss falls fastest over the logarithm of the rate (a line through the
            points around it), before its least.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float

    def write(self, folder: Path) -> Path:
        """`rate.json` and the picture, `rate.html`; gives the picture."""
        facts = {"suggestion": self.suggestion, "rates": self.rates, "losses": [value if math.isfinite(value) else repr(value) for value in self.losses], "smoothed": self.smoothed}
        replace_file(folder / "rate.json", json.dumps(facts).encode())
        lines = {name: [(math.log10(rate), value) for rate, value in zip(self.rates, values)] for name, values in (("smoothed loss", self.smoothed), ("loss", self.losses))}
        page = (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>learning rate</title><style>{PAGE_STYLE}</style>"
                f"<h1>learning rate</h1>{table({'suggestion': shown(self.suggestion), 'steps': len(self.rates)})}{curve(lines, 'log10 of the rate', math.log10(self.suggestion))}</html>")
        replace_file(folder / "rate.html", page.encode())
        return folder / "rate.html"

    def __str__(self) -> str:
        return f"learning rate {html.unescape(shown(self.suggestion))}: of {len(self.rates)} rates from {self.rates[0]:.3g} to {self.rates[-1]:.3g}, there the loss falls fastest"


class Ramp:
    """Rates that rise exponentially from step to step; groups keep their ratios. See `fxopt.train.optimizers.Rates`."""

    def __init__(self, lowest: float, highest: float, steps: int) -> None:
        self.lowest, self.highest, self.steps = lowest, highest, steps
        self.optimizers: Sequence[Optimizer] = ()
        self.base: list[list[float]] = []

    def bind(self, optimizers: Sequence[Optimizer]) -> None:
        """The optimizers whose groups are set."""
        self.optimizers = optimizers
        self.base = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]

    def rate(self, step: int) -> float:
        """Of the first group."""
        return self.lowest * (self.highest / self.lowest) ** (step / max(1, self.steps - 1))

    def before_step(self, step: int) -> None:
        """See `Rates`."""
        first = self.base[0][0] or 1.0
        for optimizer, base in zip(self.optimizers, self.base, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = self.rate(step) * (lr / first if self.base[0][0] else 1.0)

    def after_step(self) -> None:
        """Nothing."""

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def see(self, row: Mapping[str, float]) -> None:
        """Nothing."""

    def restore(self) -> None:
        """See `Rates`."""
        for optimizer, base in zip(self.optimizers, self.base, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a sweep is not resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class _Sweep(Callback):
    def __init__(self, ramp: Ramp) -> None:
        self.ramp = ramp
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.average = 0.0

    def on_fit_start(self, state: State) -> None:
        self.ramp.bind(state.optimizers)

    def on_step_end(self, state: State) -> None:
        loss = state.history[-1].loss
        if not math.isfinite(loss):
            state.stop, state.why = True, "the loss is not finite"
            return
        self.average = SMOOTHING * self.average + (1 - SMOOTHING) * loss
        self.rates.append(self.ramp.rate(state.step - 1))
        self.losses.append(loss)
        self.smoothed.append(self.average / (1 - SMOOTHING ** len(self.rates)))
        level = max(abs(loss) for loss in self.losses[:FEWEST])
        if len(self.rates) >= FEWEST and self.smoothed[-1] > self.losses[0] + (DIVERGED - 1) * level:
            state.stop, state.why = True, "the loss diverges"


def find_rate(trainer: Trainer, model: Any, train: Any, *, lowest: float = 1e-7, highest: float = 1.0, steps: int = 100) -> RateCurve:
    """Sweeps the learning rate with the trainer's own steps (its optimizer, groups, accumulation, clipping, precision), until the loss
    diverges. Weights, optimizer states and random states are as before afterwards.

    Args:
        lowest, highest: of the first group. steps: of the sweep, at least `FEWEST`.

    Raises:
        DataError: rates or steps that make no sweep; a loss that does not fall at any rate; manual steps that return no loss.
    """
    if not 0 < lowest < highest or steps < FEWEST:
        raise DataError(f"There is no sweep from {lowest} to {highest} in {steps} steps.", where="find_rate", do=f"Rates rise, in at least {FEWEST} steps.")
    ramp = Ramp(lowest, highest, steps)
    sweep = _Sweep(ramp)
    trial(trainer, model, train, steps, [sweep], ramp)
    smoothed = sweep.smoothed
    best = min(range(FEWEST // 2, len(smoothed)), key=smoothed.__getitem__, default=0)  # the first averages are of a batch or two
    if len(smoothed) < FEWEST or max(smoothed[:FEWEST]) - smoothed[best] <= FALL * abs(smoothed[0]):
        raise DataError(f"The loss does not fall at any rate from {lowest:.3g} on ({len(smoothed)} steps before it is not finite or diverges).", where="find_rate",
                        do="Look at the data and the loss, or begin with a lower rate.")
    around = max(2, len(smoothed) // 12)
    chosen = min(range(FEWEST // 2, best + 1), key=lambda i: _slope(smoothed[max(0, i - around): i + around + 1]))
    return RateCurve(tuple(sweep.rates), tuple(sweep.losses), tuple(sweep.smoothed), sweep.rates[chosen])


def _slope(values: Sequence[float]) -> float:
    """Of the line of least squares through values at equal distances: batches differ, so two neighbours say little."""
    middle = (len(values) - 1) / 2
    return sum((i - middle) * value for i, value in enumerate(values)) / sum((i - middle) ** 2 for i in range(len(values)))
