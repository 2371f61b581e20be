"""One steady line on a terminal, a plain line now and then elsewhere; always on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fxopt.runtime.memory import peak_bytes, resident_bytes
from fxopt.runtime.plan import size
from fxopt.train.callbacks import Callback, State
from fxopt.train.saver import Checkpoints
from fxopt.train.task import device_of
from fxopt.train.utilization import Work, elements, measured_bytes, work

RECENT = 8
"""Steps that rates are of."""
ASKED = 10.0
"""Seconds of a run before the plan is asked for its FLOPs: that may take a second, which short runs are spared."""


class Progress(Callback):
    """Shows step, loss, what a module logged with `prog_bar`, real tokens per second, how much of the machine that is (MFU where the model has a
    plan, else GB/s; see `Work`), peak memory, and the time to the end and to the next checkpoint. When the plan is asked, its peak is said
    beside the measured one, once.

    Args:
        seconds: time between two plain lines, when stderr is no terminal or NO_COLOR is set.
        name: what the line begins with. shown: False on the ranks that say nothing. saves: when checkpoints are written.
    """

    def __init__(self, seconds: float = 10.0, name: str = "", shown: bool = True, saves: Checkpoints | None = None) -> None:
        self.seconds, self.name, self.shown, self.saves = seconds, name, shown, saves
        self.console = Console(stderr=True)
        self.live: Live | None = None
        self.work: Work | None = None
        self.elements: deque[int] = deque([0], maxlen=RECENT)
        self.batch: Any = None

    def on_fit_start(self, state: State) -> None:
        now = time.monotonic()
        self.began, self.saved, self.next_line, self.work = now, now, now + self.seconds, None
        self.resident, self.at = resident_bytes(), (state.step, state.batch)
        if self.shown and self.console.is_terminal and not os.environ.get("NO_COLOR"):
            self.live = Live(Text("starting …"), console=self.console, auto_refresh=False)
            self.live.start()

    def on_epoch_start(self, state: State) -> None:
        self.at = state.step, 0

    def on_step_start(self, state: State) -> None:
        self.elements.append(0)

    def on_batch_start(self, state: State, batch: Any, index: int) -> None:
        self.elements[-1] += elements(batch)
        self.batch = batch

    def on_saved(self, state: State, path: Path) -> None:
        self.saved = time.monotonic()

    def on_step_end(self, state: State) -> None:
        if not self.shown:
            return
        if self.work is None and time.monotonic() - self.began > ASKED:
            self._ask(state)
        if self.live is not None:
            self.live.update(Text(self.line(state)), refresh=True)
        elif time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + self.seconds
            print(self.line(state), file=sys.stderr, flush=True)

    def on_fit_end(self, state: State) -> None:
        self._close()
        if self.shown and self.live is None and state.history:
            print(self.line(state), file=sys.stderr, flush=True)

    def on_exception(self, state: State, error: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.live is not None:
            self.live.stop()

    def _ask(self, state: State) -> None:
        self.work = work(state.model, state.optimizers, self.batch)
        device = device_of(state.model)
        measured = measured_bytes(device, self.resident, sum(t.nbytes for t in (*state.model.parameters(), *state.model.buffers())))
        if self.work.predicted is not None and measured is not None:
            self.console.print(f"memory: predicted {size(self.work.predicted)}, measured {size(measured)}{self._beside(device)}", highlight=False)

    @staticmethod
    def _beside(device: torch.device) -> str:
        """What a process holds and a plan does not count: on a CPU freed buffers below 32 MiB, which glibc keeps."""
        return "" if device.type == "cuda" else " (of the process, with freed memory that the C library keeps)"

    def line(self, state: State) -> str:
        """The progress line of a state with at least one finished step."""
        last, recent = state.history[-1], state.history[-RECENT:]
        seconds = max(sum(step.seconds for step in recent), 1e-9)
        tokens, each = sum(step.tokens for step in recent), seconds / len(recent)
        save = self._save_in(state, each)
        parts = [
            f"step {state.step}/{state.steps}",
            f"loss {last.loss:.4f}",
            *(f"{name} {state.metrics[name]:.4g}" for name in sorted(state.shown) if name in state.metrics),
            *([f"{tokens / seconds:,.0f} tokens/s"] if tokens else [f"{len(recent) / seconds:,.1f} steps/s"]),
            *([self.work.says(sum(list(self.elements)[-len(recent):]), len(recent), seconds)] if self.work is not None else []),
            f"peak {peak_bytes(device_of(state.model)) / 2**30:.2f} GiB",
            f"{clock(each * (state.steps - state.step))} left",
            *([f"save in {clock(save)}"] if save is not None else []),
        ]
        return " · ".join([self.name] * bool(self.name) + parts)

    def _save_in(self, state: State, each: float) -> float | None:
        """Seconds to the next checkpoint that is due by itself, as far as that can be known."""
        if self.saves is None:
            return None
        every = self.saves.every
        if self.saves.unit == "minute":
            return max(0.0, 60 * every - (time.monotonic() - self.saved))
        if self.saves.unit == "step":
            return each * min(every - state.step % every, state.steps - state.step)
        if state.batches is None or not state.batch:
            return None
        batches = every - state.batch % every if self.saves.unit == "batch" else state.batches - state.batch + (every - 1 - state.epoch % every) * state.batches
        step, batch = self.at
        return each * batches * (state.step - step) / max(1, state.batch - batch)


def clock(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
