"""The fastest choice of what each region saves, within a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LABELS = 1000  # partial choices kept per region; below it the search is exact


@dataclass(frozen=True)
class Option:
    """One way to run a region.

    Attributes:
        saved: bytes kept from its forward to its backward.
        forward, backward: bytes needed inside it at most, beyond what is kept of the regions before it and itself (backward) or
            of those before it (forward).
        seconds: that it takes, forward and backward.
    """

    saved: int
    forward: int
    backward: int
    seconds: float


def solve(options: Sequence[Sequence[Option]], budget: int, behind: Sequence[int] | None = None) -> tuple[int, ...] | None:
    """For each region the index of its option, so that the sum of the times is least and no moment needs more than the budget; None if
    there is no such choice.

    Dynamic programming over the regions in the order of the forward. A partial choice is (bytes saved so far, seconds so far); of
    two, one that is worse in both is dropped (Pareto). Equal regions merge their sums, so that a stack of equal layers has few
    partial choices. With more than LABELS of them they are thinned evenly by bytes: a good choice then, not proven the best.

    Args:
        options: for each region.
        budget: bytes, without what is there during the whole step.
        behind: for each region, bytes that exist in its backward and come from the backward of later regions (gradients).
    """
    history: list[dict[int, tuple[float, int, int]]] = []
    if not _fits(options, budget, behind):
        return None
    front: dict[int, float] = {0: 0.0}
    for at, choices in enumerate(options):
        late = behind[at] if behind is not None else 0
        found: dict[int, tuple[float, int, int]] = {}  # bytes -> (seconds, bytes before, choice)
        for saved, seconds in front.items():
            for index, option in enumerate(choices):
                total = saved + option.saved
                if saved + option.forward > budget or total + option.backward + late > budget:
                    continue
                spent = seconds + option.seconds
                if total not in found or spent < found[total][0]:
                    found[total] = spent, saved, index
        if not found:
            return None
        kept: dict[int, tuple[float, int, int]] = {}
        best = float("inf")
        for total in sorted(found):
            if found[total][0] < best:
                best = found[total][0]
                kept[total] = found[total]
        if len(kept) > LABELS:
            totals = list(kept)
            chosen = {totals[round(i * (len(totals) - 1) / (LABELS - 1))] for i in range(LABELS)}
            kept = {total: kept[total] for total in totals if total in chosen}
        history.append(kept)
        front = {total: entry[0] for total, entry in kept.items()}
    total = min(front, key=front.__getitem__)
    picked: list[int] = []
    for kept in reversed(history):
        _, before, index = kept[total]
        picked.append(index)
        total = before
    return tuple(reversed(picked))


def smallest(options: Sequence[Sequence[Option]], behind: Sequence[int] | None = None) -> int:
    """The smallest budget for which there is a choice, in bytes.

    A smaller sum of savings is never worse for the regions that follow, so whether a budget suffices is seen by taking in each region
    the option that fits and saves least.
    """
    low, high = -1, sum(max(o.saved for o in choices) for choices in options)
    high += max((max(o.forward, o.backward) for choices in options for o in choices), default=0) + max(behind or (0,))
    while high - low > 1:
        middle = (low + high) // 2
        if _fits(options, middle, behind):
            high = middle
        else:
            low = middle
    return high


def _fits(options: Sequence[Sequence[Option]], budget: int, behind: Sequence[int] | None) -> bool:
    saved = 0
    for at, choices in enumerate(options):
        late = behind[at] if behind is not None else 0
        fitting = [o.saved for o in choices if saved + o.forward <= budget and saved + o.saved + o.backward + late <= budget]
        if not fitting:
            return False
        saved += min(fitting)
    return True
