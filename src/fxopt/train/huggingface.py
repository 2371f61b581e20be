"""Hugging Face `TrainerCallback` objects as they are. Nothing of Transformers is imported."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fxopt.train.callbacks import Callback, State

log = logging.getLogger("fxopt")

HOOKS = ("on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end", "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step",
         "on_step_end", "on_evaluate", "on_predict", "on_prediction_step", "on_save", "on_log")
"""The hooks that are called."""


@dataclass
class Control:
    """The switches of `TrainerControl`."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class TrainerCallbackHooked(Callback):
    """Calls a TrainerCallback's hooks with (args, state, control, **kwargs) when our events fire, and does what `control` then says:
    stop, save, evaluate.

    Args:
        target: the callback. settings: the trainer.
    """

    def __init__(self, target: Any, settings: Any) -> None:
        self.target, self.control = target, Control()
        folder = str(settings.output_dir) if settings.output_dir is not None else "."
        self.args = SimpleNamespace(output_dir=folder, logging_dir=folder, max_steps=settings.steps or -1, num_train_epochs=settings.epochs or 0, learning_rate=settings.lr,
                                    gradient_accumulation_steps=settings.accumulate, seed=settings.seed, logging_steps=settings.log_every, eval_strategy="steps" if settings.validate_every else "epoch",
                                    eval_steps=settings.validate_every, max_grad_norm=settings.clip, weight_decay=settings.weight_decay, report_to=[], load_best_model_at_end=True,
                                    metric_for_best_model="loss", greater_is_better=False, per_device_train_batch_size=settings.batch_size, world_size=1, process_index=0, local_rank=-1, disable_tqdm=True)
        base = next((cls for cls in type(target).__mro__ if cls.__name__ == "TrainerCallback"), None)
        own = {name for name in dir(type(target)) if name.startswith("on_") and (base is None or getattr(type(target), name) is not getattr(base, name, None))}
        self.own = own & set(HOOKS)
        if odd := sorted(own - set(HOOKS)):
            log.warning("fxopt: %s overrides %s, which %s never called here (supported: fxopt.train.huggingface.HOOKS)", type(target).__name__, ", ".join(odd), "is" if len(odd) == 1 else "are")

    def _call(self, state: State, name: str, **more: Any) -> None:
        if name not in self.own:
            return
        view = SimpleNamespace(epoch=float(state.epoch), global_step=state.step, max_steps=state.steps, num_train_epochs=self.args.num_train_epochs, log_history=[dict(state.metrics)],
                               best_metric=None, best_model_checkpoint=None, is_local_process_zero=True, is_world_process_zero=state.rank == 0, is_hyper_param_search=False)
        returned = getattr(self.target, name)(self.args, view, self.control, model=state.model, optimizer=state.optimizer, lr_scheduler=None, train_dataloader=None,
                                              eval_dataloader=None, processing_class=None, **more)
        control = returned or self.control
        if control.should_training_stop:
            state.stop, state.why = True, f"{type(self.target).__name__} stopped it"
        state.save_now |= bool(control.should_save)
        state.validate_now |= bool(control.should_evaluate)
        control.should_save = control.should_evaluate = control.should_log = False

    def on_setup(self, state: State, stage: str) -> None:
        self._call(state, "on_init_end")

    def on_fit_start(self, state: State) -> None:
        self._call(state, "on_train_begin")

    def on_fit_end(self, state: State) -> None:
        self._call(state, "on_train_end")

    def on_epoch_start(self, state: State) -> None:
        self._call(state, "on_epoch_begin")

    def on_epoch_end(self, state: State) -> None:
        self._call(state, "on_epoch_end")

    def on_step_start(self, state: State) -> None:
        self._call(state, "on_step_begin")

    def on_batch_start(self, state: State, batch: Any, index: int) -> None:
        if state.micro:  # the batch before it was not the last of its step
            self._call(state, "on_substep_end")

    def on_before_optimizer_step(self, state: State, optimizer: Any) -> None:
        self._call(state, "on_pre_optimizer_step")

    def on_step_end(self, state: State) -> None:
        self._call(state, "on_optimizer_step")
        self._call(state, "on_step_end")

    def on_validation_batch_end(self, state: State, batch: Any, index: int, output: Any) -> None:
        self._call(state, "on_prediction_step")

    def on_validation_end(self, state: State, metrics: Mapping[str, float]) -> None:
        names = {name.replace("val_", "eval_", 1): value for name, value in metrics.items()}
        self._call(state, "on_evaluate", metrics=names)

    def on_predict_end(self, state: State) -> None:
        self._call(state, "on_predict", metrics={})

    def on_saved(self, state: State, path: Path) -> None:
        self._call(state, "on_save")

    def on_log(self, state: State, row: Mapping[str, float]) -> None:
        self._call(state, "on_log", logs=dict(row))
