"""Starts a command on several processes of this machine, and ends all of them when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import BinaryIO

import torch
import torch.distributed as dist

from fxopt.errors import ProcessError

_GRACE = 15.0
"""Seconds that the other ranks have, once one has failed, to find that out and say it (they take 1 to 4) before SIGTERM."""
_KILL = 30.0
"""Seconds between SIGTERM and SIGKILL: a rank may save meanwhile."""


def launch(command: Sequence[str], processes: int | None = None, nodes: int = 1, node: int = 0, master: str | None = None, grace: float = _GRACE) -> int:
    """Run a command on so many processes, under torchrun's environment variables, and wait for all of them.

    SIGTERM and SIGINT go on to the processes. Each line that they write is prefixed with the rank. This process holds the store through
    which they meet, so that rank 0 may die and the others still hear of it.

    Args:
        command: a program with its arguments; a `.py` file runs under this Python. processes: on this machine; None: one for each GPU.
        nodes, node: machines, and which of them this is; the same command is started on each. master: `host:port` of machine 0; needed if
            there are several. grace: seconds that the others have when one has failed, before they are ended.

    Returns:
        0; or the exit code of the process that failed first, 128 + n for one that signal n ended.

    Raises:
        ProcessError: numbers that make no sense, no such program, or the port is taken.
    """
    processes = processes if processes is not None else max(1, torch.cuda.device_count())
    if processes < 1 or not 0 <= node < nodes or not command:
        raise ProcessError(f"{processes} processes on machine {node} of {nodes}, command {' '.join(command) or 'none'}.", where="launch", do="At least one process; machines count from 0.")
    if nodes > 1 and master is None:
        raise ProcessError("Several machines need a place to meet.", where="launch", do="Give --master HOST:PORT, a free port of machine 0, on all of them.")
    host, _, port = (master or "127.0.0.1:0").rpartition(":")
    if not host or not port.isdecimal():
        raise ProcessError(f"{master!r} is no host and port.", where="launch", do="Write HOST:PORT.")
    store = None
    if node == 0:
        try:
            store = dist.TCPStore(host, int(port), is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            raise ProcessError(f"Port {port} cannot be listened on: {str(error).splitlines()[0]}", where="launch", do="Take another --master port.") from error
    first = [sys.executable] if command[0].endswith(".py") else []
    shared = {**os.environ, "WORLD_SIZE": str(processes * nodes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": str(node), "MASTER_ADDR": host,
              "MASTER_PORT": str(store.port if store is not None else port), "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONUNBUFFERED": "1"}
    # All processes share the processors: with torch's default each would start a thread for every one of them.
    shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    ranks: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    try:
        for local in range(processes):
            rank = node * processes + local
            # A session of its own: Ctrl-C reaches it through us, once.
            made = subprocess.Popen([*first, *command], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(local)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
            ranks.append(made)
            for source, target in ((made.stdout, sys.stdout.buffer), (made.stderr, sys.stderr.buffer)):
                assert source is not None
                readers.append(threading.Thread(target=_prefixed, args=(source, target, rank), daemon=True))
                readers[-1].start()
        return _watched(ranks, grace)
    except OSError as error:
        raise ProcessError(f"{command[0]} could not be started: {error.strerror or error}.", where="launch") from error
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for reader in readers:
            reader.join(timeout=5)


def _watched(ranks: Sequence[subprocess.Popen[bytes]], grace: float) -> int:
    """Wait for all processes; when one has failed, end the others."""
    asked: list[int] = []
    before = {kind: signal.signal(kind, lambda number, frame: asked.append(number)) for kind in (signal.SIGTERM, signal.SIGINT)} if threading.current_thread() is threading.main_thread() else {}
    first, since, told = 0, 0.0, False
    try:
        while True:
            codes = [process.poll() for process in ranks]
            for number in asked:
                _signal(ranks, number)
            asked.clear()
            failed = next((code for code in codes if code), None)
            if failed is not None and not first:
                first, since = failed if failed > 0 else 128 - failed, time.monotonic()
            if all(code is not None for code in codes):
                return first
            if first and not told and time.monotonic() - since > grace:
                told = True
                _signal(ranks, signal.SIGTERM)
            if first and time.monotonic() - since > grace + _KILL:
                _signal(ranks, signal.SIGKILL)
            time.sleep(0.05)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _signal(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)


def _prefixed(source: BinaryIO, target: BinaryIO, rank: int) -> None:
    """Hand on line by line: lines of different ranks do not mix."""
    for line in source:
        target.write(f"[{rank}] ".encode() + line.rstrip(b"\n") + b"\n")
        target.flush()
