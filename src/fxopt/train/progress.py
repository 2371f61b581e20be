"""One steady line on a terminal, a plain line now and then elsewhere; always on stderr."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fxopt.train.callbacks import Callback, State
from fxopt.runtime.memory import peak_bytes


class Progress(Callback):
    """Shows step, loss, real tokens per second, peak memory and the time to go.

    Args:
        seconds: time between two plain lines, when stderr is no terminal or NO_COLOR is set.
        name: what the line begins with. shown: False on the ranks that say nothing.
    """

    def __init__(self, seconds: float = 10.0, name: str = "", shown: bool = True) -> None:
        self.seconds = seconds
        self.name = name
        self.shown = shown
        self.console = Console(stderr=True)
        self.live: Live | None = None
        self.next_line = 0.0

    def on_fit_start(self, state: State) -> None:
        self.next_line = time.monotonic() + self.seconds
        if self.shown and self.console.is_terminal and not os.environ.get("NO_COLOR"):
            self.live = Live(Text("starting …"), console=self.console, auto_refresh=False)
            self.live.start()

    def on_step_end(self, state: State) -> None:
        if self.live is not None:
            self.live.update(Text(line(state, self.name)), refresh=True)
        elif self.shown and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + self.seconds
            print(line(state, self.name), file=sys.stderr, flush=True)

    def on_fit_end(self, state: State) -> None:
        self._close()
        if self.shown and self.live is None and state.history:
            print(line(state, self.name), file=sys.stderr, flush=True)

    def on_exception(self, state: State, error: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.live is not None:
            self.live.stop()


def line(state: State, name: str = "") -> str:
    """The progress line of a state with at least one finished step."""
    last = state.history[-1]
    recent = state.history[-8:]
    seconds = sum(step.seconds for step in recent)
    device = next(state.model.parameters()).device
    parts = [
        f"step {state.step}/{state.steps}",
        f"loss {last.loss:.4f}",
        f"{sum(step.tokens for step in recent) / seconds:,.0f} tokens/s",
        f"peak {peak_bytes(device) / 2**30:.2f} GiB",
        f"{_clock(seconds / len(recent) * (state.steps - state.step))} left",
    ]
    return " · ".join([name] * bool(name) + parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
