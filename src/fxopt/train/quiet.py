"""Trial runs: a few real steps of a trainer on a model, after which everything is as it was, bit for bit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fxopt.errors import DataError
from fxopt.train import randomness
from fxopt.train.callbacks import Callback
from fxopt.train.optimizers import Optimizer, Rates
from fxopt.train.run import Run
from fxopt.train.signals import Signals
from fxopt.train.task import Task, changing_buffers

if TYPE_CHECKING:
    from fxopt.train.trainer import Trainer


@contextlib.contextmanager
def unchanged(task: Task, optimizers: Sequence[Optimizer] = ()) -> Iterator[None]:
    """Afterwards parameters, their flags and gradients, buffers, states of the given optimizers and random states are as before."""
    module = task.module
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in (*(p for p, flag, _ in flags if flag), *changing_buffers(module).values())]
    states, random = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers], randomness.states()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        randomness.restore(random)


def trial(trainer: Trainer, model: Any, data: Any, steps: int, callbacks: Sequence[Callback] = (), rates: Rates | None = None) -> Run:
    """`steps` steps of the trainer's own loop without files, logs, validation and callbacks of its own; nothing of them stays.

    Args:
        rates: None: the trainer's schedule.

    Raises:
        DataError: what `Trainer.fit` refuses; several processes.
    """
    given = trainer.optimizer
    own = [given] if isinstance(given, Optimizer) else list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
    quiet = replace(trainer, steps=steps, epochs=None, max_seconds=None, output_dir=None, callbacks=callbacks, loggers=(), checkpoints=False, progress=False, profile=False,
                    validate_every=None, not_finite="skip", spikes=None, fast_dev_run=False, schedule="constant", warmup=0)
    task = quiet._task(model)
    with contextlib.ExitStack() as stack:
        strategy = stack.enter_context(quiet._processes(task))
        if strategy.world > 1:
            raise DataError(f"Trial runs are for one process, not {strategy.world}.", where="the trainer", do="Tune with strategy=\"single\", then start the run.")
        stack.enter_context(unchanged(task, own))
        stack.enter_context(randomness.deterministic(quiet.deterministic))
        stack.callback(task.end)
        if quiet.seed is not None:
            randomness.seed_all(quiet.seed)
        run = quiet._run(task, strategy, quiet._sources(data, None, strategy)[0], None, None, Signals())
        if rates is not None:
            run.rates = rates
        quiet._fitted(run, None, False)
    return run
