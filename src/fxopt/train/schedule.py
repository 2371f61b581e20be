"""Learning-rate schedules: pure functions of the step, so resuming needs no state (but for `Plateau`, which follows a metric)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxopt.errors import DataError

Schedule = Callable[[int], float]
"""Takes the number of finished optimizer steps, gives what the base learning rate is multiplied by."""


def _constant(done: float) -> float:
    return 1.0


def _linear(done: float, floor: float = 0.0) -> float:
    return max(floor, floor + (1.0 - floor) * (1.0 - done))


def _cosine(done: float, floor: float = 0.0) -> float:
    return max(floor, floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))


def _wsd(done: float, decay: float = 0.1, floor: float = 0.0) -> float:
    """Warm-up, stable, decay: 1 until the last share `decay` of the run, then linear to the floor (Hu et al., 2024,
    https://arxiv.org/abs/2404.06395)."""
    return 1.0 if done <= 1.0 - decay else max(floor, floor + (1.0 - floor) * (1.0 - done) / decay)


def _exponential(done: float, end: float = 0.01) -> float:
    """From 1 to `end`, by the same factor at each step."""
    return float(end**done)


_SHAPES: dict[str, Callable[..., float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine, "wsd": _wsd, "exponential": _exponential}
"""Factor after the warm-up, by the finished share of the remaining steps."""


def make_schedule(name: str, steps: int, warmup: int = 0, **settings: float) -> Schedule:
    """The schedule called `name` over `steps` optimizer steps, the first `warmup` of them rising linearly from 0.

    `constant`, `linear` and `cosine` equal Transformers' schedules of these names: with a warm-up, step 0 runs at rate 0.

    Args:
        settings: `floor` of linear, cosine and wsd (where they end); `decay` of wsd (share of the run); `end` of exponential.

    Raises:
        DataError: the name or a setting is unknown or out of range, or the warm-up is longer than the run.
    """
    if name not in _SHAPES:
        near = difflib.get_close_matches(str(name), _SHAPES, 1)
        raise DataError(f"There is no schedule {name!r}.", do=f"Use {f'{near[0]}: ' if near else ''}one of {', '.join(_SHAPES)}, or a function.")
    if not 0 <= warmup <= steps:
        raise DataError(f"A warm-up of {warmup} steps does not fit into {steps} steps.")
    shape = _SHAPES[name]
    known = shape.__code__.co_varnames[1 : shape.__code__.co_argcount]
    if wrong := [key for key, value in settings.items() if key not in known or not 0 <= value <= 1 or not value and key != "floor"]:
        raise DataError(f"The schedule {name} cannot take {', '.join(f'{key}={settings[key]!r}' for key in wrong)}.",
                        do=f"It takes {', '.join(known) or 'no settings'}" + (": shares from 0 to 1." if known else "."))

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return shape(min(1.0, (step - warmup) / max(1, steps - warmup)), **settings)

    return factor


def in_turn(*parts: tuple[int, Schedule]) -> Schedule:
    """Several schedules one after the other, each over so many steps and counting from its own beginning; the last goes on.

    Raises:
        DataError: there is none, or one has no steps.
    """
    if not parts or any(steps < 1 for steps, _ in parts):
        raise DataError("Each of several schedules needs at least one step.", where="in_turn")

    def factor(step: int) -> float:
        for steps, schedule in parts[:-1]:
            if step < steps:
                return schedule(step)
            step -= steps
        return parts[-1][1](step)

    return factor


def product(*schedules: Schedule) -> Schedule:
    """Several schedules at once: their factors multiply."""
    return lambda step: math.prod(schedule(step) for schedule in schedules)


@dataclass
class Plateau:
    """A factor that falls when a logged value stops getting better. Multiplies what the run's schedule says.

    Attributes:
        monitor: name of the value in the log, such as `val_loss`. mode: "min" or "max": which way is better.
        factor: what the rate is multiplied by. patience: values without progress that are borne. min_delta: less than this is no
            progress. floor: the smallest factor. cooldown: values after a fall that are not counted.
    """

    monitor: str = "val_loss"
    mode: str = "min"
    factor: float = 0.1
    patience: int = 10
    min_delta: float = 0.0
    floor: float = 0.0
    cooldown: int = 0
    now: float = 1.0
    best: float | None = None
    bad: int = 0
    resting: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max") or not 0 < self.factor < 1 or self.patience < 0 or self.min_delta < 0:
            raise DataError(f"no plateau: {self}", do="mode is min or max, factor between 0 and 1, patience and min_delta 0 or more")

    def __call__(self, step: int) -> float:
        """The present factor."""
        return self.now

    def see(self, row: Mapping[str, float]) -> None:
        """Look at a row of the log."""
        if self.monitor not in row:
            return
        value = row[self.monitor]
        if better(value, self.best, self.mode, self.min_delta):
            self.best, self.bad = value, 0
        elif self.resting:
            self.resting -= 1
        else:
            self.bad += 1
            if self.bad > self.patience:
                self.now, self.bad, self.resting = max(self.floor, self.now * self.factor), 0, self.cooldown

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"now": self.now, "best": self.best, "bad": self.bad, "resting": self.resting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.now, self.best, self.bad, self.resting = state["now"], state["best"], state["bad"], state["resting"]


def better(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether a value is better than the best so far by more than `min_delta`; NaN never is."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def plateaus(schedules: Sequence[Any]) -> list[Plateau]:
    """Those of the schedules that follow a metric."""
    return [schedule for schedule in schedules if isinstance(schedule, Plateau)]
