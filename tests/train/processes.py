"""Functions that run on several processes which train together: forks of the test's own, so that nothing is imported again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import Any

import torch


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Outcome:
    """What became of one process.

    Attributes:
        value: what the function returned: plain data or numpy arrays. error: what it raised, as text. code: its exit code; a signal is negative.
        seconds: until it ended.
    """

    value: Any = None
    error: str = ""
    code: int | None = None
    seconds: float = 0.0


def outcomes(world: int, function: Callable[[int], Any], *, timeout: float = 90.0, meanwhile: Callable[[list[int]], None] | None = None) -> list[Outcome]:
    """Run `function(rank)` on so many forks, under torchrun's variables, with one thread each.

    Args:
        timeout: seconds after which they are killed. meanwhile: runs in this process, and is given theirs.
    """
    port, began = free_port(), time.monotonic()
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = get_context("fork").Pipe()
        process = os.fork()
        if not process:
            _child(rank, world, port, function, theirs)
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found = [Outcome() for _ in range(world)]
    if meanwhile is not None:
        meanwhile(processes)
    left = dict(enumerate(pipes))
    while left and time.monotonic() - began < timeout:
        for ready in connection.wait(list(left.values()), timeout=0.5):
            rank = next(rank for rank, pipe in left.items() if pipe is ready)
            with contextlib.suppress(EOFError, ConnectionResetError):
                found[rank].value, found[rank].error = ready.recv()
            found[rank].seconds = time.monotonic() - began
            del left[rank]
    for rank, process in enumerate(processes):
        if rank in left:
            os.kill(process, signal.SIGKILL)
        found[rank].code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return found


def together(world: int, function: Callable[[int], Any], **more: Any) -> list[Any]:
    """What `function(rank)` returns on each of so many processes, all of which must succeed."""
    found = outcomes(world, function, **more)
    assert all(not each.error and each.code == 0 for each in found), "\n".join(f"rank {rank}: exit {each.code}\n{each.error}" for rank, each in enumerate(found))
    return [each.value for each in found]


def _child(rank: int, world: int, port: int, function: Callable[[int], Any], pipe: Any) -> None:
    code, answer = 1, (None, "")
    try:
        torch.set_num_threads(1)  # a fork has no threads but its own
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        answer, code = (function(rank), ""), 0
    except SystemExit as error:
        code = int(error.code or 0)
        answer = (None, str(error))
    except BaseException:
        answer = (None, traceback.format_exc())
    finally:
        with contextlib.suppress(BrokenPipeError):
            pipe.send(answer)
        os._exit(code)
