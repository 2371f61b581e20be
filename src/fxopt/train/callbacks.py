"""The events of a run: points where code of yours runs, what it sees there, and what it may touch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import DataError


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
    skipped: str = ""
    """Why the optimizer did not step; empty where it did."""


@dataclass
class State:
    """The run, as callbacks see it. Set `stop` to end it after the current step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    """The first of `optimizers`."""
    steps: int
    """Planned optimizer steps."""
    history: list[Step] = field(default_factory=list)
    """The steps of this process: after a resume, those since."""
    epoch: int = 0
    """Finished passes over the data."""
    skipped: int = 0
    """Batches without a supervised item, which were left out."""
    stop: bool = False
    why: str = ""
    """Why it stops, for the report; set beside `stop`."""
    first_step: int = 0
    """Steps that were finished before this process took over."""
    batch: int = 0
    """Batches of this epoch that finished steps have used: the position in the data."""
    micro: int = 0
    """Batches of the current step whose gradients are there."""
    optimizers: Sequence[torch.optim.Optimizer] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of everything that was logged, by name."""
    stage: str = "fit"
    """fit, validate, test or predict."""
    rank: int = 0
    world: int = 1
    folder: Path | None = None
    """The run's folder, if it has one."""
    save_now: bool = False
    """Set to ask for a checkpoint at the end of the step."""
    validate_now: bool = False
    """Set to ask for a validation at the end of the step."""
    logged: dict[str, float] = field(default_factory=dict)
    """What `log` was given since the last row."""
    shown: set[str] = field(default_factory=set)
    """Names of logged values that the progress line shows too."""
    batches: int | None = None
    """Batches of an epoch, if that is known."""
    last: bool = False
    """The present batch is the last of its step."""
    closing: bool = False
    """The epoch that `epoch` counts already is being closed: its validation and its end."""
    own_steps: int | None = None
    """Steps that a module took by itself (manual optimization)."""
    times: Any = None
    """Where the time goes, if it is measured."""

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.first_step + len(self.history)

    def log(self, name: str, value: float | Tensor) -> None:
        """Put a number into the row that is logged at the end of the step.

        Raises:
            DataError: it is not one number.
        """
        if isinstance(value, Tensor) and value.numel() != 1:
            raise DataError(f"{name} has {value.numel()} values; a row of the log holds single numbers", where="State.log", do="log its mean, or each under its own name")
        self.logged[name] = float(value.detach() if isinstance(value, Tensor) else value)


