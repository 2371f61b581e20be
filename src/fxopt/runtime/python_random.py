"""Random numbers that Python code draws outside of torch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy


@contextlib.contextmanager
def kept_random() -> Iterator[Callable[[], bool]]:
    """Python's and NumPy's global generators are put back behind the block. Yields whether anything was drawn from them so far."""
    ours, theirs = random.getstate(), numpy.random.get_state(legacy=False)

    def drawn() -> bool:
        now = numpy.random.get_state(legacy=False)
        same = now["state"]["pos"] == theirs["state"]["pos"] and (now["state"]["key"] == theirs["state"]["key"]).all()
        return random.getstate() != ours or not same or now["has_gauss"] != theirs["has_gauss"]

    try:
        yield drawn
    finally:
        random.setstate(ours)
        numpy.random.set_state(theirs)
