"""One run of the training loop: everything that changes while it goes on, and what each line of the loop does to it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxopt.errors import DataError
from fxopt.ir.text import text
from fxopt.runtime.counting import Counter
from fxopt.runtime.scaler import Scaler
from fxopt.train.anomaly import first_not_finite
from fxopt.train.batch import Batch, real_tokens, to_device
from fxopt.train.callbacks import Callback, Events, State, Step
from fxopt.train.evaluate import evaluate
from fxopt.train.groups import Group, read, stand_in
from fxopt.train.guard import Guard
from fxopt.train.loader import Source
from fxopt.train.metrics import Means
from fxopt.train.optimizers import Optimizer, Rates
from fxopt.train.strategies import Strategy
from fxopt.train.task import Task, device_of

if TYPE_CHECKING:
    from fxopt.train.journal import Journal
    from fxopt.train.saver import Saver

log = logging.getLogger("fxopt")


@dataclass(frozen=True)
class Plan:
    """What does not change during a run."""

    steps: int
    epochs: int | None
    accumulate: Callable[[int, int], int]
    """Batches of the step with this number in this epoch."""
    clip: float | None = None
    clip_value: float | None = None
    limit_train: int | None = None
    limit_validate: int | None = None
    validate_every: int | None = None
    """Steps between validations; None: at the end of each epoch."""
    log_every: int = 1
    autocast: torch.dtype | None = None
    deadline: float | None = None
    """Seconds (of `time.monotonic`) after which no step begins."""


@dataclass
class Run:
    """The run. The methods are the lines of the loop, in its order."""

    plan: Plan
    task: Task
    model: nn.Module
    """What is called: the task's module, or what the strategy made of it."""
    state: State
    events: Events
    data: Source
    validation: Source | None
    optimizers: Sequence[Optimizer]
    rates: Rates
    parameters: Sequence[nn.Parameter]
    counter: Counter
    guard: Guard
    strategy: Strategy
    journal: Journal
    saver: Saver | None = None
    scaler: Scaler | None = None
    graph_scaler: bool = False
    """Whether the first program says if a scaler is needed."""
    means: Means = field(default_factory=Means)
    losses: list[Tensor | float] = field(default_factory=list)
    """Of the batches of the present step, each weighed by its share."""
    step_before: int = 0
    """Finished steps when the epoch began."""
    validated_at: int = -1
    """Finished steps at the last validation."""
    graphs: set[str] = field(default_factory=set)
    """Hashes of the programs that batches ran through."""
    known_graphs: set[str] = field(default_factory=set)
    """Those of the checkpoint."""
    hashed: list[Any] = field(default_factory=list)
    """The programs themselves."""
    spare: Batch = None
    """A batch for a rank that has none, where all must run as many forwards."""
    signal: int | None = None
    """The signal to obey; of several ranks, agreed upon."""
    resumed: bool = False
    """The state was restored, and the next epoch or step goes on where it stood."""

    def __post_init__(self) -> None:
        self.device = device_of(self.task.module)
        self.settled = False  # nothing that a rank may ask for has run since the ranks agreed
        self.exhausted = False

    def done(self) -> bool:
        """Whether no step is to begin."""
        state, plan = self.state, self.plan
        if state.world == 1:
            self._look_at_the_clock()
        return state.step >= plan.steps or state.stop or state.epoch == plan.epochs

    def _look_at_the_clock(self) -> None:
        if self.plan.deadline is not None and time.monotonic() > self.plan.deadline and not self.state.stop:
            self.state.stop, self.state.why = True, "the time is used up"

    def _agree(self) -> None:
        """What one rank asks for, all do; numbers that were logged become means over the ranks that logged them."""
        state, saver = self.state, self.saver
        pending = saver.signals.pending if saver is not None else None
        if state.world == 1:
            self.signal = pending
            return
        self._look_at_the_clock()
        asked = saver is not None and not state.rank and saver.asks()
        votes = self.strategy.share([state.stop, state.why, state.validate_now, state.save_now or asked, pending, state.logged])
        state.stop, state.validate_now, state.save_now = (any(vote[place] for vote in votes) for place in (0, 2, 3))
        state.why = next((vote[1] for vote in votes if vote[1]), "")
        self.signal = next((vote[4] for vote in votes if vote[4] is not None), None)
        names = dict.fromkeys(name for vote in votes for name in vote[5])
        state.logged = {name: statistics.fmean(vote[5][name] for vote in votes if name in vote[5]) for name in names}

    # -- data ---------------------------------------------------------------------------------------------------------

    def start_epoch(self) -> bool:
        """Begin an epoch, unless it is one that a restored run has begun already. False: the run is done.

        A run that was saved after its last step, but before the end of the epoch, has that end before it.
        """
        if self.resumed:
            return not self.done() or self.epoch_is_over()
        if self.done():
            return False
        self.step_before = self.state.step
        self.events(Callback.on_epoch_start, self.state)
        self._agree()
        return True

    def groups(self) -> Iterator[Group]:
        """The steps of the rest of this epoch, from the present position on."""
        state, plan = self.state, self.plan
        batches = self.data.batches(state.epoch, state.batch)
        if plan.limit_train is not None:
            batches = itertools.islice(batches, max(0, plan.limit_train - state.batch))
        self.exhausted = False
        while not self.done():
            group = read(self, batches, plan.accumulate(state.step, state.epoch))
            if group is None:
                self.exhausted = True
                return
            yield group

    def note_graph(self) -> None:
        """Remember the hash of the program that a batch runs through; of a resumed run, compare it with those of the checkpoint."""
        if not self.counter.optimized or self.counter.count is not None and not self.graphs and getattr(self.task.module.dispatcher, "last", None) is None:
            return  # nothing was captured yet
        new = [program for program in self.task.module.programs if program not in self.hashed]  # type: ignore[union-attr]
        self.hashed += new
        for program in new:
            number = hashlib.sha256(text(program).encode()).hexdigest()
            if self.known_graphs and number not in self.known_graphs:
                log.warning("fxopt: the graph of batch %d was not among those of the checkpoint (another torch, or inputs of a new kind): results may differ in the last bits", self.state.batch)
            self.graphs.add(number)

    def scaler_of(self, batch: Batch) -> None:
        """A loss scaler, if the program of the first batch has gradients in fp16."""
        self.graph_scaler = False
        self.task.module.prepare(batch)  # type: ignore[operator]
        scalers = [scaler for program in self.task.module.programs if (scaler := Scaler.of(program)) is not None]  # type: ignore[union-attr]
        self.scaler = self.scaler or max(scalers, key=lambda scaler: scaler.state.scale, default=None)

    # -- a step ---------------------------------------------------------------------------------------------------------

    def start_step(self, group: Group) -> None:
        """Set the rates and empty the gradients, unless a restored step goes on."""
        state = self.state
        if self.resumed and state.micro:
            self.resumed = False
            return
        self.resumed = False
        self.rates.before_step(state.step)
        if not self.task.manual:
            for optimizer in self.optimizers:
                self.events(Callback.on_before_zero_grad, state, optimizer)
                self.task.zero_grad(state, optimizer)
        self.losses = []
        self.events(Callback.on_step_start, state)

    def backward(self, group: Group, index: int) -> None:
        """Forward and backward of one batch: its share of the step's loss is differentiated, and added."""
        state, place = self.state, self.state.batch + index
        last = state.last = index == len(group.batches) - 1
        if group.batches[index] is None:
            stand_in(self, last)
            state.micro += 1
            return
        batch = group.batches[index] if group.moved else to_device(group.batches[index], self.device)
        self.events(Callback.on_batch_start, state, batch, place)
        with self.strategy.no_sync(self.model, last), self.autocast():
            loss = self.task.loss(self.model, batch, place)
        if loss is None or self.task.manual:
            value = torch.full((), math.nan) if loss is None else loss.detach()
            if not self.task.manual:
                raise DataError("The training step gave no loss.", where=type(self.task.module).__name__, do="Return a loss, or leave the batch out of the data.")
        else:
            share = loss * group.weights[index] if group.weights[index] != 1.0 else loss
            if not share.requires_grad:
                raise DataError(f"The loss of step {state.step + 1} depends on no parameter that is trained.", where=type(self.task.module).__name__,
                                do="Is it detached, or made under no_grad? Or is everything that it depends on frozen (requires_grad, `Freezing`)?")
            self.events(Callback.on_before_backward, state, share)
            self.strategy.backward(self.model, self.task.differentiated(share if self.scaler is None else self.scaler.scale(share)), last)
            value = share.detach()
            self.events(Callback.on_after_backward, state)
        self.losses.append(value)
        state.micro += 1
        self.events(Callback.on_batch_end, state, batch, place, value)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = self.plan.autocast
        return torch.autocast(self.device.type, dtype) if dtype is not None else contextlib.nullcontext()

    def finish_step(self, group: Group) -> None:
        """Clip, judge, step, and write down what the step measured."""
        state = self.state
        if not self.task.manual:
            self.strategy.synchronize(self.model)
        losses = self.known_losses()
        tokens = sum(real_tokens(batch) for batch in group.batches)
        bad = [float(rank == state.rank and not all(map(math.isfinite, losses)) and not self.task.manual) for rank in range(state.world)]
        loss, total, items, *bad = self.strategy.reduce([math.fsum(losses), tokens, group.items, *bad])
        reason, norm = "", math.nan
        if not self.task.manual:
            finite = self.scaler.unscale_(self.parameters) if self.scaler is not None else True
            if self.scaler is not None and self.strategy.lockstep:  # each rank has looked at its own pieces
                finite = not any(self.strategy.reduce([float(not finite)]))
            self.events(Callback.on_backward_end, state)
            norm = self._clip()
            reason = self.guard.judge(state.step + 1, losses, loss, [rank for rank, value in enumerate(bad) if value], norm, self.task.module, state.batch, self.scaler is not None,
                                      lambda index: self._locate(group, index))
            if not reason:
                for optimizer in self.optimizers:
                    self.events(Callback.on_before_optimizer_step, state, optimizer)
                    self.task.step(state, optimizer)
            else:
                log.warning("fxopt: step %d is left out: %s", state.step + 1, reason)
                self.events(Callback.on_skip, state, reason)
            if self.scaler is not None:
                self.scaler.update(finite)
        rate = self.optimizers[0].param_groups[0]["lr"]
        state.batch, state.micro, state.skipped = state.batch + group.used, 0, state.skipped + group.left_out
        items = int(items) if items == int(items) else items
        state.history.append(Step(loss, float(rate), norm, int(total), items, time.perf_counter() - group.started, reason))
        self.rates.after_step()
        self.events(Callback.on_step_end, state)
        self._log_step(state.history[-1])

    def _locate(self, group: Group, index: int) -> str:
        """Where in the model a batch's values become bad; it is asked of one rank, so not where a forward needs all."""
        if group.batches[index] is None or not self.task.calls_module or self.strategy.lockstep:
            return ""
        return first_not_finite(self.task.module, to_device(group.batches[index], self.device))

    def known_losses(self) -> list[float]:
        """Of the batches of the present step so far, each weighed by its share. Waits for the device."""
        if len(self.losses) == 1 and isinstance(self.losses[0], Tensor):
            return [float(self.losses[0])]
        held = [value for value in self.losses if isinstance(value, Tensor)]
        known = iter(torch.stack([value.double() for value in held]).tolist() if held else ())
        return [next(known) if isinstance(value, Tensor) else value for value in self.losses]

    def _clip(self) -> float:
        """The norm of all gradients, which are then clipped."""
        if self.task.clips:
            norm = float(self.strategy.clip_norm(self.parameters, None))
            self.task.clip(self.state)
            return norm
        if self.plan.clip_value is not None:
            norm = self.strategy.clip_norm(self.parameters, None)
            nn.utils.clip_grad_value_(self.parameters, self.plan.clip_value)
            return float(norm)
        return float(self.strategy.clip_norm(self.parameters, self.plan.clip))

    def _log_step(self, step: Step) -> None:
        state = self.state
        if state.world > 1:
            self._agree()
            self.settled = not self.events.wanted["on_log"] and (self.saver is None or not self.saver.policy.best)
        own, state.logged = state.logged, {}
        row = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, "tokens": step.tokens, "items": step.items}
        rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        row |= {f"lr/{i}": float(rate) for i, rate in enumerate(rates) if i}
        row |= {"scale": self.scaler.state.scale} if self.scaler is not None else {}
        row |= {"left_out": 1.0} if step.skipped else {}
        self.log(row | own, write=state.step % self.plan.log_every == 0 or state.step == self.plan.steps)

    def log(self, row: dict[str, float], write: bool = True) -> None:
        """Take a row into the newest values, and give it to those who want it."""
        self.state.metrics.update(row)
        self.rates.see(row)
        if self.saver is not None and not self.state.rank:
            self.saver.see(row)
        if write:
            self.journal.row(self.state, row)
        self.events(Callback.on_log, self.state, row)

    # -- between --------------------------------------------------------------------------------------------------------

    def evaluate_if_due(self) -> None:
        """Validate, if so many steps are done."""
        every = self.plan.validate_every
        if self.validation is not None and (self.state.validate_now or every is not None and self.state.step % every == 0):
            self.state.validate_now = False
            self.validate()

    def validate(self) -> None:
        """A validation, whose row is logged. Training goes on as if there had been none."""
        assert self.validation is not None
        self.settled = False
        self.validated_at = self.state.step
        row = evaluate(self.task, self.model, self.validation, "validate", self.state, self.events, self.plan.limit_validate, self.autocast,
                       self.strategy)
        self.log(row)

    def pause(self) -> None:
        """The only places where a checkpoint is written, or a signal is obeyed."""
        if self.state.world == 1 or not self.state.micro and not self.settled:
            self._agree()
        if self.saver is not None:
            self.saver.between(self)

    def epoch_is_over(self) -> bool:
        """Whether the data was passed over to its end, as far as that is known."""
        length, limit = self.data.length(self.state.epoch), self.plan.limit_train
        length = limit if length is None else length if limit is None else min(length, limit)
        return self.exhausted or self.state.batch == length

    def end_epoch(self) -> None:
        """The data was passed over once more.

        Raises:
            DataError: there was nothing in it.
        """
        state = self.state
        if state.step == self.step_before and not state.stop:
            raise DataError(f"The data gave no batch to train on after step {state.step} of {state.steps}.",
                            do="Give data that can be passed over again (a list or a DataLoader, no iterator), with labels.")
        state.epoch, state.batch, state.closing = state.epoch + 1, 0, True
        self.resumed = self.settled = False
        if self.validation is not None and self.plan.validate_every is None:
            self.validate()
        own = self.means.results(self.strategy)
        if own:
            self.log(own)
        self.events(Callback.on_epoch_end, state)
        late, state.logged, state.closing = state.logged, {}, False
        if late:  # logged at the epoch's end, and so no part of the next step's row
            self.log(late)
        self.rates.after_epoch(state.metrics)
        if self.saver is not None:
            self.saver.epoch_ended(state.epoch)
