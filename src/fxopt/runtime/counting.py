"""How many items the loss of a batch is the mean of: told by the user, read from the graph, or counted from the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
import math
from typing import Any

import torch
from torch import nn

from fxopt.errors import CallError, DataError
from fxopt.ir.capture import Call
from fxopt.ir.denominator import Denominator, Underivable, derive
from fxopt.ir.program import Program
from fxopt.runtime.binding import live_state
from fxopt.torch_private import pytree

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Items:
    """What the loss of one batch is divided by.

    Attributes:
        number: it, or 0 for a batch without a supervised item.
        counts, by: the sums over the samples that it is made of, and how; None where it was told or counted from labels.
        state: what `by` reads of the model.
    """

    number: float
    counts: tuple[float, ...] = ()
    by: Denominator | None = None
    state: Mapping[str, torch.Tensor] | None = None


def labelled(batch: Any) -> bool:
    """Whether a batch has `labels`."""
    return isinstance(batch, Mapping) and batch.get("labels") is not None


def samples(batch: Any) -> int:
    """How many samples a batch holds: the first size of its first tensor; 1 where there is none."""
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], torch.Tensor) and batch[0].dim():
        return batch[0].shape[0]
    if is_dataclass(batch) and not isinstance(batch, type):
        batch = list(vars(batch).values())
    first = next((leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
    return 1 if first is None else first.shape[0]


def supervised_items(batch: Any) -> int:
    """How many items the loss of `batch` is the mean of; 1 for a batch without `labels`.

    Labels [batch, seq] are those of a causal language model, which predicts each token from the ones before it, so
    the first column is not counted. Labels [batch] are counted whole. -100 is not counted.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is None:
        return 1
    return int((labels[:, 1:] if labels.dim() == 2 else labels).ne(IGNORED_LABEL).sum())


class Counter:
    """Counts the items of batches.

    Args:
        model: what is trained. The graph is asked if it is an Optimized: a module with `prepare`, which gives a batch's Program.
        count: the user's function; None asks the graph, or for a plain module the labels, or (without any) the number of samples.
        graph: whether the loss is one that the graph returns.
        needed: whether several batches make a step, so that their share in it must be known.
    """

    def __init__(self, model: nn.Module, count: Callable[[Any], int] | None, *, graph: bool, needed: bool) -> None:
        self.model, self.count, self.graph, self.needed = model, count, graph, needed
        self.optimized = callable(getattr(type(model), "prepare", None))
        self.known: dict[int, tuple[Program, Denominator | Underivable, list[str]]] = {}

    def __call__(self, batch: Any) -> Items:
        """The items of a batch, which is on the model's device.

        Raises:
            DataError: they must be known and are not.
        """
        if self.count is not None:
            return Items(self.count(batch))
        if not self.optimized:
            return Items(supervised_items(batch) if labelled(batch) else samples(batch))
        found = self._derived(batch)
        if isinstance(found, Items):
            return found
        if self.needed:
            raise DataError(f"How many items the loss of a batch is the mean of is not known: {found.reason}.", where=found.where or "fit",
                            do="Give fit `count`, a function from a batch to that number (`fxopt.runtime.counting.supervised_items` counts labels), or `accumulate=1`.")
        return Items(supervised_items(batch))

    def _derived(self, batch: Any) -> Items | Underivable:
        if not self.graph:
            return Underivable("the loss is a function of its own, outside of the graph")
        program = self.model.prepare(batch)  # type: ignore[operator]
        if program is None:
            return Underivable("the model runs in parts, and no graph holds its loss")
        if id(program) not in self.known:
            facts = [fact for fact in program.facts if isinstance(fact, Denominator)]
            by = facts[0] if facts else derive(program)
            self.known[id(program)] = program, by, [] if isinstance(by, Underivable) else sorted(by.names())
        _, by, names = self.known[id(program)]
        if isinstance(by, Underivable):
            return by
        call = Call.of((), dict(batch)) if isinstance(batch, Mapping) else Call.of(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})
        state = live_state(self.model, names)
        try:
            counts = tuple(by.measure(call.tensors, state))
        except CallError as error:
            return Underivable(error.what, error.where or "")
        number = by.divisor(counts, state)
        if number == 0 and any(counts[: len(counts) - len(by.sizes)]):  # its sum need not be 0, and is part of the whole's
            return Underivable(f"its loss is divided by {by.text}, which is 0 for a batch whose counts are not all 0")
        return Items(number, counts, by, state)


def shares(group: Sequence[Items]) -> tuple[list[float], float]:
    """Each batch's share in the loss of all of them as one batch, and what that is divided by.

    Raises:
        DataError: the batches' losses are divided by numbers that are made in different ways.
    """
    first = group[0]
    if first.by is None or len(group) == 1:
        total = sum(items.number for items in group)
    else:
        if any(items.by is None or items.by.formula != first.by.formula for items in group):
            raise DataError("The losses of the batches of one step are means over items that are counted in different ways.", where="fit",
                            do="Give fit `count`, a function from a batch to the number that its loss is the mean of.")
        total = first.by.divisor([math.fsum(counts) if isinstance(counts[0], float) else sum(counts) for counts in zip(*(i.counts for i in group))], first.state or {})
    return [items.number / total for items in group], total
