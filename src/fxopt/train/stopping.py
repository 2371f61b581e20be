"""Ending a run when it no longer learns, with the best weights."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import CheckError, DataError
from fxopt.train.callbacks import Callback, State
from fxopt.train.schedule import better
from fxopt.train.task import changing_buffers

log = logging.getLogger("fxopt")


class EarlyStopping(Callback):
    """Stops when a logged value has not got better for a while, or has passed a threshold, and puts the best weights back, bitwise.

    The best weights (what trains, and buffers) are kept on the CPU and are part of every checkpoint.

    Args:
        monitor: name of the value in the log. mode: "min" or "max".
        patience: values without progress that are borne. min_delta: less than this is no progress.
        good, bad: a value at least as good as `good` ends the run as a success; one at least as bad as `bad` ends it as hopeless.
        check_finite: stop when the value is NaN or infinite.
        restore: put the best weights back at the end of the run, however it ended.

    Raises:
        DataError: settings that make no sense.
    """

    def __init__(self, monitor: str = "val_loss", mode: str = "min", patience: int = 3, min_delta: float = 0.0, *, good: float | None = None, bad: float | None = None,
                 check_finite: bool = True, restore: bool = True) -> None:
        if mode not in ("min", "max") or patience < 0 or min_delta < 0:
            raise DataError(f"mode={mode!r}, patience={patience}, min_delta={min_delta}", where="EarlyStopping", do="mode is min or max, patience and min_delta are 0 or more")
        self.monitor, self.mode, self.patience, self.min_delta, self.good, self.bad = monitor, mode, patience, min_delta, good, bad
        self.check_finite, self.restore = check_finite, restore
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0
        self.weights: dict[str, Tensor] = {}

    def on_log(self, state: State, row: Mapping[str, float]) -> None:
        if self.monitor not in row:
            return
        value = row[self.monitor]
        if not math.isfinite(value):
            if self.check_finite:
                self._stop(state, f"{self.monitor} is {value}")
        elif better(value, self.best, self.mode, self.min_delta):
            self.best, self.best_step, self.waited = value, state.step, 0
            if self.restore:
                self.weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _held(state).items()}
        else:
            self.waited += 1
            if self.waited > self.patience:
                self._stop(state, f"{self.monitor} has not got better than {self.best:.6g} (step {self.best_step}) for {self.waited} values")
        sign = 1.0 if self.mode == "min" else -1.0
        if self.good is not None and sign * value <= sign * self.good:
            self._stop(state, f"{self.monitor} has reached {self.good:g}")
        if self.bad is not None and sign * value >= sign * self.bad:
            self._stop(state, f"{self.monitor} is {value:.6g}, past {self.bad:g}")

    def _stop(self, state: State, why: str) -> None:
        if not state.stop:
            state.stop, state.why = True, why
            log.info("fxopt: the run ends after step %d: %s", state.step, why)

    def on_epoch_end(self, state: State) -> None:
        # a validation may be due later than at the end of the first epoch
        if self.monitor not in state.metrics and (not self.monitor.startswith("val") or any(name.startswith("val") for name in state.metrics)):
            near = difflib.get_close_matches(self.monitor, state.metrics, 1)
            raise DataError(f"{self.monitor!r} was not logged in the whole epoch.", where="EarlyStopping", do=f"Logged are {', '.join(state.metrics)}{f'; do you mean {near[0]}?' if near else '.'}")

    @torch.no_grad()
    def on_fit_end(self, state: State) -> None:
        if self.best is None:
            log.warning("fxopt: EarlyStopping saw no finite %r in the whole run: it stopped and restored nothing", self.monitor)
        if not self.weights:
            return
        held = _held(state)
        if set(held) != set(self.weights):
            raise CheckError("What trains has changed since the best weights were kept.", where="EarlyStopping", do="Unfreeze before the first value is logged, or set restore=False.")
        for name, tensor in held.items():
            tensor.copy_(self.weights[name])

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self.waited, self.weights = state["best"], state["best_step"], state["waited"], state["weights"]


def _held(state: State) -> dict[str, Tensor]:
    """What training changes: the optimizers' parameters, and buffers."""
    trained = {id(parameter) for optimizer in state.optimizers for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: parameter for name, parameter in state.model.named_parameters() if id(parameter) in trained}
    return found | changing_buffers(state.model)
