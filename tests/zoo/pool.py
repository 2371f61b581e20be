"""Examines entries in processes of their own: a crash or an endless loop costs one entry."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.zoo.entry import Entry
from tests.zoo.examine import Result, examine

Work = Callable[[Entry], Result]


def _child(pipe: Connection, work: Work, entry: Entry) -> None:
    try:
        pipe.send(dataclasses.asdict(work(entry)))
    except BaseException:  # noqa: BLE001  whatever it is, it is this entry's result
        pipe.send(traceback.format_exc())
    pipe.close()


def run(entries: Sequence[Entry], jobs: int, limit: float, work: Work = examine) -> Iterator[Result]:
    """A result for each entry, as they come.

    Args:
        jobs: processes at a time.
        limit: seconds for one entry; then its process is ended, and the entry counts as wrong.
    """
    context = multiprocessing.get_context("fork")  # a child has what the parent has imported
    waiting = list(entries)
    running: dict[Connection, tuple[Entry, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                entry = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, work, entry), daemon=True)
                process.start()
                theirs.close()
                running[ours] = entry, process, time.monotonic() + limit
            ready = wait(list(running), timeout=1.0)
            for pipe in list(running):
                entry, process, end = running[pipe]
                if pipe in ready:
                    try:
                        told = pipe.recv()
                    except EOFError:
                        process.join()
                        told = f"the process ended with code {process.exitcode}"
                elif time.monotonic() > end:
                    told = f"not done in {limit:.0f} s"
                else:
                    continue
                process.kill()
                process.join()
                pipe.close()
                del running[pipe]
                yield Result(**told) if isinstance(told, dict) else failed(entry, told)
    finally:
        for _, process, _ in running.values():
            process.kill()


def failed(entry: Entry, told: str) -> Result:
    """The result of an entry that was not examined to its end."""
    return Result(entry.name, entry.family, captured="refused", reason=told.strip().splitlines()[-1], wrong=told.strip().splitlines()[-6:], parameters=0.0, flops=0.0)
