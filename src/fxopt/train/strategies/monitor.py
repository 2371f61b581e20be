"""Watches over the processes of a run: one that fails or falls silent is named on all others, in bounded time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fxopt.errors import ProcessError

INTERVAL = 1.0
"""Seconds between two signs of life."""
_PATIENCE = 3.5
"""Seconds in which a lost connection is explained: a process that is alive gives three signs of life meanwhile."""
_FAILED, _DONE, _TOLD = "failed", "done", "told"


class Monitor:
    """A thread that gives signs of life into the run's store, and reads there whether a rank has failed.

    Args:
        store: shared by all ranks: what torch's `PrefixStore` has. rank, world: this process and how many there are.
        silence: seconds without a sign of life after which a rank counts as lost (its machine is gone, or it is stopped).
        abort: called in the thread, once, when another rank has failed: frees a main thread that waits for a device.
    """

    def __init__(self, store: Any, rank: int, world: int, silence: float, abort: Callable[[], None]) -> None:
        self.store, self.rank, self.world, self.silence, self.abort = store, rank, world, silence, abort
        self.failure: str | None = None
        """What happened to another rank; None as long as nothing is known of a failure."""
        self._ended = threading.Event()
        self._reported = False
        store.set(self._beat(rank), "0")
        self._thread = threading.Thread(target=self._watch, name="fxopt monitor", daemon=True)
        self._thread.start()

    def _beat(self, rank: int) -> str:
        return f"beat/{rank}"

    def _watch(self) -> None:
        # A connection of its own: that of the main thread is taken while it waits.
        store, beats, heard = self.store.clone(), 0, time.monotonic()
        neighbour, before = self._beat((self.rank + 1) % self.world), b""
        while not self._ended.wait(INTERVAL):
            beats += 1
            try:
                store.set(self._beat(self.rank), str(beats))
                if store.check([_FAILED]):
                    self._found(store.get(_FAILED).decode())
                    store.add(_TOLD, 1)
                    return
                # Each rank listens to one other: n reads an interval, not n * n.
                now = store.get(neighbour) if store.check([neighbour]) else b""
                if now != before or now == _DONE.encode():
                    before, heard = now, time.monotonic()
                elif time.monotonic() - heard > self.silence:
                    self._tell(store, f"{(self.rank + 1) % self.world}:has given no sign of life for {self.silence:.0f} s (its machine is gone, or the process is stopped)")
            except RuntimeError:
                self._found("0:was lost, and with it the store through which the processes met")
                return

    def _found(self, text: str) -> None:
        rank, _, what = text.partition(":")
        if int(rank) != self.rank and self.failure is None and not self._ended.is_set():
            self.failure = f"Rank {rank} {what}"
            self.abort()

    def _tell(self, store: Any, text: str) -> None:
        store.compare_set(_FAILED, "", text)  # the first that is told stays: what follows from it is no cause

    def report(self, error: BaseException) -> None:
        """This rank fails with an error of its own: the others read it within `INTERVAL`."""
        if self.failure is None:
            lines = str(error).splitlines()
            try:
                self._reported = True
                self._tell(self.store, f"{self.rank}:failed with {type(error).__name__}{f': {lines[0]}' if lines else ''}")
            except RuntimeError:
                return  # the store is gone with rank 0, which the others see themselves

    def explain(self, error: BaseException) -> ProcessError:
        """An exchange broke: says which rank is to blame. Takes up to `_PATIENCE` seconds, for what a killed process no longer says."""
        limit, others = time.monotonic() + _PATIENCE, [rank for rank in range(self.world) if rank != self.rank]
        store = self.store
        try:
            before = self._beats(store, others)
            while self.failure is None and time.monotonic() < limit and not store.check([_FAILED]):
                time.sleep(0.05)
            if self.failure is None and not store.check([_FAILED]):
                silent = [rank for rank, old, new in zip(others, before, self._beats(store, others), strict=True) if old == new]
                if silent:
                    self._tell(store, f"{silent[0]}:was lost: its process has ended without a word (killed, out of memory, or its machine is gone)")
            if self.failure is None and store.check([_FAILED]):
                self._found(store.get(_FAILED).decode())
        except RuntimeError:
            self._found("0:was lost, and with it the store through which the processes met")
        return self.error() or ProcessError(f"The exchange between the processes failed: {str(error).splitlines()[0]}", where=f"rank {self.rank} of {self.world}",
                                            do="All processes are alive: look at the network between them.")

    def _beats(self, store: Any, ranks: Sequence[int]) -> list[bytes]:
        """The last signs of life; of a rank that has given none, nothing (reading a key that is not there would wait for it)."""
        return [store.get(self._beat(rank)) if store.check([self._beat(rank)]) else b"" for rank in ranks]

    def error(self) -> ProcessError | None:
        """What must be raised because another rank has failed; None if none has."""
        if self.failure is None:
            return None
        return ProcessError(f"{self.failure}.", where=f"rank {self.rank} of {self.world}, which stops because of it", do="See that rank's own messages; the run goes on from its last checkpoint with resume=True.")

    def close(self) -> None:
        """The run is over for this rank: its silence means nothing any more. Rank 0, which may hold the store, waits two intervals
        until all have read how it failed."""
        if self._ended.is_set():
            return
        self._ended.set()
        try:
            self.store.set(self._beat(self.rank), _DONE)
            limit = time.monotonic() + 2 * INTERVAL
            while self._reported and not self.rank and time.monotonic() < limit and self.store.add(_TOLD, 0) < self.world - 1:
                time.sleep(0.05)
        except RuntimeError:
            return  # the store has gone with rank 0, which was done before
