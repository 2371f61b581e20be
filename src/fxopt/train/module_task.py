"""Objects of a LightningModule's shape as they are: they say their own steps, optimizers, and what they like to do differently.

Nothing of Lightning is imported. While a run goes on, the module's `trainer` is a `Facade`, and its `log`, `optimizers` and the like lead
here. What it may override: `fxopt.train.lightning.HOOKS` and `OVERRIDES`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import DataError
from fxopt.runtime.counting import Counter, Items, samples
from fxopt.train.batch import Batch, loss_of
from fxopt.train.callbacks import Callback, State
from fxopt.train.facade import Facade
from fxopt.train.lightning import Hooked
from fxopt.train.metrics import Means
from fxopt.train.optimizers import Optimizer, Rates, TorchSchedules, configured, distinct
from fxopt.train.task import Steps, device_of

_CONFIGURED = ("optimizer", "lr", "weight_decay", "groups", "schedule", "warmup")
"""What a trainer is told of the optimizers and rates that it makes itself."""


def is_lightning_shaped(model: Any) -> bool:
    """Whether an object says its own training step."""
    return callable(getattr(model, "training_step", None))


class _Kept:
    """A metric object whose memory the module may still ask at the end of an epoch: it is emptied after the module's hooks."""

    def __init__(self, metric: Any, kept: list[Any]) -> None:
        self.metric, self.kept = metric, kept

    def __getattr__(self, name: str) -> Any:
        return getattr(self.metric, name)

    def reset(self) -> None:
        self.kept.append(self.metric)


