"""Where the time of a run goes: data, forward, backward, optimizer, each callback's events, checkpoints, the log.

The parts of a run are wrapped when it begins; a run that is not asked for this has nothing of it.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt.runtime.files import replace_file
from fxopt.train.callbacks import Callback, State
from fxopt.train.run import Run

FILE = "profile.json"


@dataclass
class Times:
    """Seconds by what they were spent on, each without what was called from within; `print` it.

    Attributes:
        spent: name to (calls, seconds). whole: seconds from the first batch to the end of the run; what no name has is the loop itself.
    """

    spent: dict[str, tuple[int, float]] = field(default_factory=dict)
    whole: float = 0.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    inner: list[float] = field(default_factory=lambda: [0.0])

    def rows(self) -> list[tuple[str, int, float]]:
        """(name, calls, seconds), the longest first, with the rest as "loop"."""
        rest = self.whole - sum(seconds for _, seconds in self.spent.values())
        return sorted([(name, calls, seconds) for name, (calls, seconds) in self.spent.items()] + [("loop", 1, rest)], key=lambda row: -row[2])

    def __str__(self) -> str:
        lines = [f"{seconds:10.4f} s  {seconds / (self.whole or 1) * 100:5.1f} %  {f'x{calls}':>8}  {name}" for name, calls, seconds in self.rows()]
        return "\n".join([*lines, f"{self.whole:10.4f} s  in all"])

    def json(self) -> str:
        """As data. Units: seconds."""
        return json.dumps({"seconds": self.whole, "rows": [{"name": name, "calls": calls, "seconds": seconds} for name, calls, seconds in self.rows()]}, indent=1)

    def timed(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, whose time counts under a name. On a device it waits for what was begun."""

        @functools.wraps(run)
        def called(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            self.inner.append(0.0)
            try:
                return run(*args, **kwargs)
            finally:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                took = time.perf_counter() - began
                calls, seconds = self.spent.get(name, (0, 0.0))
                self.spent[name] = calls + 1, seconds + took - self.inner.pop()
                self.inner[-1] += took

        return called


class _Timed:
    """An object some of whose methods are timed."""

    def __init__(self, inner: Any, times: Times, names: Mapping[str, str]) -> None:
        self.__dict__.update(_inner=inner, **{method: times.timed(name, getattr(inner, method)) for method, name in names.items() if hasattr(inner, method)})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)


class _TimedData(_Timed):
    def batches(self, epoch: int, cursor: int) -> Iterator[Any]:
        source = self._inner.batches(epoch, cursor)
        end = object()
        following = self._times.timed("data", lambda: next(source, end))
        while (batch := following()) is not end:
            yield batch


class _Whole(Callback):
    """Times the whole, and writes what was found."""

    def __init__(self, times: Times) -> None:
        self.times = times

    def on_fit_start(self, state: State) -> None:
        self.times.began = time.perf_counter()  # type: ignore[attr-defined]

    def on_fit_end(self, state: State) -> None:
        self.times.whole = time.perf_counter() - self.times.began  # type: ignore[attr-defined]
        if state.folder is not None and not state.rank:
            replace_file(state.folder / FILE, self.times.json().encode())


def timed(run: Run) -> Times:
    """Wrap the parts of a run that has not begun; gives the times, which are whole when it ends."""
    times = Times(device=run.device)
    for event, calls in run.events.wanted.items():
        run.events.wanted[event] = [times.timed(f"{type(getattr(call, '__self__', call)).__name__}.{event}", call) for call in calls]
    whole = _Whole(times)
    run.events.wanted["on_fit_start"].append(whole.on_fit_start)
    run.events.wanted["on_fit_end"].append(whole.on_fit_end)
    run.task = _Timed(run.task, times, {"loss": "forward", "evaluate": "forward of evaluations", "items": "counting items", "zero_grad": "zero_grad", "step": "optimizer", "clip": "clipping"})  # type: ignore[assignment]
    run.strategy = _Timed(run.strategy, times, {"backward": "backward", "clip_norm": "clipping", "reduce": "exchange", "share": "exchange", "synchronize": "exchange", "barrier": "exchange"})  # type: ignore[assignment]
    data = _TimedData(run.data, times, {})
    data.__dict__["_times"] = times
    run.data = data  # type: ignore[assignment]
    run.journal = _Timed(run.journal, times, {"row": "log"})  # type: ignore[assignment]
    if run.saver is not None:
        run.saver = _Timed(run.saver, times, {"save": "checkpoints", "between": "checkpoints"})  # type: ignore[assignment]
    return times
