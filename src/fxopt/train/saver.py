"""When a run is saved, where, and what is kept."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.errors import DataError
from fxopt.train import folder as folders
from fxopt.train.callbacks import Callback, State
from fxopt.train.run import Run
from fxopt.train.schedule import better
from fxopt.train.sharded import write_together
from fxopt.train.signals import Signals, Stopped
from fxopt.train.snapshot import Snapshot, capture, checkpoints, fill, fingerprint

log = logging.getLogger("fxopt")

UNITS = ("epoch", "step", "batch", "minute")


@dataclass(frozen=True)
class Checkpoints:
    """When to save, and what to keep.

    Attributes:
        every, unit: a checkpoint every so many "epoch", "step", "batch" (also in the middle of an accumulated step) or "minute". One is
            always written at the end, and when SIGTERM or SIGINT comes.
        keep: the newest so many stay; at least 2 are of use: the second is taken if the first is damaged.
        best: so many more stay, the best by `monitor`; one is written whenever it got better. mode: "min" or "max".
        background: tensors are copied, and written by a thread while the run goes on (one at a time).
    """

    every: int = 1
    unit: str = "epoch"
    keep: int = 2
    best: int = 0
    monitor: str = "val_loss"
    mode: str = "min"
    background: bool = False

    def __post_init__(self) -> None:
        if self.every < 1 or self.unit not in UNITS or self.keep < 1 or self.best < 0 or self.mode not in ("min", "max"):
            raise DataError(f"no way to save: {self}", do=f"every and keep are at least 1, best 0 or more, unit one of {', '.join(UNITS)}, mode min or max")


class Saver:
    """Writes the checkpoints of a run.

    Args:
        folder: they lie in it, one folder each. policy: when, and what is kept. settings: of the trainer, plain. signals: that ask for a
            last checkpoint. adapter: writes an adapter's files into a folder; None: there are none.
    """

    def __init__(self, folder: Path, policy: Checkpoints, settings: Mapping[str, Any], signals: Signals, adapter: Callable[[Path], None] | None = None) -> None:
        self.folder, self.policy, self.settings, self.signals, self.adapter = folder, policy, settings, signals, adapter
        self.frozen: str | None = None
        self.last: tuple[int, ...] | None = None
        self.last_good: Path | None = None
        self.epoch_due = False
        self.best_of: dict[str, float] = {}
        self.written: list[Path] = []
        self.began = time.monotonic()
        self.thread: threading.Thread | None = None
        self.failed: BaseException | None = None

    def fingerprint(self, run: Run) -> str:
        """Of the state that does not change; computed once."""
        if self.frozen is None:
            self.frozen = fingerprint(run)
        return self.frozen

    def see(self, row: Mapping[str, float]) -> None:
        """A row was logged: is it the best so far?"""
        if self.policy.best and self.policy.monitor in row:
            value = row[self.policy.monitor]
            known = self._ranked()
            if len(known) < self.policy.best or any(better(value, other, self.policy.mode) for other, _ in known[: self.policy.best]):
                self.best_of = {self.policy.monitor: value}

    def epoch_ended(self, epoch: int) -> None:
        """So many epochs are over."""
        self.epoch_due = self.policy.unit == "epoch" and epoch % self.policy.every == 0

    def between(self, run: Run) -> None:
        """Save if it is time; obey a signal.

        Raises:
            Stopped: SIGTERM or SIGINT came; the run is saved. DataError: a checkpoint could not be written.
        """
        if run.signal is not None:
            self.save(run, wait=True)
            raise Stopped(run.signal, str(self.last_good))
        if self._due(run.state):
            self.save(run)

    def asks(self) -> bool:
        """Whether a checkpoint is due by what rank 0 alone knows: the clock, or a value that is the best so far."""
        return bool(self.best_of) or self._late()

    def _late(self) -> bool:
        return self.policy.unit == "minute" and time.monotonic() - self.began >= 60 * self.policy.every

    def _due(self, state: State) -> bool:
        policy = self.policy
        if (self.best_of and state.world == 1 or state.save_now) and not state.micro:
            return True
        if policy.unit == "batch":
            return (state.batch + state.micro) % policy.every == 0 and bool(state.micro or state.batch)
        if state.micro:
            return False
        if policy.unit == "epoch":
            return self.epoch_due
        if policy.unit == "step":
            return bool(state.step) and state.step % policy.every == 0
        return state.world == 1 and self._late()

    def save(self, run: Run, wait: bool = False) -> None:
        """Write a checkpoint of the present position, unless it is there already.

        Args:
            wait: for it to be on disk.
        """
        state = run.state
        state.save_now = False
        position = state.step, state.epoch, state.micro
        if position != self.last:
            self.join(run)
            sharded = run.strategy.lockstep
            snapshot = capture(run, self.settings, self.fingerprint(run), copy=self.policy.background and not sharded)
            path = self.folder / name_of(*position)
            facts = {"step": state.step, "epoch": state.epoch, "world": state.world, "best_of": {name: value for name, value in self.best_of.items() if math.isfinite(value)}}
            self.last, self.epoch_due, self.best_of, self.began = position, False, {}, time.monotonic()
            if snapshot is not None and sharded:
                self._write_together(run, snapshot, path, facts)
            elif snapshot is not None and self.policy.background:
                self.thread = threading.Thread(target=self._quietly, args=(snapshot, path, facts), name="fxopt checkpoint")
                self.thread.start()
            elif snapshot is not None:
                self._write(snapshot, path, facts)
            else:
                self.last_good = path  # rank 0 writes it
        if wait or not self.policy.background:
            self.join(run)
        if wait:
            run.strategy.barrier()  # no rank ends before it is on disk

    def _quietly(self, snapshot: Snapshot, path: Path, facts: Mapping[str, Any]) -> None:
        try:
            self._write(snapshot, path, facts)
        except (DataError, OSError) as error:
            self.failed = error

    def join(self, run: Run) -> None:
        """Wait for the thread that writes, if there is one, and tell of what was written.

        Raises:
            DataError: its checkpoint could not be written.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failed is not None:
            failed, self.failed = self.failed, None
            raise failed
        written, self.written = self.written, []
        for path in written:
            run.events(Callback.on_saved, run.state, path)
            run.journal.artifact(path)

    def settle(self, error: BaseException) -> None:
        """The run ends with an error: let a checkpoint that is being written become whole. Its own failure is a note to the error."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failed is not None and self.failed is not error:
            error.add_note(f"A checkpoint failed too: {self.failed}")
        self.failed = None

    def _write(self, snapshot: Snapshot, path: Path, facts: Mapping[str, Any]) -> None:
        folders.write(path, lambda writer: fill(snapshot, writer, self.adapter), facts, self.last_good)
        self.last_good = path
        self.written.append(path)
        self._prune()

    def _write_together(self, run: Run, snapshot: Snapshot, path: Path, facts: Mapping[str, Any]) -> None:
        # not in the background, where other threads would exchange in between; and without an adapter's files, whose weights are in pieces
        write_together(run.strategy, path, lambda writer: fill(snapshot, writer), snapshot.pieces, facts, self.last_good)
        self.last_good = path
        if not run.state.rank:
            self.written.append(path)
            self._prune()

    def _prune(self) -> None:
        paths = checkpoints(self.folder)
        keep = set(paths[-self.policy.keep :]) | {path for _, path in self._ranked()[: self.policy.best]}
        for path in paths:
            if path not in keep:
                folders.discard(path)

    def _ranked(self) -> list[tuple[float, Path]]:
        """(value, checkpoint), the best first; of equal ones the newest."""
        found = []
        for path in checkpoints(self.folder):
            try:
                value = folders.manifest(path)["best_of"].get(self.policy.monitor)
            except DataError:
                continue  # a damaged one is named when it is read
            if isinstance(value, (int, float)):
                found.append((float(value), path))
        return sorted(reversed(found), key=lambda pair: pair[0] if self.policy.mode == "min" else -pair[0])

    def best(self) -> Path | None:
        """The best checkpoint by the monitored value."""
        ranked = self._ranked()
        return ranked[0][1] if ranked else None


def name_of(step: int, epoch: int, micro: int) -> str:
    """A checkpoint's folder; names sort as positions do."""
    return f"step-{step:08d}-epoch-{epoch:04d}" + (f"-batch-{micro:03d}" if micro else "")
