"""SIGTERM and SIGINT during a run: noted, and obeyed where a checkpoint can be written."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Stopped(SystemExit):
    """The run was told to stop by a signal, and was saved. Its code is the shell's: 143 for SIGTERM, 130 for SIGINT.

    Args:
        number: of the signal. saved: where the run was saved.
    """

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(128 + number)
        self.number, self.saved = number, saved

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}; saved in {self.saved}"


class Signals:
    """Inside, the first SIGTERM or SIGINT is noted in `pending`; a second one of the same kind does what it would have done before.

    Only in the main thread of Python, where handlers can be set; elsewhere nothing is noted.
    """

    kinds = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.pending: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for kind in self.kinds:
                self._before[kind] = signal.signal(kind, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for kind, handler in self._before.items():
            if signal.getsignal(kind) == self._note:
                signal.signal(kind, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending = number
        signal.signal(number, self._before[number])
