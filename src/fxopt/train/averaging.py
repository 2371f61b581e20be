"""Averages of the weights over a run: exponential (EMA) and equal (SWA)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import DataError
from fxopt.torch_private import foreach_lerp_
from fxopt.train.batch import Batch, call, to_device
from fxopt.train.callbacks import Callback, State
from fxopt.train.task import device_of


class Averaged(Callback):
    """Keeps an average of the weights that train; validations, and the end of the run, use it in their place.

    Args:
        decay: of the exponential moving average (Polyak and Juditsky, 1992): average = decay * average + (1 - decay) * weights. None: the
            equal mean of what is collected (SWA: Izmailov et al., 2018, https://arxiv.org/abs/1803.05407).
        start: finished steps before anything is collected. every: steps between two weights that are collected.
        validate: evaluate the average. replace: the run ends with the average as the weights.

    A model with batch norm needs `refresh_batch_norm` after the run: the averaged weights have other statistics.

    Raises:
        DataError: settings that make no sense.
    """

    def __init__(self, decay: float | None = 0.999, *, start: int = 0, every: int = 1, validate: bool = True, replace: bool = True) -> None:
        if decay is not None and not 0 <= decay < 1 or start < 0 or every < 1:
            raise DataError(f"decay={decay}, start={start}, every={every}", where="Averaged", do="decay is from 0 to below 1 or None, start 0 or more, every at least 1")
        self.decay, self.start, self.every, self.validate, self.replace = decay, start, every, validate, replace
        self.average: dict[str, Tensor] = {}
        self.collected = 0
        self._aside: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_step_end(self, state: State) -> None:
        if state.step <= self.start or (state.step - self.start - 1) % self.every:
            return
        weights = _trained(state)
        self.collected += 1
        new = [name for name in weights if name not in self.average]
        known = [name for name in weights if name in self.average]
        if known:
            share = 1.0 / self.collected if self.decay is None else 1.0 - self.decay
            foreach_lerp_([self.average[name] for name in known], [weights[name].detach() for name in known], share)
        self.average |= {name: weights[name].detach().clone() for name in new}

    def on_validation_start(self, state: State) -> None:
        if self.validate and self.average:
            self._aside = self._put(state, self.average)

    def on_validation_end(self, state: State, metrics: Mapping[str, float]) -> None:
        if self._aside:
            self._put(state, self._aside)
            self._aside = {}

    def on_exception(self, state: State, error: BaseException) -> None:
        if self._aside:
            self._put(state, self._aside)
            self._aside = {}

    def on_fit_end(self, state: State) -> None:
        if self.replace and self.average:
            self._put(state, self.average)

    @torch.no_grad()
    def _put(self, state: State, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write values into the model; what was there before."""
        held = _trained(state)
        before = {name: held[name].detach().clone() for name in values}
        for name, value in values.items():
            held[name].copy_(value)
        return before

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "collected": self.collected}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.collected = dict(state["average"]), state["collected"]


def _trained(state: State) -> dict[str, nn.Parameter]:
    trained = {id(parameter) for optimizer in state.optimizers for group in optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in state.model.named_parameters() if id(parameter) in trained}


@torch.no_grad()
def refresh_batch_norm(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Computes the running statistics of a model's batch norms anew, as equal means over some batches; how many norms it has."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats]
    kept = [(norm, norm.momentum) for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch: the cumulative mean
        model.train()
        for batch in batches if norms else ():
            call(model, to_device(batch, device_of(model)))
    finally:
        for norm, momentum in kept:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return len(norms)
