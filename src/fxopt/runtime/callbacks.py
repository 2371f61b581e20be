"""Points in the training loop where code of yours runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class Step:
    """What one finished optimizer step measured."""

    loss: float
    """Mean loss over all supervised items of the step."""
    lr: float
    """Learning rate of the first parameter group."""
    grad_norm: float
    """Norm of all gradients before clipping."""
    tokens: int
    """Real tokens: where the attention mask is not 0."""
    items: float
    """What the loss is the mean of: supervised label tokens where batches have labels."""
    seconds: float
    """From fetching the first batch to the end of the optimizer's step."""


@dataclass
class State:
    """The loop, as callbacks see it. Set `stop` to end the run after the current step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    """Planned optimizer steps."""
    history: list[Step] = field(default_factory=list)
    epoch: int = 0
    """Finished passes over the data."""
    skipped: int = 0
    """Batches without a supervised item, which were left out."""
    stop: bool = False

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return len(self.history)


class Callback:
    """Does nothing at every point; override the ones you need. Exceptions in a callback end the run."""

    def on_fit_start(self, state: State) -> None:
        """Before the first batch is fetched."""

    def on_step_start(self, state: State) -> None:
        """The learning rate is set, the gradients are empty."""

    def on_backward_end(self, state: State) -> None:
        """The gradients of the whole accumulated group are there, not yet clipped."""

    def on_step_end(self, state: State) -> None:
        """The weights are updated; `state.history[-1]` tells of the step."""

    def on_epoch_end(self, state: State) -> None:
        """The data was passed over once more."""

    def on_fit_end(self, state: State) -> None:
        """The run ended without an exception; the adapter is not saved yet."""

    def on_exception(self, state: State, error: BaseException) -> None:
        """The run ends with `error`; the weights are those of the last finished step."""
