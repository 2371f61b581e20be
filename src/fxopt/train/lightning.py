"""Hooks of Lightning's callbacks and modules, called when our events fire.

Nothing of Lightning is imported. What is called is listed in `HOOKS` (and for modules in `OVERRIDES`); an override of anything else is
named aloud. The order is Lightning's: of one moment first the callbacks, then the module; `on_train_batch_end` of the last batch of a step
after the optimizer's step; `on_before_optimizer_step` before the gradients are clipped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxopt.errors import DataError
from fxopt.train.callbacks import Callback, State
from fxopt.train.facade import Facade
from fxopt.train.optimizers import Optimizer

log = logging.getLogger("fxopt")

HOOKS = ("setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start",
         "on_train_batch_end", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad", "on_exception", "on_save_checkpoint",
         "on_load_checkpoint", "state_dict", "load_state_dict",
         *(f"on_{stage}_{moment}" for stage in ("validation", "test", "predict") for moment in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")))
"""The hooks of Lightning's callbacks (and modules) that are called."""

OVERRIDES = ("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step", "configure_callbacks", "configure_model",
             "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "on_validation_model_eval", "on_test_model_eval", "on_predict_model_eval")
"""What a module may override beside its steps and hooks; `ModuleTask` calls it."""

_NOT_CALLED = ("configure_sharded_model", "on_sanity_check_start", "on_sanity_check_end", "on_validation_model_train", "on_validation_model_zero_grad", "on_test_model_train",
               "on_predict_model_train")


class Hooked(Callback):
    """Calls the hooks of an object of Lightning's when our events fire.

    Args:
        target: a callback, or a module. settings: the trainer. whole: it is a callback: hooks begin with (trainer, module).
        task: what is trained; if it says what its last training step returned, `on_train_batch_end` gets that.

    Raises:
        DataError: (of a hook) `on_train_batch_start` asks to leave out the rest of the epoch.
    """

    def __init__(self, target: Any, settings: Any, whole: bool, task: Any = None) -> None:
        self.target, self.settings, self.whole, self.task = target, settings, whole, task
        self.facade: Facade | None = None
        self.ended: tuple[Any, int, Tensor] | None = None
        base = next((cls for cls in type(target).__mro__ if cls.__module__.startswith(("lightning.", "pytorch_lightning.")) and cls.__name__ in ("Callback", "LightningModule")), None)
        self.own = {name for name in dir(type(target)) if callable(getattr(type(target), name)) and (base is None or getattr(type(target), name) is not getattr(base, name, None))}
        known = set(HOOKS) if whole else {*HOOKS, *OVERRIDES}
        if odd := sorted(name for name in self.own if name.startswith("on_") and name not in known or name in _NOT_CALLED):
            log.warning("fxopt: %s overrides %s, which %s never called here (supported: fxopt.train.lightning.HOOKS)", type(target).__name__, ", ".join(odd), "is" if len(odd) == 1 else "are")

    def _call(self, state: State, name: str, *arguments: Any) -> Any:
        if name not in self.own:
            return None
        if self.facade is None or self.facade.state_of_run is not state:
            self.facade = Facade(state, self.settings)
        return getattr(self.target, name)(*((self.facade, state.model) if self.whole else ()), *arguments)

    def on_setup(self, state: State, stage: str) -> None:
        self._call(state, "setup", stage)

    def on_teardown(self, state: State, stage: str) -> None:
        self._call(state, "teardown", stage)

    def on_fit_start(self, state: State) -> None:
        self._call(state, "on_fit_start")
        self._call(state, "on_train_start")

    def on_fit_end(self, state: State) -> None:
        self._call(state, "on_train_end")
        self._call(state, "on_fit_end")

    def on_exception(self, state: State, error: BaseException) -> None:
        if self.whole:
            self._call(state, "on_exception", error)

    def on_epoch_start(self, state: State) -> None:
        self._call(state, "on_train_epoch_start")

    def on_epoch_end(self, state: State) -> None:
        self._call(state, "on_train_epoch_end")

    def on_batch_start(self, state: State, batch: Any, index: int) -> None:
        if self._call(state, "on_train_batch_start", batch, index) == -1:
            raise DataError("on_train_batch_start returned -1, to leave out the rest of the epoch.", where=type(self.target).__name__, do="Use `limit_train`, or data that ends there.")

    def on_batch_end(self, state: State, batch: Any, index: int, loss: Tensor) -> None:
        self.ended = batch, index, loss
        if not state.last:
            self._batch_ended(state)

    def on_step_end(self, state: State) -> None:
        self._batch_ended(state)

    def _batch_ended(self, state: State) -> None:
        if self.ended is not None:
            (batch, index, loss), self.ended = self.ended, None
            self._call(state, "on_train_batch_end", getattr(self.task, "output", None) or {"loss": loss}, batch, index)

    def on_before_backward(self, state: State, loss: Tensor) -> None:
        self._call(state, "on_before_backward", loss)

    def on_after_backward(self, state: State) -> None:
        self._call(state, "on_after_backward")

    def on_backward_end(self, state: State) -> None:
        for optimizer in state.optimizers:
            self._call(state, "on_before_optimizer_step", optimizer)

    def on_before_zero_grad(self, state: State, optimizer: Optimizer) -> None:
        self._call(state, "on_before_zero_grad", optimizer)

    def _begins(self, state: State, stage: str) -> None:
        self._call(state, f"on_{stage}_start")
        self._call(state, f"on_{stage}_epoch_start")

    def _ends(self, state: State, stage: str, metrics: Mapping[str, float]) -> None:
        state.metrics.update(metrics)
        self._call(state, f"on_{stage}_epoch_end")
        self._call(state, f"on_{stage}_end")

    def on_validation_start(self, state: State) -> None:
        self._begins(state, "validation")

    def on_validation_batch_start(self, state: State, batch: Any, index: int) -> None:
        self._call(state, "on_validation_batch_start", batch, index, *((0,) if self.whole else ()))

    def on_validation_batch_end(self, state: State, batch: Any, index: int, output: Any) -> None:
        self._call(state, "on_validation_batch_end", output, batch, index, *((0,) if self.whole else ()))

    def on_validation_end(self, state: State, metrics: Mapping[str, float]) -> None:
        self._ends(state, "validation", metrics)

    def on_test_start(self, state: State) -> None:
        self._begins(state, "test")

    def on_test_batch_start(self, state: State, batch: Any, index: int) -> None:
        self._call(state, "on_test_batch_start", batch, index, *((0,) if self.whole else ()))

    def on_test_batch_end(self, state: State, batch: Any, index: int, output: Any) -> None:
        self._call(state, "on_test_batch_end", output, batch, index, *((0,) if self.whole else ()))

    def on_test_end(self, state: State, metrics: Mapping[str, float]) -> None:
        self._ends(state, "test", metrics)

    def on_predict_start(self, state: State) -> None:
        self._begins(state, "predict")

    def on_predict_batch_start(self, state: State, batch: Any, index: int) -> None:
        self._call(state, "on_predict_batch_start", batch, index, *((0,) if self.whole else ()))

    def on_predict_batch_end(self, state: State, batch: Any, index: int, output: Any) -> None:
        self._call(state, "on_predict_batch_end", output, batch, index, *((0,) if self.whole else ()))

    def on_predict_end(self, state: State) -> None:
        self._ends(state, "predict", {})

    def on_save(self, state: State, checkpoint: dict[str, Any]) -> None:
        self._call(state, "on_save_checkpoint", checkpoint["extra"])

    def on_load(self, state: State, checkpoint: Mapping[str, Any]) -> None:
        self._call(state, "on_load_checkpoint", checkpoint["extra"])

    def state_dict(self) -> dict[str, Any]:
        return self.target.state_dict() if self.whole and "state_dict" in self.own else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.whole and "load_state_dict" in self.own:
            self.target.load_state_dict(state)