class Callback:
    """Does nothing at every point; override the ones you need. Exceptions in a callback end the run.

    Everything may be read everywhere. What a hook *may change* is said with it; what is not named must be left alone, or a resumed
    run is not the one that was interrupted. A callback with a memory gives it in `state_dict`.
    """

    # -- the run -----------------------------------------------------------------------------------------------------

    def on_setup(self, state: State, stage: str) -> None:
        """First of all, before anything is captured, restored or logged. May change the model's weights and flags."""

    def on_fit_start(self, state: State) -> None:
        """Before the first batch is fetched; a checkpoint is restored already. May change what requires a gradient."""

    def on_fit_end(self, state: State) -> None:
        """The run ended without an exception; nothing of it is saved yet. May change weights."""

    def on_exception(self, state: State, error: BaseException) -> None:
        """The run ends with `error`. A last look: change nothing."""

    def on_teardown(self, state: State, stage: str) -> None:
        """Last of all, also after an exception. Release what `on_setup` took."""

    # -- training ----------------------------------------------------------------------------------------------------

    def on_epoch_start(self, state: State) -> None:
        """A pass over the data begins; `state.epoch` are finished. Not again when one is resumed in its middle. May change what
        requires a gradient."""

    def on_step_start(self, state: State) -> None:
        """The learning rate is set, the gradients are empty. May change rates of `state.optimizers` for this step, and what
        requires a gradient. Not again when a step is resumed in its middle."""

    def on_batch_start(self, state: State, batch: Any, index: int) -> None:
        """Before a batch, on the model's device, is given to the model; `index` counts the batches of the epoch. May change the
        batch in place."""

    def on_before_backward(self, state: State, loss: Tensor) -> None:
        """The batch's share of the step's loss, 0-dim, before its backward and before any scaling."""

    def on_after_backward(self, state: State) -> None:
        """The gradients of one batch were added. They are scaled, if the run has a loss scaler."""

    def on_batch_end(self, state: State, batch: Any, index: int, loss: Tensor) -> None:
        """After the backward of a batch; `loss` is its share of the step's loss, 0-dim."""

    def on_backward_end(self, state: State) -> None:
        """The gradients of the whole step are there, unscaled, not yet clipped. May change gradients."""

    def on_before_optimizer_step(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        """For each optimizer: the gradients are clipped. May change gradients and rates."""

    def on_skip(self, state: State, reason: str) -> None:
        """Instead of the optimizers' step: a loss or gradient that is not finite, or a spike. The weights stay as they were."""

    def on_step_end(self, state: State) -> None:
        """The weights are updated; `state.history[-1]` tells of the step. May change weights, `state.log`, and stop the run."""

    def on_before_zero_grad(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        """For each optimizer, before the next step empties its gradients."""

    def on_epoch_end(self, state: State) -> None:
        """The data was passed over once more; validation, if it is due, is done. May stop the run."""

    # -- evaluation: validation, test, prediction ----------------------------------------------------------------------

    def on_validation_start(self, state: State) -> None:
        """Before a validation. The model is in evaluation mode. May change weights, if `on_validation_end` puts them back."""

    def on_validation_batch_start(self, state: State, batch: Any, index: int) -> None:
        """Before a batch of a validation. May change the batch in place."""

    def on_validation_batch_end(self, state: State, batch: Any, index: int, output: Any) -> None:
        """After a batch of a validation; `output` is what the model or the loss function returned."""

    def on_validation_end(self, state: State, metrics: Mapping[str, float]) -> None:
        """After a validation, before its row is logged. May stop the run."""

    def on_test_start(self, state: State) -> None:
        """As for validation."""

    def on_test_batch_start(self, state: State, batch: Any, index: int) -> None:
        """As for validation."""

    def on_test_batch_end(self, state: State, batch: Any, index: int, output: Any) -> None:
        """As for validation."""

    def on_test_end(self, state: State, metrics: Mapping[str, float]) -> None:
        """As for validation."""

    def on_predict_start(self, state: State) -> None:
        """As for validation."""

    def on_predict_batch_start(self, state: State, batch: Any, index: int) -> None:
        """As for validation."""

    def on_predict_batch_end(self, state: State, batch: Any, index: int, output: Any) -> None:
        """As for validation."""

    def on_predict_end(self, state: State) -> None:
        """As for validation."""

    # -- logging and saving --------------------------------------------------------------------------------------------

    def on_log(self, state: State, row: Mapping[str, float]) -> None:
        """A row was logged: of a step (`loss`, `lr`, ...) or of an evaluation (`val_loss`, ...). May stop the run."""

    def on_save(self, state: State, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written; `checkpoint["extra"]` takes plain values and tensors of yours."""

    def on_saved(self, state: State, path: Path) -> None:
        """A checkpoint lies at `path`, whole."""

    def on_load(self, state: State, checkpoint: Mapping[str, Any]) -> None:
        """A checkpoint was read, and everything was restored from it; `checkpoint["extra"]` is what `on_save` put there."""

    def state_dict(self) -> dict[str, Any]:
        """What this callback must remember over a resume: plain values, tensors, and dicts, lists and tuples of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))
"""The names of all events."""


class Events:
    """Fires the events of some callbacks in their order; costs nothing for an event that none of them overrides."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)
        for callback in callbacks:
            _check(callback)
        self.wanted: dict[str, list[Callable[..., None]]] = {
            name: [getattr(callback, name) for callback in callbacks if getattr(type(callback), name) is not getattr(Callback, name)] for name in EVENTS
        }

    def __call__(self, event: Callable[..., None], *arguments: Any) -> None:
        """Fire one: `events(Callback.on_step_end, state)`."""
        for call in self.wanted[event.__name__]:
            call(*arguments)


def _check(callback: Callback) -> None:
    """Raise if an event of a callback cannot take what it will be given: at the start, not hours later.

    Raises:
        DataError: naming the event and its arguments.
    """
    for name in EVENTS:
        mine, wanted = getattr(type(callback), name), list(inspect.signature(getattr(Callback, name)).parameters)[1:]
        if mine is getattr(Callback, name):
            continue
        try:
            inspect.signature(getattr(callback, name)).bind(*wanted)
        except TypeError as error:
            raise DataError(f"{name} cannot be called with ({', '.join(wanted)}): {error}.", where=type(callback).__name__,
                            do=f"Write `def {name}(self, {', '.join(wanted)})`.") from error
        except ValueError:  # a callable that tells no signature
            continue
