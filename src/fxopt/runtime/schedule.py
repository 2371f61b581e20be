"""Learning-rate schedules: pure functions of the step, so resuming needs no state."""

from __future__ import annotations

from collections.abc import Callable
import math

from fxopt.errors import DataError

Schedule = Callable[[int], float]
"""Takes the number of finished optimizer steps, gives what the base learning rate is multiplied by."""

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: max(0.0, 1.0 - done),
    "cosine": lambda done: max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))),
}
"""Factor after the warm-up, by the finished share of the remaining steps."""


def make_schedule(name: str, steps: int, warmup: int = 0) -> Schedule:
    """The schedule called `name` over `steps` optimizer steps, the first `warmup` of them rising linearly from 0.

    Equal to Transformers' schedules of these names: with a warm-up, step 0 runs at rate 0.

    Raises:
        DataError: the name is unknown, or the warm-up is longer than the run.
    """
    if name not in _SHAPES:
        raise DataError(f"There is no schedule {name!r}.", do=f"Use one of {', '.join(_SHAPES)}, or a function.")
    if not 0 <= warmup <= steps:
        raise DataError(f"A warm-up of {warmup} steps does not fit into {steps} steps.")
    shape = _SHAPES[name]

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return shape((step - warmup) / max(1, steps - warmup))

    return factor
