"""Settings found by trial: batch size from the plan and a real step, learning rate from a sweep, workers from a measurement."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.errors import DataError, FxoptError
from fxopt.runtime.memory import Allocations, available_bytes
from fxopt.runtime.plan import size
from fxopt.train.batch import Batch
from fxopt.train.callbacks import Callback, State
from fxopt.train.loader import Loader, source_of
from fxopt.train.quiet import trial
from fxopt.train.rate import RateCurve, find_rate
from fxopt.train.settings import pieces
from fxopt.train.strategies.single import Single
from fxopt.train.task import device_of

if TYPE_CHECKING:
    from fxopt.train.trainer import Trainer

log = logging.getLogger("fxopt")

SPARE = 0.9  # of the memory that is free: libraries take scratch memory beside torch's
LARGEST = 1 << 16  # samples of a batch
TRIALS, NEAR = 8, 0.9  # steps that are tried, and the part of the memory that is near enough to stop
NOISE = 0.05  # of the time of a batch, at least: two numbers of workers that differ by less are as good as each other


@dataclass(frozen=True)
class BatchSize:
    """The largest batch whose step stays within the memory.

    Attributes:
        samples: of the batch. memory: bytes that a step may take. predicted: by the plan, or by a line through two steps. measured: of a
            real step (forward, backward, optimizer) with it, weights included; bytes. steps: (samples, measured bytes) that were tried.
    """

    samples: int
    memory: int
    predicted: int
    measured: int
    steps: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"batch size {self.samples}: measured {size(self.measured)} of {size(self.memory)} (predicted {size(self.predicted)})"


@dataclass(frozen=True)
class Workers:
    """Processes that load data.

    Attributes:
        number: the smallest that is as fast as the best, within the noise. seconds: of a batch, by number of workers. noise: the largest
            relative difference of two measurements of one number.
    """

    number: int
    seconds: Mapping[int, float]
    noise: float

    def __str__(self) -> str:
        return f"workers {self.number}: " + ", ".join(f"{number}: {seconds * 1e3:.3g} ms" for number, seconds in self.seconds.items()) + f" a batch (noise {self.noise:.0%})"


@dataclass(frozen=True)
class Tuned:
    """What was found; `trainer` is the trainer with it.

    Attributes:
        notes: what was not tuned or not set, and why.
    """

    trainer: Any
    batch_size: BatchSize | None = None
    rate: RateCurve | None = None
    workers: Workers | None = None
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return "\n".join([*(str(found) for found in (self.batch_size, self.rate, self.workers) if found is not None), *(f"note: {note}" for note in self.notes)])


def tune(trainer: Trainer, model: Any, train: Any, *, batch_size: bool = True, rate: bool = True, workers: bool = True, memory: int | None = None) -> Tuned:
    """Finds settings one after the other, each with those found before. Weights, optimizer and random states are as before afterwards;
    with `output_dir`, the sweep of rates lies there (`rate.html`, `rate.json`).

    Args:
        train: as for `Trainer.fit`; no iterator. memory: bytes that a step may take; None: nine tenths of what is free now.

    Raises:
        DataError: an iterator; no memory that is known; not even one sample fits; a loss that does not fall.
    """
    train, _ = pieces(train, None, Single())
    if hasattr(train, "__next__"):
        raise DataError(f"A {type(train).__name__} is used up by a trial run.", where="tune", do="Give data that can be passed over again.")
    notes: list[str] = []
    found: dict[str, Any] = {}
    base = source_of(train, batch_size=trainer.batch_size, seed=trainer.seed or 0)
    samples = trainer.batch_size is not None and not isinstance(train, Loader)
    if batch_size:
        if isinstance(base, Loader):
            found["batch_size"] = find_batch_size(trainer, model, base, memory)
            if samples:
                trainer = replace(trainer, batch_size=found["batch_size"].samples)
            else:
                notes.append(f"the loader makes batches of its own size; make it with {found['batch_size'].samples}")
        else:
            notes.append("the data are batches already: their size stays (give samples and `batch_size`)")
    if workers:
        if isinstance(base, Loader):
            found["workers"] = measure_workers(base if not samples else source_of(train, batch_size=trainer.batch_size, seed=trainer.seed or 0))  # type: ignore[arg-type]
            if samples:
                trainer = replace(trainer, workers=found["workers"].number)
            else:
                notes.append(f"the loader has workers of its own; make it with {found['workers'].number}")
        else:
            notes.append("the data are batches already: nothing is loaded")
    if rate:
        found["rate"] = find_rate(trainer, model, train)
        if trainer.output_dir is not None:
            Path(trainer.output_dir).mkdir(parents=True, exist_ok=True)
            found["rate"].write(Path(trainer.output_dir))
        trainer = _with_rate(trainer, model, found["rate"].suggestion, notes)
    return Tuned(trainer, **found, notes=tuple(notes))


def _with_rate(trainer: Trainer, model: Any, rate: float, notes: list[str]) -> Trainer:
    if callable(getattr(model, "training_step", None)):
        name = next((name for name in ("lr", "learning_rate") if hasattr(model, name)), None)
        if name is not None:
            setattr(model, name, rate)
        else:
            notes.append(f"{type(model).__name__} has neither `lr` nor `learning_rate`: use {rate:.3g} in configure_optimizers")
        return trainer
    if isinstance(trainer.optimizer, str) or callable(trainer.optimizer):
        return replace(trainer, lr=rate)
    notes.append(f"the optimizer was given ready: set its rate to {rate:.3g}")
    return trainer


# -- batch size -------------------------------------------------------------------------------------------------------------


class _Peak(Callback):
    """Measures the second step of a run: the first makes the optimizer's state, and captures."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_step_start(self, state: State) -> None:
        if state.step == 1:
            self.held = Allocations(device_of(state.model))
            self.held.__enter__()

    def on_step_end(self, state: State) -> None:
        if state.step == 2:
            self.held.__exit__(None, None, None)
            tensors = {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
                       for t in (*state.model.parameters(), *state.model.buffers(), *(v for o in state.optimizers for s in o.state.values() for v in s.values() if hasattr(v, "untyped_storage")))}
            self.bytes = self.held.peak + sum(tensors.values())


