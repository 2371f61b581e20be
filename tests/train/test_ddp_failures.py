"""A rank that fails, dies, hangs or is told to stop: the others end too, in bounded time, and say who it was."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from fxopt.train.callbacks import Callback, State
from fxopt.train.folder import MANIFEST
from fxopt.train.journal import METRICS
from fxopt.train.saver import Checkpoints
from fxopt.train.snapshot import checkpoints
from fxopt.train.strategies.ddp import DDP
from fxopt.train.trainer import fit
from tests.train.kills import attack
from tests.train.processes import outcomes, together
from tests.train.small import Net, batches

BOUND = 30.0
"""Seconds in which everything here must be over on a busy machine; the parts of it are 1 to 4 s."""


class At(Callback):
    """Something done on one rank in one step."""

    def __init__(self, rank: int, step: int, act: Callable[[], Any]) -> None:
        self.rank, self.at, self.act = rank, step, act

    def on_batch_start(self, state: State, batch: Any, index: int) -> None:
        if state.rank == self.rank and state.step == self.at:
            self.at = -1
            self.act()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("a rank of no luck")


def run(act: Callable[[], Any], rank: int = 1, stay: float = 0.0, **more: Any) -> Callable[[int], Any]:
    def ranks(mine: int) -> int:
        try:
            return len(fit(Net(), batches(60), epochs=1, progress=False, callbacks=[At(rank, 2, act)], strategy=DDP(**more)).steps)
        finally:
            if mine == rank:
                time.sleep(stay)

    return ranks


@pytest.mark.parametrize("dead", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_is_named(dead: int) -> None:
    found = outcomes(2, run(kill, dead))
    assert found[dead].code == -signal.SIGKILL
    assert "ProcessError" in found[1 - dead].error and f"Rank {dead} was lost" in found[1 - dead].error and found[1 - dead].seconds < BOUND


@pytest.mark.slow
def test_a_killed_rank_of_four_is_named_on_all() -> None:
    found = outcomes(4, run(kill, 2))
    assert all("Rank 2 was lost" in found[rank].error and found[rank].seconds < BOUND for rank in (0, 1, 3))


def test_an_error_is_told_to_the_others_though_its_process_stays() -> None:
    found = outcomes(2, run(fail, stay=6.0))
    assert "ValueError" in found[1].error
    assert "Rank 1 failed with ValueError: a rank of no luck" in found[0].error and found[0].seconds < min(BOUND, found[1].seconds), "before the connection broke"


def test_an_error_before_the_first_step_is_told() -> None:
    def ranks(rank: int) -> None:
        if rank:
            fit(Net(), 3, epochs=1, progress=False)  # no data
        fit(Net(), batches(4), epochs=1, progress=False)

    found = outcomes(2, ranks)
    assert "cannot be passed over" in found[1].error and "Rank 1 failed with DataError" in found[0].error and found[0].seconds < BOUND


def test_a_rank_that_does_something_else_is_found_by_the_timeout() -> None:
    found = outcomes(2, run(lambda: time.sleep(5), timeout=2.0))
    assert "did not come to an exchange within 2 s" in found[0].error and found[0].seconds < BOUND
    assert "Rank 0 failed with ProcessError" in found[1].error


@pytest.mark.slow
def test_a_silent_rank_is_named() -> None:
    def free(processes: list[int]) -> None:
        time.sleep(8)
        os.kill(processes[1], signal.SIGCONT)  # which then finds that the others have gone

    found = outcomes(2, run(lambda: os.kill(os.getpid(), signal.SIGSTOP), silence=3.0), meanwhile=free)
    assert "Rank 1 has given no sign of life for 3 s" in found[0].error and found[0].seconds < BOUND


def test_ranks_that_do_not_meet() -> None:
    def ranks(rank: int) -> None:
        if rank == 0:
            DDP(joining=2.0)

    found = outcomes(2, ranks)
    assert "did not meet" in found[0].error and found[0].seconds < BOUND


@pytest.mark.slow
def test_a_rank_that_is_gone_between_two_runs_is_named() -> None:
    def ranks(rank: int) -> None:
        fit(Net(), batches(4), epochs=1, progress=False)
        if rank:
            os._exit(5)  # what an interpreter that ends says to others, this does not
        fit(Net(), batches(4), epochs=1, progress=False)

    found = outcomes(2, ranks)
    assert found[1].code == 5 and "Rank 1 was lost" in found[0].error and found[0].seconds < BOUND


def test_a_group_that_is_there_is_taken_and_left() -> None:
    def ranks(rank: int) -> list[int]:
        dist.init_process_group("gloo")
        first = fit(Net(), batches(4), epochs=1, progress=False, strategy="ddp")
        second = fit(Net(), batches(4), epochs=1, progress=False)
        assert dist.is_initialized()
        return [len(first.steps), len(second.steps)]

    assert together(2, ranks) == [[2, 2]] * 2


def state_of(folder: Path) -> dict[str, Any]:
    last = checkpoints(folder / "checkpoints")[-1]
    files = json.loads((last / MANIFEST).read_text())["files"]
    return {"name": last.name, "log": (folder / METRICS).read_bytes(), **{name: entry["sha256"] for name, entry in files.items() if name != "config.json"}}


@pytest.mark.parametrize("receiver", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_on_one_rank_saves_and_ends_all_and_the_run_resumes_byte_by_byte(tmp_path: Path, receiver: int) -> None:
    def ranks(name: str, act: Callable[[], Any] = lambda: None, resume: bool = False) -> Callable[[int], Any]:
        def function(rank: int) -> list[np.ndarray]:
            model = Net()
            fit(model, batches(14), batches(3, seed=9), epochs=2, accumulate=2, seed=3, progress=False, callbacks=[At(receiver, 1, act)], output_dir=tmp_path / name, resume=resume,
                checkpoints=Checkpoints(every=3, unit="batch"))
            return [parameter.detach().numpy() for parameter in model.parameters()]

        return function

    wanted = together(2, ranks("whole"))
    found = outcomes(2, ranks("stopped", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert [each.code for each in found] == [128 + signal.SIGTERM] * 2 and all("stopped by SIGTERM; saved in" in each.error and each.seconds < BOUND for each in found)
    resumed = together(2, ranks("stopped", resume=True))
    assert all(np.array_equal(a, b) for mine, theirs in zip(resumed, wanted, strict=True) for a, b in zip(mine, theirs, strict=True))
    assert state_of(tmp_path / "stopped") == state_of(tmp_path / "whole")


def test_runs_of_two_processes_that_are_killed_resume_byte_by_byte() -> None:
    counts = attack("processes", 4, seed=3)
    assert counts.kills + counts.signals >= 4 and counts.different == [] and counts.runs >= 1
    assert max(counts.seconds_to_notice, default=0.0) < BOUND


def test_a_full_disk_ends_all_ranks(tmp_path: Path) -> None:
    def ranks(rank: int) -> None:
        def full() -> None:
            (tmp_path / "run" / "checkpoints").rename(tmp_path / "gone")

        fit(Net(), batches(8), epochs=1, progress=False, callbacks=[At(0, 2, full)], output_dir=tmp_path / "run", checkpoints=Checkpoints(every=1, unit="step"))

    found = outcomes(2, ranks)
    assert "DataError" in found[0].error and "Rank 0 failed with DataError" in found[1].error
