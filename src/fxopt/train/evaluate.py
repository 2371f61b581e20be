"""Passing over data without learning: validation, test, prediction."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxopt.errors import DataError
from fxopt.train.batch import to_device
from fxopt.train.callbacks import Callback, Events, State
from fxopt.train.loader import Source
from fxopt.train.metrics import Means
from fxopt.train.randomness import isolated
from fxopt.train.strategies import Strategy
from fxopt.train.task import Task, device_of

_EVENTS = {
    "validate": (Callback.on_validation_start, Callback.on_validation_batch_start, Callback.on_validation_batch_end, Callback.on_validation_end),
    "test": (Callback.on_test_start, Callback.on_test_batch_start, Callback.on_test_batch_end, Callback.on_test_end),
    "predict": (Callback.on_predict_start, Callback.on_predict_batch_start, Callback.on_predict_batch_end, None),
}


def evaluate(task: Task, model: nn.Module, source: Source, stage: str, state: State, events: Events, limit: int | None,
             precision: Callable[[], contextlib.AbstractContextManager[Any]], strategy: Strategy, outputs: list[Any] | None = None) -> dict[str, float]:
    """The means over the data of all ranks, by name; every sample counts once.

    The model is in evaluation mode meanwhile, and random states are as before afterwards: training goes on as if nothing had been.

    Args:
        stage: validate, test or predict. limit: batches; None: all. outputs: where predictions are put, of
            this rank's batches.

    Raises:
        DataError: the data is empty.
    """
    modes = [(module, module.training) for module in task.module.modules()]
    outer, state.stage = state.stage, stage
    started, before, after, ended = _EVENTS[stage]
    means, device, number, spare = Means(), device_of(task.module), 0, None
    model.eval()
    try:
        with torch.no_grad(), isolated():
            events(started, state)
            for index, batch in enumerate(itertools.islice(source.batches(0, 0), limit)):
                if strategy.lockstep and not index:
                    spare = next((given for given in strategy.share(batch) if given is not None), None)
                if batch is None:
                    if strategy.lockstep:  # the others' forwards need this rank's part of the weights
                        with precision(), strategy.no_sync(model, True):
                            task.evaluate(model, to_device(spare, device), index, stage, Means())
                    continue
                number += 1
                batch = to_device(batch, device)
                events(before, state, batch, index)
                with precision(), strategy.no_sync(model, True):
                    output = task.evaluate(model, batch, index, stage, means)
                if outputs is not None:
                    outputs.append(output)
                events(after, state, batch, index, output)
            if not int(sum(strategy.reduce([number]))):
                raise DataError(f"There is no batch to {stage}.", where="the data", do="Give data that can be passed over again (a list or a DataLoader, no iterator).")
            results = means.results(strategy)
            if ended is not None:
                events(ended, state, results)
            else:
                events(Callback.on_predict_end, state)
    finally:
        state.stage = outer
        for module, training in modes:
            module.training = training
    return results