def step_bytes(trainer: Trainer, model: Any, batch: Batch) -> int:
    """Peak bytes of a real step of the trainer on a batch, which is one step by itself: weights, optimizer states, gradients, activations."""
    peak = _Peak()
    trial(replace(trainer, accumulate=1, batch_size=None), model, [batch, batch], 2, [peak])
    return peak.bytes


def find_batch_size(trainer: Trainer, model: Any, data: Loader, memory: int | None = None) -> BatchSize:
    """The largest batch of the longest samples whose step stays within the memory: an optimized model's plan says it, a line through two
    measured steps does for others; then the step is run with it, and others are tried if it takes more, or much less.

    Raises:
        DataError: no memory is known, or not even two samples fit (or one, if a step of one can be run).
    """
    task = trainer._task(model)
    if memory is None:
        free = available_bytes(device_of(task.module))
        if free is None:
            raise DataError("The system does not tell how much memory is free.", where="tune", do="Give `memory` in bytes.")
        memory = int(SPARE * free)
    batch_of, most = _batches(data), min(LARGEST, len(data.dataset))
    tried = {number: step_bytes(trainer, model, batch_of(number)) for number in (2, 4)}  # 1 is a size of its own: batch norm refuses it
    planned = _planned(model, memory, batch_of(2)) if task.calls_module else None
    number, predicted = (min(planned[0], most), planned[1]) if planned is not None else _by_line(tried, memory, most)
    for _ in range(TRIALS):
        if number not in tried:
            tried[number] = step_bytes(trainer, model, batch_of(number))
        if tried[number] <= memory and (tried[number] > NEAR * memory or number == most or tried.get(number + 1, 0) > memory):
            break
        number, predicted = _by_line(tried, memory, most)
    fitting = max((number for number, needed in tried.items() if needed <= memory), default=None)
    if fitting is None:
        least = min(tried)
        raise DataError(f"A step of {least} samples takes {size(tried[least])}, {size(memory)} may be taken.", where="tune", do="Give more memory, or an optimized model with passes that save some.")
    return BatchSize(fitting, memory, predicted if fitting == number else tried[fitting], tried[fitting], tuple(tried.items()))


