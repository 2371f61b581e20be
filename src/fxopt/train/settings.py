"""The settings of a trainer, checked, planned and described."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fxopt.errors import DataError
from fxopt.train.loader import Source
from fxopt.train.schedule import make_schedule
from fxopt.train.strategies import Strategy

if TYPE_CHECKING:
    from fxopt.train.trainer import Trainer

_WHOLE = ("steps", "epochs", "validate_every", "limit_train", "limit_validate", "limit_test", "limit_predict", "overfit_batches", "batch_size", "workers", "log_every",
          "warmup", "seed")


def check(trainer: Trainer) -> None:
    """Refuses settings that contradict each other.

    Raises:
        DataError: with the setting.
    """
    for name in (*_WHOLE, *(("accumulate",) if isinstance(trainer.accumulate, (int, float, str)) else ())):
        value = getattr(trainer, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise DataError(f"`{name}` is {value!r}, which is not a whole number.", where="the trainer")
        if value is not None and value < (0 if name in ("warmup", "seed", "workers", "steps", "epochs") else 1):
            raise DataError(f"`{name}` is {value}, which is too small.", where="the trainer", do=f"`{name}` must be at least {0 if name in ('warmup', 'seed', 'workers') else 1}.")
    for name in ("lr", "weight_decay", "clip", "clip_value", "max_seconds"):
        value = getattr(trainer, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise DataError(f"`{name}` is {value!r}, which is not a number.", where="the trainer")
    if trainer.steps is not None and trainer.epochs is not None:
        raise DataError("Give either `steps` or `epochs`.", where="the trainer")
    named = isinstance(trainer.schedule, str) or isinstance(trainer.schedule, Sequence) and any(isinstance(one, str) for one in trainer.schedule)
    if trainer.warmup and not named:
        raise DataError("`warmup` is for a named schedule.", where="the trainer", do="Put the warm-up into your function.")
    for name in ("clip", "clip_value", "max_seconds"):
        value = getattr(trainer, name)
        if value is not None and not value > 0:
            raise DataError(f"`{name}` is {value}; it must be above 0.", where="the trainer", do="None leaves gradients as they are." if name != "max_seconds" else None)
    if trainer.precision not in (None, "fp32", "bf16", "fp16"):
        raise DataError(f"There is no precision {trainer.precision!r}.", where="the trainer", do="Use fp32, bf16 or fp16.")
    for one in (trainer.schedule,) if isinstance(trainer.schedule, str) else ():
        make_schedule(one, max(1, trainer.warmup), 0)


def accumulation(setting: int | Mapping[int, int] | Callable[[int], int]) -> Callable[[int, int], int]:
    """Batches of a step, by step and epoch.

    Raises:
        DataError: less than one, or from no epoch.
    """
    if isinstance(setting, Mapping):
        known = sorted(setting.items())
        if not known or known[0][0] != 0 or any(number < 1 for _, number in known):
            raise DataError(f"`accumulate` is {dict(setting)}.", where="the trainer", do="Write {0: 4, 2: 1}: from epoch 0 on 4 batches a step, from epoch 2 on 1.")
        return lambda step, epoch: next(number for start, number in reversed(known) if epoch >= start)
    if callable(setting):
        return lambda step, epoch: _at_least_one(setting(step), step)
    return lambda step, epoch: setting


def _at_least_one(number: Any, step: int) -> int:
    if not isinstance(number, int) or number < 1:
        raise DataError(f"`accumulate` gave {number!r} for step {step}.", where="the trainer", do="At least one batch makes a step.")
    return number


def planned_steps(data: Source, steps: int | None, epochs: int | None, accumulate: Callable[[int, int], int], limit: int | None) -> int:
    """The optimizer steps of a run.

    Raises:
        DataError: neither steps nor epochs; epochs of data without a length; nothing to do.
    """
    if (steps is None) == (epochs is None):
        raise DataError("Give either `steps` or `epochs`.", where="the trainer")
    if steps is None:
        assert epochs is not None
        steps = 0
        for epoch in range(epochs):
            length = data.length(epoch)
            left = limit if length is None else length if limit is None else min(length, limit)
            if left is None:
                raise DataError("The data has no length, so `epochs` cannot be planned.", where="the trainer", do="Give `steps`.")
            while left > 0:
                left, steps = left - accumulate(steps, epoch), steps + 1
    if steps < 1:
        raise DataError(f"There are {steps} steps to run.", where="the trainer", do="Is the data empty?")
    return steps


def known(data: Source, limit: int | None) -> int | None:
    """The batches of the first epoch, if their number is known."""
    length = data.length(0)
    return limit if length is None else length if limit is None else min(length, limit)


def pieces(train: Any, val: Any, strategy: Strategy, stage: str = "fit") -> tuple[Any, Any]:
    """Training and validation data, from a data module too: `prepare_data` once, `setup` on every rank.

    Raises:
        DataError: there is no data.
    """
    name = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}[stage]
    if callable(getattr(train, f"{name}_dataloader", None)):
        module = train
        if callable(getattr(module, "prepare_data", None)):
            if strategy.rank == 0:
                module.prepare_data()
            strategy.barrier()  # what it downloads is there for all
        if callable(getattr(module, "setup", None)):
            module.setup(stage)
        train = getattr(module, f"{name}_dataloader")()
        if stage == "fit" and val is None and callable(getattr(module, "val_dataloader", None)):
            val = module.val_dataloader()
    if train is None:
        raise DataError(f"There is no data to {stage}.", where="the trainer", do="Give batches, a data set with `batch_size`, or a data module.")
    return train, val


def described(trainer: Trainer) -> dict[str, Any]:
    """The settings as plain values, for logs and checkpoints: functions and objects by name."""
    return {setting.name: _plain(getattr(trainer, setting.name)) for setting in fields(trainer)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **{setting.name: _plain(getattr(value, setting.name)) for setting in fields(value)}}
    if isinstance(value, nn.Module):
        return type(value).__name__
    return getattr(value, "__qualname__", type(value).__qualname__)


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ between two descriptions, as text; where a run's files lie and what it shows does not count."""
    names = [name for name in now if name not in ("output_dir", "progress", "loggers", "max_seconds", "profile")]
    return [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in names if before.get(name) != now[name]]
