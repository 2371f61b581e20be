"""What trains when: parameters that are frozen until a step or an epoch, or from one on."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from torch import nn

from fxopt.errors import DataError
from fxopt.train.callbacks import Callback, State

Patterns = str | tuple[str, ...]


class Freezing(Callback):
    """Freezes and unfreezes parameters by a schedule: a pure function of the steps or epochs done, so a resume needs no memory of it.

    The optimizer holds all of them from the start; while one is frozen it has no gradient and is not stepped. An optimized model is
    captured again at each change (parameters that a pass froze stay frozen).

    Args:
        until: {time: patterns of parameter names} that are frozen before it. since: {time: patterns} that are frozen from it on.
        unit: of the times: "step" or "epoch".

    Raises:
        DataError: no such unit.
    """

    def __init__(self, until: Mapping[int, Patterns] | None = None, since: Mapping[int, Patterns] | None = None, unit: str = "epoch") -> None:
        if unit not in ("step", "epoch"):
            raise DataError(f"unit={unit!r}", where="Freezing", do="write step or epoch")
        self.until, self.since, self.unit = dict(until or {}), dict(since or {}), unit
        self.parameters: dict[str, nn.Parameter] = {}

    def on_setup(self, state: State, stage: str) -> None:
        if stage != "fit":
            return
        trained = {id(parameter) for optimizer in state.optimizers for group in optimizer.param_groups for parameter in group["params"]}
        self.parameters = {name: parameter for name, parameter in state.model.named_parameters() if id(parameter) in trained}
        for patterns in (*self.until.values(), *self.since.values()):
            if not any(_matches(name, patterns) for name in self.parameters):
                raise DataError(f"No trained parameter is matched by {patterns!r}.", where="Freezing", do=f"They are called {', '.join(list(self.parameters)[:4])}, ...")

    def on_fit_start(self, state: State) -> None:
        self._set(state)

    def on_epoch_start(self, state: State) -> None:
        self._set(state)

    def on_step_start(self, state: State) -> None:
        if self.unit == "step":
            self._set(state)

    def on_teardown(self, state: State, stage: str) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def _set(self, state: State) -> None:
        now = state.step if self.unit == "step" else state.epoch
        for name, parameter in self.parameters.items():
            frozen = any(now < time and _matches(name, patterns) for time, patterns in self.until.items())
            frozen |= any(now >= time and _matches(name, patterns) for time, patterns in self.since.items())
            if parameter.requires_grad == frozen:
                parameter.requires_grad_(not frozen)
                parameter.grad = None


def _matches(name: str, patterns: Patterns) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in ((patterns,) if isinstance(patterns, str) else patterns))
