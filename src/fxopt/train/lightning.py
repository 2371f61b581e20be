"""Objects of Lightning's shape as they are: modules that say their own steps, and callbacks.

Nothing of Lightning is imported. A module sees a small `trainer` (`Facade`), and its `log`, `optimizers` and the like lead here while a
run goes on; a callback gets the same facade. What is supported is listed in `HOOKS`; an override of anything else is named aloud.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import DataError
from fxopt.runtime.counting import Counter, Items, samples
from fxopt.train.batch import Batch, loss_of
from fxopt.train.callbacks import Callback, State
from fxopt.train.metrics import Means
from fxopt.train.optimizers import Optimizer, Rates, TorchSchedules, configured

log = logging.getLogger("fxopt")

HOOKS = ("setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start",
         "on_train_batch_end", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad", "on_exception", "on_save_checkpoint",
         "on_load_checkpoint", "state_dict", "load_state_dict",
         *(f"on_{stage}_{moment}" for stage in ("validation", "test", "predict") for moment in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")))
"""The hooks of Lightning's callbacks (and modules) that are called."""

_STAGES = {"fit": "fit", "validate": "validate", "test": "test", "predict": "predict"}
_NOT_CALLED = ("configure_callbacks", "configure_gradient_clipping", "configure_model", "configure_sharded_model", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step",
               "transfer_batch_to_device", "on_before_batch_transfer", "on_after_batch_transfer", "backward", "on_sanity_check_start", "on_sanity_check_end",
               "on_validation_model_eval", "on_validation_model_train", "on_validation_model_zero_grad", "on_test_model_eval", "on_test_model_train", "on_predict_model_eval",
               "on_predict_model_train")


class Facade:
    """What code written for Lightning sees as `trainer`: read from the run, but for `should_stop`, which may be set.

    Attributes that Lightning's Trainer has and this does not are an AttributeError that says so.
    """

    def __init__(self, state: State, settings: Any = None) -> None:
        self.state_of_run, self._settings = state, settings
        self.val_check_interval, self.check_val_every_n_epoch = 1.0, 1
        self.sanity_checking = False
        self.strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all=True: decision, barrier=lambda name=None: None)
        self.num_training_batches = getattr(settings, "limit_train", None) or float("inf")
        self.loggers: list[Any] = []
        self.logger = None
        self.fast_dev_run = bool(getattr(settings, "fast_dev_run", False))
        self.accumulate_grad_batches = getattr(settings, "accumulate", 1)
        self.gradient_clip_val = getattr(settings, "clip", None)

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__["state_of_run"]
        found: dict[str, Callable[[], Any]] = {
            "current_epoch": lambda: state.epoch, "global_step": lambda: state.step, "max_steps": lambda: state.steps, "estimated_stepping_batches": lambda: state.steps,
            "max_epochs": lambda: getattr(self._settings, "epochs", None), "optimizers": lambda: list(state.optimizers), "world_size": lambda: state.world,
            "global_rank": lambda: state.rank, "local_rank": lambda: state.rank, "is_global_zero": lambda: state.rank == 0, "is_last_batch": lambda: False,
            "callback_metrics": lambda: {key: torch.tensor(value) for key, value in state.metrics.items()}, "logged_metrics": lambda: dict(state.metrics),
            "progress_bar_metrics": lambda: dict(state.metrics), "model": lambda: state.model, "lightning_module": lambda: state.model,
            "training": lambda: state.stage == "fit", "validating": lambda: state.stage == "validate", "testing": lambda: state.stage == "test",
            "predicting": lambda: state.stage == "predict", "should_stop": lambda: state.stop, "default_root_dir": lambda: str(state.folder or "."),
            "log_dir": lambda: str(state.folder) if state.folder is not None else None, "state": lambda: SimpleNamespace(fn=_STAGES[state.stage], stage=state.stage),
        }
        if name not in found:
            raise AttributeError(f"fxopt's trainer has no {name!r} for code written for Lightning; it has {', '.join(sorted(found))}")
        return found[name]()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "should_stop":
            self.state_of_run.stop = bool(value)
            self.state_of_run.why = "a Lightning callback stopped it"
        else:
            self.__dict__[name] = value


class Hooked(Callback):
    """Calls the hooks of an object of Lightning's when our events fire.

    Args:
        target: a callback, or a module. settings: the trainer. whole: it is a callback: hooks begin with (trainer, module).
    """

    def __init__(self, target: Any, settings: Any, whole: bool) -> None:
        self.target, self.settings, self.whole = target, settings, whole
        self.facade: Facade | None = None
        base = next((cls for cls in type(target).__mro__ if cls.__module__.startswith(("lightning.", "pytorch_lightning.")) and cls.__name__ in ("Callback", "LightningModule")), None)
        self.own = {name for name in dir(type(target)) if callable(getattr(type(target), name)) and (base is None or getattr(type(target), name) is not getattr(base, name, None))}
        known = {*HOOKS, *dir(Callback)} if not whole else set(HOOKS)
        if odd := sorted(name for name in self.own if (name.startswith("on_") and name not in known or name in _NOT_CALLED) and not name.startswith("__")):
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
        self._call(state, "on_train_batch_start", batch, index)

    def on_batch_end(self, state: State, batch: Any, index: int, loss: Tensor) -> None:
        self._call(state, "on_train_batch_end", {"loss": loss}, batch, index)

    def on_before_backward(self, state: State, loss: Tensor) -> None:
        self._call(state, "on_before_backward", loss)

    def on_after_backward(self, state: State) -> None:
        self._call(state, "on_after_backward")

    def on_before_optimizer_step(self, state: State, optimizer: Optimizer) -> None:
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