class ModuleHooks(Hooked):
    """The module's own hooks. What it logs at the end of an evaluation belongs to that evaluation's row."""

    def __init__(self, task: ModuleTask) -> None:
        super().__init__(task.target, None, whole=False, task=task)

    def on_setup(self, state: State, stage: str) -> None:
        self.facade = self.task.facade  # `setup` was called before the optimizers were made

    def _begins(self, state: State, stage: str) -> None:
        self._call(state, f"on_{stage}_model_eval")
        super()._begins(state, stage)

    def _ends(self, state: State, stage: str, metrics: Mapping[str, float]) -> None:
        self.task.row = metrics
        try:
            super()._ends(state, stage, metrics)
        finally:
            self.task.row = None
            self.task.forget()
        state.metrics.update(metrics)

    def on_epoch_end(self, state: State) -> None:
        state.metrics.update((name, state.metrics[f"{name}_epoch"]) for name in self.task.both if f"{name}_epoch" in state.metrics)
        super().on_epoch_end(state)
        self.task.forget()

    def state_dict(self) -> dict[str, Any]:
        return {"own_steps": self.task.state.own_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.task.state.own_steps = state.get("own_steps")

    def on_save(self, state: State, checkpoint: dict[str, Any]) -> None:
        if held := self.task.hyperparameters():
            checkpoint["extra"]["hyper_parameters"] = held
        super().on_save(state, checkpoint)


class ModuleTask(Steps):
    """A module with `training_step(batch, index)`, `configure_optimizers()` and, if it is to be evaluated, `validation_step`, `test_step`
    and `predict_step`.

    Args:
        target: it. An object that is no module is trained through the modules among its attributes. count: see `Trainer`.

    Attributes:
        output: what the last training step returned, with the loss detached.
    """

    def __init__(self, target: Any, count: Callable[[Batch], int] | None = None) -> None:
        self.target, self.count, self.calls_module = target, count, False
        self.module = target if isinstance(target, nn.Module) else nn.ModuleDict({name: part for name, part in vars(target).items() if isinstance(part, nn.Module)})
        self.manual = getattr(target, "automatic_optimization", True) is False
        self.own = ModuleHooks(self)
        self.hooks: list[Callback] = [self.own]
        self.made: list[Optimizer] = []
        self.rates: TorchSchedules | None = None
        self.facade: Facade | None = None
        self.output: dict[str, Any] = {}
        self.row: Any = None
        self.stage_means: Means | None = None
        self._place: tuple[Batch, int] = (None, 0)
        self._shadowed: list[str] = []
        self._counted: list[Any] = []
        self._kept: list[Any] = []
        self._trainer: Any = None
        self.both: set[str] = set()  # logged on steps and on epochs: the plain name is the newest of either

    # -- a run ------------------------------------------------------------------------------------------------------------

    def begin(self, state: State, means: Means, trainer: Any) -> None:
        """See `Task`. The target's `trainer` and `log` lead here from now on; its `setup` and `configure_model` are called."""
        self.facade, self.state, self.means, self._trainer = Facade(state, trainer), state, means, trainer
        shadows: dict[str, Any] = {"log": self.log, "log_dict": self.log_dict, "optimizers": lambda use_pl_optimizer=True: self.made[0] if len(self.made) == 1 else list(self.made),
                                   "lr_schedulers": self._schedulers, "manual_backward": self._manual_backward, "clip_gradients": _clip}
        for name, function in shadows.items():
            if name in ("log", "log_dict") or hasattr(type(self.target), name) or self.manual:
                self.target.__dict__[name] = function
                self._shadowed.append(name)
        if hasattr(type(self.target), "trainer"):
            self.target.trainer = self.facade
        for name, arguments in (("setup", (state.stage,)), ("configure_model", ())):
            if name in self.own.own:
                getattr(self.target, name)(*arguments)

    def callbacks(self) -> list[Any]:
        """What the target's `configure_callbacks` gives."""
        found = self.target.configure_callbacks() if "configure_callbacks" in self.own.own else []
        return list(found) if isinstance(found, Sequence) else [found]

    def _schedulers(self) -> Any:
        held = [entry["scheduler"] for entry in self.rates.entries] if self.rates is not None else []
        return held[0] if len(held) == 1 else held or None

    def end(self) -> None:
        """See `Task`. The target's methods are its own again."""
        for name in self._shadowed:
            self.target.__dict__.pop(name, None)
        for handle in self._counted:
            handle.remove()
        self._shadowed, self._counted = [], []
        if hasattr(type(self.target), "trainer"):
            self.target.trainer = None

    def optimizers(self) -> tuple[list[Optimizer], Rates | None]:
        """See `Task`. Rates are the target's schedulers', or those of its optimizers throughout.

        Raises:
            DataError: it configures none; two hold one parameter, and the trainer steps them; the trainer was told of another one.
        """
        asked = [f.name for f in fields(self._trainer) if f.name in _CONFIGURED and getattr(self._trainer, f.name) not in (f.default, "constant")]
        if asked:
            raise DataError(f"`{asked[0]}` is for an optimizer that the trainer makes; this module configures its own.", where=type(self.target).__name__,
                            do=f"Set it in configure_optimizers, and leave `{asked[0]}` out.")
        returned = self.target.configure_optimizers() if callable(getattr(self.target, "configure_optimizers", None)) else None
        self.made, entries = configured(returned)
        if not self.made:
            raise DataError("configure_optimizers gave no optimizer.", where=type(self.target).__name__, do="Return one.")
        if not self.manual:
            distinct(self.made, self.module)
        self.rates = TorchSchedules([] if self.manual else entries, self.target.lr_scheduler_step if "lr_scheduler_step" in self.own.own else None)
        if self.manual:  # the module steps them itself, through `lr_schedulers()`
            self.rates.entries, self.rates.calls = [entry | {"interval": "never"} for entry in entries], [0] * len(entries)
            self.state.own_steps = 0
            self._counted = [optimizer.register_step_post_hook(self._count) for optimizer in self.made]
        return self.made, self.rates

    def forget(self) -> None:
        """Empty the metric objects whose epoch is over."""
        while self._kept:
            self._kept.pop().reset()

    def _count(self, *_: Any) -> None:
        self.state.own_steps = (self.state.own_steps or 0) + 1

    def hyperparameters(self) -> dict[str, Any]:
        """What the target's `save_hyperparameters` kept, as plain values; the rest as text."""
        held = getattr(self.target, "hparams_initial", None) or getattr(self.target, "hparams", None) or {}
        return {str(name): value if isinstance(value, (bool, int, float, str, type(None))) else str(value) for name, value in dict(held).items()}

    # -- a step -----------------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch, index: int) -> Tensor | None:
        """See `Task`."""
        batch = self._transferred(batch)
        self._place, self.stage_means = (batch, index), None
        output = _called(self.target.training_step, batch, index)
        if output is None:
            return None
        loss = loss_of(output, f"{type(self.target).__name__}.training_step")
        self.output = {**(output if isinstance(output, Mapping) else {}), "loss": loss.detach()}
        return loss

    def _transferred(self, batch: Batch) -> Batch:
        """The batch, which lies on the device already, through the target's own hooks of a transfer."""
        for name, more in (("on_before_batch_transfer", (0,)), ("transfer_batch_to_device", (device_of(self.module), 0)), ("on_after_batch_transfer", (0,))):
            if name in self.own.own:
                batch = getattr(self.target, name)(batch, *more)
        return batch

    def differentiated(self, loss: Tensor) -> Any:
        """The loss, or what calls the target's own `backward`."""
        return SimpleNamespace(backward=lambda: self.target.backward(loss)) if "backward" in self.own.own else loss

    def _manual_backward(self, loss: Tensor, *given: Any, **more: Any) -> None:
        self.own.on_before_backward(self.state, loss)
        (self.target if "backward" in self.own.own else loss).backward(*((loss,) if "backward" in self.own.own else ()), *given, **more)
        self.own.on_after_backward(self.state)

    def zero_grad(self, state: State, optimizer: Optimizer) -> None:
        """The target's own way, if it has one."""
        if "optimizer_zero_grad" in self.own.own:
            self.target.optimizer_zero_grad(state.epoch, state.batch, optimizer)
        else:
            super().zero_grad(state, optimizer)

    @property
    def clips(self) -> bool:  # type: ignore[override]
        """Whether the target has its own way."""
        return "configure_gradient_clipping" in self.own.own

    def clip(self, state: State) -> None:
        """The target's own way."""
        assert self.facade is not None
        for optimizer in self.made:
            self.target.configure_gradient_clipping(optimizer, self.facade.gradient_clip_val, self.facade.gradient_clip_algorithm)

    def step(self, state: State, optimizer: Optimizer) -> None:
        """The target's own way, if it has one. Its closure was run already: it gives the loss, once.

        Raises:
            DataError: it is asked a second time, as LBFGS does.
        """
        if "optimizer_step" not in self.own.own:
            return super().step(state, optimizer)
        asked: list[bool] = []

        def closure() -> Tensor:
            if asked:
                raise DataError("The closure of optimizer_step is run a second time; the gradients are those of one run.", where=type(self.target).__name__,
                                do="Use manual optimization for optimizers that evaluate the loss several times in a step.")
            asked.append(True)
            return self.output["loss"]

        self.target.optimizer_step(state.epoch, self._place[1], optimizer, closure)
        return None

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
        batch = self._transferred(batch)
        self._place, self.stage_means = (batch, index), means
        try:
            return _called(step, batch, index)
        finally:
            self.stage_means = None

    # -- logging ----------------------------------------------------------------------------------------------------------

    def log(self, name: str, value: Any, prog_bar: bool = False, logger: bool | None = None, on_step: bool | None = None, on_epoch: bool | None = None,
            reduce_fx: Any = "mean", batch_size: int | None = None, **_: Any) -> None:
        """`self.log` of the target. By default a value of a training step goes into the step's row, one of an evaluation into its mean, one
        of a hook at the end of something into that row. With on_step and on_epoch both, `<name>_step` and `<name>_epoch`.

        Raises:
            DataError: `reduce_fx` is none of mean, sum, min and max; or no mean, and there are several processes.
        """
        kind = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", repr(reduce_fx))
        if kind not in ("mean", "sum", "min", "max"):
            raise DataError(f"{name} is reduced by {kind}.", where="self.log", do="Write mean, sum, min or max.")
        if kind != "mean" and self.state.world > 1:
            raise DataError(f"{name} is reduced by {kind}, which is for one process.", where="self.log", do="Log its mean, or a metric of torchmetrics.")
        if prog_bar:
            self.state.shown |= {name}
        if self.row is not None:
            self.row[name] = float(value.compute() if hasattr(value, "compute") else value)
            return
        weight = float(samples(self._place[0]) if batch_size is None else batch_size)
        if self.stage_means is not None:
            self._gather(self.stage_means, name, value, weight, kind)
            return
        if on_step and on_epoch:
            self.both.add(name)
        if on_epoch or hasattr(value, "compute"):
            self._gather(self.means, f"{name}_epoch" if on_step else name, value, weight, kind)
        if on_step is not False and not hasattr(value, "compute"):
            number = float(value.detach() if isinstance(value, Tensor) else value)
            self.state.metrics[name] = number
            if logger is not False:
                self.state.log(f"{name}_step" if on_epoch else name, number)

    def _gather(self, means: Means, name: str, value: Any, weight: float, kind: str) -> None:
        if hasattr(value, "compute"):
            means.add(name, _Kept(value, self._kept))
            return
        if kind == "mean":
            means.add(name, value, weight)
            return
        number, known = float(value), means.sums.get(name, (0.0 if kind == "sum" else math.nan, 1.0))[0]
        means.sums[name] = known + number if kind == "sum" else number if math.isnan(known) else {"min": min, "max": max}[kind](known, number), 1.0

    def log_dict(self, values: Mapping[str, Any], *given: Any, **more: Any) -> None:
        """`self.log_dict` of the target."""
        for name, value in values.items():
            self.log(name, value, *given, **more)


def _called(step: Callable[..., Any], batch: Batch, index: int) -> Any:
    """`step(batch, index)`, or `step(batch)` if it takes nothing more."""
    taken = inspect.signature(step).parameters.values()
    several = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in taken) > 1 or any(p.kind is p.VAR_POSITIONAL for p in taken)
    if several:
        return step(batch, index)
    return step(batch, batch_idx=index) if any(p.name == "batch_idx" for p in taken) else step(batch)


def _clip(optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None) -> None:
    parameters: Sequence[nn.Parameter] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if gradient_clip_val is None:
        return
    if gradient_clip_algorithm == "value":
        nn.utils.clip_grad_value_(parameters, gradient_clip_val)
    else:
        nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
