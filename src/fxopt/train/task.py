"""What is trained: a module that computes its loss, a loss function beside one, or a module that says its own steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxopt.errors import DataError
from fxopt.runtime.counting import Counter, Items, labelled, samples, supervised_items
from fxopt.runtime.stored import StoredWeight
from fxopt.train.batch import Batch, call, loss_of, model_loss
from fxopt.train.callbacks import Callback, State
from fxopt.train.metrics import Means, Metric, Values, feed
from fxopt.train.optimizers import Optimizer, Rates

PREFIX = {"validate": "val_", "test": "test_", "predict": ""}
Loss = Callable[[nn.Module, Batch], Any]
"""From the model and a batch to its mean loss, or to something with a `loss`."""


class Task(Protocol):
    """What the loop asks of what it trains.

    Attributes:
        module: whose parameters are trained. manual: it does its own backwards and steps. hooks: events that it wants. calls_module: a
            batch is what the module's forward takes. clips: it clips gradients in its own way.
    """

    module: nn.Module
    manual: bool
    hooks: list[Callback]
    calls_module: bool
    clips: bool

    def begin(self, state: State, means: Means, trainer: Any) -> None:
        """A run begins, and the state's optimizers are not made yet; logged values go to the state (of steps) and the means (of epochs)."""

    def end(self) -> None:
        """The run is over."""

    def optimizers(self) -> tuple[list[Optimizer], Rates | None] | None:
        """Its own optimizers and rates; None: the trainer's."""

    def loss(self, model: nn.Module, batch: Batch, index: int) -> Tensor | None:
        """The mean loss of a batch, 0-dim; None: leave it out. `model` is the module, or what a strategy made of it."""

    def differentiated(self, loss: Tensor) -> Any:
        """What `.backward()` is called on: the loss, or what calls a backward of the task's own."""

    def zero_grad(self, state: State, optimizer: Optimizer) -> None:
        """Empties the gradients before a step."""

    def clip(self, state: State) -> None:
        """Clips the gradients of the step, if `clips`."""

    def step(self, state: State, optimizer: Optimizer) -> None:
        """The optimizer takes its step."""

    def hyperparameters(self) -> dict[str, Any]:
        """For the loggers, beside the trainer's settings."""

    def callbacks(self) -> list[Any]:
        """Callbacks that it brings, after the trainer's."""

    def items(self, counter: Counter, batch: Batch) -> Items:
        """What that loss is the mean of."""

    def evaluate(self, model: nn.Module, batch: Batch, index: int, stage: str, means: Means) -> Any:
        """Add a batch's values to the means; gives what the model returned."""


class Steps:
    """How a step is taken, unless a task has its own way. See `Task`."""

    clips = False

    def differentiated(self, loss: Tensor) -> Any:
        """The loss."""
        return loss

    def zero_grad(self, state: State, optimizer: Optimizer) -> None:
        """None, so that the first backward writes and does not add."""
        optimizer.zero_grad(set_to_none=True)

    def clip(self, state: State) -> None:
        """The trainer does."""

    def step(self, state: State, optimizer: Optimizer) -> None:
        """The optimizer's own."""
        optimizer.step()

    def hyperparameters(self) -> dict[str, Any]:
        """None."""
        return {}

    def callbacks(self) -> list[Any]:
        """None."""
        return []


class ModelTask(Steps):
    """A module, with its own loss or a function's.

    Args:
        module: it. loss: None: the module returns it. count: how many items a batch's loss is the mean of; None: the graph, the labels
            or the samples say. metrics: of evaluations, by name.
    """

    manual = False

    def __init__(self, module: nn.Module, loss: Loss | None = None, count: Callable[[Batch], int] | None = None,
                 metrics: Mapping[str, Metric | Values] | None = None) -> None:
        self.module, self.function, self.count, self.metrics = module, loss, count, metrics or {}
        self.hooks: list[Callback] = []
        self.calls_module = loss is None

    def begin(self, state: State, means: Means, trainer: Any) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def optimizers(self) -> None:
        """The trainer's."""
        return None

    def loss(self, model: nn.Module, batch: Batch, index: int) -> Tensor:
        """See `Task`."""
        if self.function is None:
            return model_loss(model, batch)
        return loss_of(self.function(model, batch), getattr(self.function, "__name__", "loss"))

    def items(self, counter: Counter, batch: Batch) -> Items:
        """See `Task`."""
        return counter(batch)

    def evaluate(self, model: nn.Module, batch: Batch, index: int, stage: str, means: Means) -> Any:
        """See `Task`. The loss of a prediction is not asked for."""
        output = call(model, batch) if self.function is None or stage == "predict" else self.function(model, batch)
        if stage == "predict":
            return output
        if not (isinstance(output, Tensor) and output.dim() and self.metrics):  # metrics alone may do
            weight = float(self.count(batch)) if self.count is not None else float(supervised_items(batch) if labelled(batch) else samples(batch))
            if weight:
                means.add(f"{PREFIX[stage]}loss", loss_of(output, type(self.module).__name__), weight)
        feed(self.metrics, means, output, batch, PREFIX[stage])
        return output


def check_trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient.

    Raises:
        DataError: there are none.
    """
    found = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not found:
        raise DataError("No parameter of the model requires a gradient.", where=type(module).__name__)
    return found


def changing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that training may change, by name: all but the codes of stored weights."""
    stored = {id(buffer) for part in module.modules() if isinstance(part, StoredWeight) for buffer in part.buffers()}
    return {name: buffer for name, buffer in module.named_buffers() if id(buffer) not in stored}


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter lies."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device