def is_lightning_shaped(model: Any) -> bool:
    """Whether an object says its own training step."""
    return callable(getattr(model, "training_step", None))


class ModuleTask:
    """A module with `training_step(batch, index)`, `configure_optimizers()` and, if it is to be evaluated, `validation_step`, `test_step`
    and `predict_step`.

    Args:
        target: it. An object that is no module is trained through the modules among its attributes. count: see `Trainer`.
    """

    def __init__(self, target: Any, count: Callable[[Batch], int] | None = None) -> None:
        self.target, self.count, self.calls_module = target, count, False
        self.module = target if isinstance(target, nn.Module) else nn.ModuleDict({name: part for name, part in vars(target).items() if isinstance(part, nn.Module)})
        self.manual = getattr(target, "automatic_optimization", True) is False
        self.hooks: list[Callback] = [Hooked(target, None, whole=False)]
        self.made: list[Optimizer] = []
        self.rates: TorchSchedules | None = None
        self.stage_means: Means | None = None
        self._batch: Any = None
        self._shadowed: list[str] = []

    def begin(self, state: State, means: Means) -> None:
        """See `Task`. The target's `trainer` and `log` lead here from now on."""
        facade = Facade(state)

        def write(name: str, value: Any, on_step: bool | None = None, on_epoch: bool | None = None, batch_size: int | None = None, **_: Any) -> None:
            if self.stage_means is not None:
                self.stage_means.add(name, value, float(samples(self._batch) if batch_size is None else batch_size))
                return
            if on_epoch or hasattr(value, "compute"):
                means.add(f"{name}_epoch" if on_step else name, value, float(samples(self._batch) if batch_size is None else batch_size))
            if on_step is not False and not hasattr(value, "compute"):
                state.log(name, value)

        def write_all(values: Mapping[str, Any], **more: Any) -> None:
            for name, value in values.items():
                write(name, value, **more)

        shadows: dict[str, Any] = {"log": write, "log_dict": write_all, "optimizers": lambda use_pl_optimizer=True: self.made[0] if len(self.made) == 1 else list(self.made),
                                   "lr_schedulers": self._schedulers, "manual_backward": lambda loss, *given, **more: loss.backward(*given, **more),
                                   "clip_gradients": _clip}
        for name, function in shadows.items():
            if name in ("log", "log_dict") or hasattr(type(self.target), name) or self.manual:
                self.target.__dict__[name] = function
                self._shadowed.append(name)
        if hasattr(type(self.target), "trainer"):
            self.target.trainer = facade

    def _schedulers(self) -> Any:
        held = [entry["scheduler"] for entry in self.rates.entries] if self.rates is not None else []
        return held[0] if len(held) == 1 else held or None

    def end(self) -> None:
        """See `Task`. The target's methods are its own again."""
        for name in self._shadowed:
            self.target.__dict__.pop(name, None)
        self._shadowed = []
        if hasattr(type(self.target), "trainer"):
            self.target.trainer = None

    def optimizers(self) -> tuple[list[Optimizer], Rates | None]:
        """See `Task`. Rates are the target's schedulers', if it configures some, and the trainer's schedule else.

        Raises:
            DataError: it configures none.
        """
        returned = self.target.configure_optimizers() if callable(getattr(self.target, "configure_optimizers", None)) else None
        self.made, entries = configured(returned)
        if not self.made:
            raise DataError("configure_optimizers gave no optimizer.", where=type(self.target).__name__, do="Return one.")
        self.rates = TorchSchedules(entries)
        return self.made, self.rates

    def loss(self, model: nn.Module, batch: Batch, index: int) -> Tensor | None:
        """See `Task`."""
        self._batch, self.stage_means = batch, None
        output = self.target.training_step(batch, index)
        return None if output is None else loss_of(output, f"{type(self.target).__name__}.training_step")

    def items(self, counter: Counter, batch: Batch) -> Items:
        """See `Task`."""
        return counter(batch)

    def evaluate(self, model: nn.Module, batch: Batch, index: int, stage: str, means: Means) -> Any:
        """See `Task`.

        Raises:
            DataError: the target has no such step.
        """
        name = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}[stage]
        step = getattr(self.target, name, None)
        if not callable(step):
            raise DataError(f"There is no {name}.", where=type(self.target).__name__, do="Define it, or leave the data out.")
        self._batch, self.stage_means = batch, means
        try:
            return step(batch, index)
        finally:
            self.stage_means = None


def _clip(optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None) -> None:
    parameters: Sequence[nn.Parameter] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if gradient_clip_val is None:
        return
    if gradient_clip_algorithm == "value":
        nn.utils.clip_grad_value_(parameters, gradient_clip_val)
    else:
        nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
