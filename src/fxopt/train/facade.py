"""What code written for Lightning sees as `trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fxopt.train.callbacks import State

_STAGES = {"fit": "fit", "validate": "validate", "test": "test", "predict": "predict"}


class RunLogger:
    """What such code sees as `logger`: numbers go into the run's log.

    Args:
        state: of the run. loggers: the run's own, whose objects `experiment` gives.
    """

    name, version = "fxopt", 0

    def __init__(self, state: State, loggers: Any) -> None:
        self.state, self.loggers = state, list(loggers)
        self.save_dir = self.log_dir = self.root_dir = str(state.folder) if state.folder is not None else None

    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Into the next row; its step is the row's."""
        for name, value in metrics.items():
            self.state.log(name, value)

    def log_hyperparams(self, params: Any, metrics: Mapping[str, float] | None = None) -> None:
        """To the loggers."""
        for logger in self.loggers:
            logger.log_hparams(dict(params) if isinstance(params, Mapping) else vars(params))
        self.log_metrics(metrics or {})

    @property
    def experiment(self) -> Any:
        """The writer, run or client of the first logger.

        Raises:
            AttributeError: there is none.
        """
        for logger in self.loggers:
            for name in ("writer", "run", "client"):
                if hasattr(logger, name):
                    return getattr(logger, name)
        raise AttributeError("the run has no logger of another program; give one: Trainer(loggers=[TensorBoard(...)])")


class Facade:
    """What code written for Lightning sees as `trainer`: read from the run, but for `should_stop`, which may be set.

    Attributes that Lightning's Trainer has and this does not are an AttributeError that says so.

    Args:
        state: of the run. settings: the trainer.
    """

    def __init__(self, state: State, settings: Any) -> None:
        self.state_of_run, self._settings = state, settings
        self.check_val_every_n_epoch, self.val_check_interval = 1, settings.validate_every or 1.0
        self.sanity_checking = self.barebones = self.received_sigterm = False
        self.num_nodes, self.num_sanity_val_steps = 1, 0
        self.strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all=True: decision, barrier=lambda name=None: None)
        self.logger = RunLogger(state, settings.loggers)
        self.loggers = [self.logger]
        self.callbacks, self.fast_dev_run, self.accumulate_grad_batches = list(settings.callbacks), settings.fast_dev_run, settings.accumulate
        self.gradient_clip_val = settings.clip if settings.clip_value is None else settings.clip_value
        self.gradient_clip_algorithm = "norm" if settings.clip_value is None else "value"
        self.precision = {None: "32-true", "fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[settings.precision]
        self.enable_validation, self.limit_train_batches, self.limit_val_batches = True, settings.limit_train or 1.0, settings.limit_validate or 1.0

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__["state_of_run"]
        found: dict[str, Callable[[], Any]] = {
            "current_epoch": lambda: state.epoch - state.closing, "global_step": lambda: state.step if state.own_steps is None else state.own_steps,
            "max_steps": lambda: state.steps, "estimated_stepping_batches": lambda: state.steps, "num_training_batches": lambda: float("inf") if state.batches is None else state.batches,
            "max_epochs": lambda: self._settings.epochs, "optimizers": lambda: list(state.optimizers), "world_size": lambda: state.world, "num_devices": lambda: state.world,
            "global_rank": lambda: state.rank, "local_rank": lambda: state.rank, "is_global_zero": lambda: state.rank == 0,
            "is_last_batch": lambda: state.batches is not None and state.batch + state.micro >= state.batches,
            "callback_metrics": lambda: {key: torch.tensor(value) for key, value in state.metrics.items()}, "logged_metrics": lambda: dict(state.metrics),
            "progress_bar_metrics": lambda: {key: value for key, value in state.metrics.items() if key in state.shown}, "model": lambda: state.model,
            "lightning_module": lambda: state.model, "training": lambda: state.stage == "fit", "validating": lambda: state.stage == "validate",
            "testing": lambda: state.stage == "test", "predicting": lambda: state.stage == "predict", "evaluating": lambda: state.stage in ("validate", "test"),
            "should_stop": lambda: state.stop, "default_root_dir": lambda: str(state.folder or "."),
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