def _planned(model: Any, memory: int, batch: Batch) -> tuple[int, int] | None:
    """The samples and bytes that an optimized model's plan says; None if there is no plan (its captured graph fixes the size)."""
    if not callable(getattr(type(model), "largest_call", None)):
        return None
    try:
        number, plan, _ = model.largest_call(memory, inputs=_call(batch))
    except FxoptError as error:
        log.info("fxopt: no plan says the batch size, steps are measured instead: %s", error.what)
        return None
    return number, plan.peak.total


def _by_line(tried: Mapping[int, int], memory: int, most: int) -> tuple[int, int]:
    """The next size to try, on the line through the largest step that fits and the smallest that does not (or the last two of one kind);
    and the bytes that the line says."""
    fits = sorted(number for number, needed in tried.items() if needed <= memory)
    over = sorted(number for number, needed in tried.items() if needed > memory)
    a, b = (fits[-1], over[0]) if fits and over else fits[-2:] if fits else over[:2]
    first, slope = tried[a], max(1.0, (tried[b] - tried[a]) / (b - a))
    low, high = max(fits, default=0), min(over, default=most + 1)
    number = max(1, min(max(low + 1, min(high - 1, int(a + (memory - first) / slope))), most))
    return number, int(first + slope * (number - a))


def _call(batch: Batch) -> Any:
    return batch if isinstance(batch, Mapping) or isinstance(batch, tuple) else tuple(batch) if isinstance(batch, list) else (batch,)


def _batches(data: Loader) -> Callable[[int], Batch]:
    """From a number to a batch of the longest samples: those with most `input_ids`, where samples have them."""
    order: Sequence[int] = range(len(data.dataset))
    sample = data.dataset[0]
    if isinstance(sample, Mapping) and "input_ids" in sample:
        order = sorted(order, key=lambda i: -len(data.dataset[i]["input_ids"]))
    return lambda number: data.maker.collate([data.dataset[i] for i in order[:number]])


# -- workers ----------------------------------------------------------------------------------------------------------------


def measure_workers(data: Loader, *, most: int | None = None, batches: int = 32, seconds: float = 2.0) -> Workers:
    """The time of a batch with 0, 1, 2, 4, ... workers, each measured twice in turn, without the start of the processes.

    Args:
        most: None: as many as there are processors. batches, seconds: of one measurement, whichever is reached first.
    """
    limit = (os.cpu_count() or 1) if most is None else most
    numbers = [0, *(2**k for k in range(limit.bit_length()) if 2**k < limit), *([limit] if limit else [])]
    times: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(2):
        for number in numbers:
            times[number].append(_seconds(data, number, batches, seconds))
    noise = max(NOISE, *(abs(a - b) / max(min(a, b), 1e-9) for a, b in times.values()))
    least = {number: min(found) for number, found in times.items()}
    best = min(least.values())
    return Workers(next(number for number in numbers if least[number] <= best * (1 + noise)), least, noise)


def _seconds(data: Loader, workers: int, batches: int, seconds: float) -> float:
    made = data.on(data.sampler.rank, data.sampler.world)
    made.workers = workers
    stream = iter(made.batches(0, 0))
    next(stream, None)  # what starts the workers
    began, number = time.perf_counter(), 0
    for number, _ in enumerate(stream, 1):
        if number >= batches or time.perf_counter() - began > seconds:
            break
    took = time.perf_counter() - began
    if hasattr(stream, "close"):
        stream.close()
    return took / max(1, number)
