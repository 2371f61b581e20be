"""The batches of one optimizer step, over all ranks, and each one's share in its loss."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fxopt.errors import DataError
from fxopt.runtime.counting import Items, shares
from fxopt.runtime.scaler import Scaler
from fxopt.train.batch import Batch, to_device
from fxopt.train.randomness import isolated
from fxopt.train.task import changing_buffers

if TYPE_CHECKING:
    from fxopt.train.run import Run


@dataclass
class Group:
    """The batches of one optimizer step, with each one's share in its loss."""

    batches: list[Batch]
    """As many on all ranks: None where another rank has one and this does not."""
    weights: list[float]
    items: float
    """What the loss of the step is the mean of; of several ranks, the sum over them."""
    used: int
    """Batches taken from the data: those left out too."""
    left_out: int
    """Those that supervise nothing, on all ranks."""
    started: float
    """When the first was asked for, in seconds."""
    moved: bool
    """They lie on the model's device."""


def read(run: Run, batches: Iterator[Batch], size: int) -> Group | None:
    """The next step's batches; those that supervise nothing are left out. None: the data is at its end.

    One rank reads on until it has `size` batches. Several take `size` turns each, whatever is in them, so that all stand at the same
    place in the data after each step.

    Raises:
        DataError: ranks have unequal numbers of turns, or count the items of their batches in different ways.
    """
    started = time.perf_counter()
    held = size == 1 or run.device.type == "cpu"  # batches that wait for their turn wait where they were made
    if run.state.world == 1:
        kept, items, used, left_out = _taken(run, batches, held, size)
        if not kept:
            run.state.batch, run.state.skipped = run.state.batch + used, run.state.skipped + left_out
            return None
        weights, total = shares(items)
        return Group(kept, weights, total, used, left_out, started, held)
    while True:
        kept, items, used, left_out = _taken(run, itertools.islice(batches, size), held, None)
        facts = run.strategy.share(_facts(run, kept, items, used, left_out))
        if len({fact["used"] for fact in facts}) > 1:
            raise DataError(f"The ranks have unequal numbers of batches: {', '.join(str(fact['used']) for fact in facts)} turns for the step after {run.state.step}.", where="the data",
                            do="Give all ranks the same data: it is dealt out by the trainer.")
        left_out = sum(fact["left_out"] for fact in facts)
        turns = max(fact["kept"] for fact in facts)
        if turns:
            break
        run.state.batch, run.state.skipped = run.state.batch + used, run.state.skipped + left_out
        if used < size:  # at the end of the data; otherwise nothing in these turns supervises: read on
            return None
    if run.scaler is None and (scale := next((fact["scale"] for fact in facts if fact["scale"] is not None), None)) is not None:
        run.scaler = Scaler()  # the first program was another rank's
        run.scaler.state.scale = scale
    _spare(run, kept, facts)
    whole = _divisor(items, facts)
    first = next(rank for rank, fact in enumerate(facts) if fact["kept"])
    missing = turns - len(kept)
    return Group([*kept, *[None] * missing], [each.number / whole for each in items] + [0.0] * missing, whole if run.state.rank == first else 0.0, used, left_out, started, held)


def _taken(run: Run, batches: Iterator[Batch], held: bool, size: int | None) -> tuple[list[Batch], list[Items], int, int]:
    """Batches that supervise something, at most `size`; what each loss is the mean of; how many were taken, and how many left out."""
    kept: list[Batch] = []
    items: list[Items] = []
    used = left_out = 0
    for batch in batches:
        used += 1
        if batch is None:
            continue
        moved = to_device(batch, run.device)
        if run.graph_scaler:
            run.scaler_of(moved)
        found = run.task.items(run.counter, moved)
        run.note_graph()
        if found.number:
            kept.append(moved if held else batch)
            items.append(found)
        else:
            left_out += 1
        if len(kept) == size:
            break
    return kept, items, used, left_out


def _facts(run: Run, kept: Sequence[Batch], items: Sequence[Items], used: int, left_out: int) -> dict[str, Any]:
    """What the other ranks must know of this one's turns."""
    formulas = {each.by.formula if each.by is not None else None for each in items}
    return {"used": used, "kept": len(kept), "left_out": left_out, "number": math.fsum(each.number for each in items), "formulas": sorted(map(str, formulas)),
            "counts": [math.fsum(counts) if isinstance(counts[0], float) else sum(counts) for counts in zip(*(each.counts for each in items))],
            "scale": None if run.scaler is None else run.scaler.state.scale, "spare": run.spare is not None}


def _divisor(items: Sequence[Items], facts: Sequence[dict[str, Any]]) -> float:
    """What the loss of all ranks' batches as one is divided by; on a rank without a batch, which has no use for it, 1."""
    if len({formula for fact in facts for formula in fact["formulas"]}) > 1:
        raise DataError("The losses of the batches of one step are means over items that are counted in different ways.", where="fit",
                        do="Give fit `count`, a function from a batch to the number that its loss is the mean of.")
    if not items:
        return 1.0
    if items[0].by is None or sum(fact["kept"] for fact in facts) == 1:
        return math.fsum(fact["number"] for fact in facts)
    return items[0].by.divisor([math.fsum(counts) if isinstance(counts[0], float) else sum(counts) for counts in zip(*(fact["counts"] for fact in facts if fact["kept"]))],
                               items[0].state or {})


def _spare(run: Run, kept: Sequence[Batch], facts: Sequence[dict[str, Any]]) -> None:
    """Keep a batch for turns without one, if the strategy needs that; a rank that never had one gets another's."""
    if not run.strategy.lockstep:
        return
    if run.spare is None and kept:
        run.spare = kept[0]
    if not all(fact["spare"] or fact["kept"] for fact in facts):
        given = run.strategy.share(run.spare)
        run.spare = next(batch for batch in given if batch is not None) if run.spare is None else run.spare


def stand_in(run: Run, last: bool) -> None:
    """A turn of this rank without a batch. Where a forward needs all ranks, a spare batch runs with weight 0."""
    run.losses.append(0.0)
    if not run.strategy.lockstep:
        return
    with isolated(), _untouched(run.task.module):
        with run.strategy.no_sync(run.model, last), run.autocast():
            loss = run.task.loss(run.model, to_device(run.spare, run.device), 0)
        if loss is not None:
            run.strategy.backward(run.model, loss * 0.0, last)


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Inside, the module has copies of the buffers that a forward may change (running means): which batch is spare leaves no trace."""
    changing = {id(buffer): buffer.clone() for buffer in changing_buffers(module).values()}
    places = [(part._buffers, name, buffer) for part in module.modules() for name, buffer in part._buffers.items() if id(buffer) in changing]
    for store, name, buffer in places:
        store[name] = changing[id(buffer)]
    try:
        yield
    finally:
        for store, name, buffer in places:
            store[name] = buffer
