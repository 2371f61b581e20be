"""The launcher: who is who, whose line it is, and one that fails ends all. Who a process is, as torchrun and SLURM say it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from house import ROOT

from fxopt.cli import main
from fxopt.errors import ProcessError
from fxopt.train.launcher import launch
from fxopt.train.strategies.environment import Place, first_host, place
from tests.train.processes import free_port, outcomes

SEEN = "import os, json; print(json.dumps({name: os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')}))"


def test_each_process_is_told_who_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--processes", "3", "--", sys.executable, "-c", SEEN]) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    seen = [json.loads(line.removeprefix(f"[{rank}] ")) for rank, line in enumerate(lines)]
    assert [each["RANK"] for each in seen] == [each["LOCAL_RANK"] for each in seen] == ["0", "1", "2"]
    assert {each["WORLD_SIZE"] for each in seen} == {"3"} and len({each["MASTER_PORT"] for each in seen}) == 1


def test_machines_share_a_place_to_meet(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    codes = outcomes(2, lambda node: launch([sys.executable, "-c", SEEN], 2, nodes=2, node=node, master=f"127.0.0.1:{port}"))
    assert [each.value for each in codes] == [0, 0], codes
    lines = sorted(capfd.readouterr().out.splitlines())
    seen = [json.loads(line[4:]) for line in lines]
    assert [each["RANK"] for each in seen] == ["0", "1", "2", "3"] and {(each["WORLD_SIZE"], each["MASTER_PORT"]) for each in seen} == {("4", str(port))}


# Rank 1 fails; rank 0 waits to be ended, and says so.
FAILING = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    time.sleep(0.3)
    {act}
signal.signal(signal.SIGTERM, lambda *_: (print("told", flush=True), sys.exit(9)))
time.sleep(60)
"""


@pytest.mark.parametrize(("act", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9)])
def test_the_first_failure_ends_all_with_its_code(capfd: pytest.CaptureFixture[str], act: str, code: int) -> None:
    began = time.monotonic()
    assert launch([sys.executable, "-c", FAILING.format(act=act)], 2, grace=0.5) == code
    assert time.monotonic() - began < 30 and "[0] told" in capfd.readouterr().out


def test_sigterm_goes_on_to_all(capfd: pytest.CaptureFixture[str]) -> None:
    waiting = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nprint('ready', flush=True)\ntime.sleep(60)"

    def strike(processes: list[int]) -> None:
        out, limit = "", time.monotonic() + 30
        while out.count("ready") < 2 and time.monotonic() < limit:
            time.sleep(0.05)
            out += capfd.readouterr().out
        os.kill(processes[0], signal.SIGTERM)

    (found,) = outcomes(1, lambda rank: launch([sys.executable, "-c", waiting], 2), meanwhile=strike)
    assert found.value == 143, found.error


def test_what_cannot_be_launched_is_said() -> None:
    for arguments, words in ((dict(command=["true"], processes=0), "0 processes"), (dict(command=["true"], processes=1, nodes=2), "place to meet"),
                             (dict(command=["true"], processes=1, master="here"), "no host and port"), (dict(command=["no-such-program"], processes=1), "could not be started")):
        with pytest.raises(ProcessError, match=words):
            launch(**arguments)  # type: ignore[arg-type]
    assert main(["launch"]) == 2


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "45678", "SLURM_JOB_NODELIST": "gpu[07-09,12],x1"}


def test_launchers_are_known_by_their_variables() -> None:
    assert place(TORCHRUN) == Place(3, 4, 1, "a", 29500, "torchrun")
    assert place(SLURM) == Place(5, 8, 1, "gpu07", 15000 + 45678 % 20000, "SLURM")
    assert place({**SLURM, "MASTER_ADDR": "b", "MASTER_PORT": "1234"}) == Place(5, 8, 1, "b", 1234, "SLURM")
    assert place({**SLURM, "SLURM_STEP_NODELIST": "gpu08"}).host == "gpu08"  # type: ignore[union-attr]
    assert place({}) is None and place({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}) is None, "a batch script is no task"
    assert place({**SLURM, "SLURM_STEP_NUM_TASKS": "6"}).world == 6, "of the step, not of the job"  # type: ignore[union-attr]
    assert place({**SLURM, "SLURM_STEP_ID": "1"}).port != place(SLURM).port, "steps of a job may run at once"  # type: ignore[union-attr]
    lists = {"a": "a", "a,b": "a", "n[3,5]": "n3", "node[01-03,07]": "node01", "rack-2-n[001-004]": "rack-2-n001", "rack[1-2]n[01-16],x": "rack1n01", "n[07-09]-ib": "n07-ib"}
    assert {nodes: first_host(nodes) for nodes in lists} == lists
    for nodes in ("", ",a", "[", "n[1-2"):
        with pytest.raises(ProcessError, match="no list of hosts"):
            first_host(nodes)


@pytest.mark.parametrize(("change", "words"), [({"RANK": "x"}, "no number"), ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"), ({"RANK": "4"}, "rank 4 of 4")])
def test_variables_that_make_no_sense_are_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(ProcessError, match=words):
        place({**TORCHRUN, **change})


SCRIPT = """
import os, signal, sys
import torch
from fxopt.train.callbacks import Callback
from fxopt.train.trainer import fit
from tests.train.small import Net, batches

class Act(Callback):
    def on_step_start(self, state):
        if state.step == 3 and state.rank == 1 and act != "nothing":
            os.kill(os.getpid(), getattr(signal, act))

folder, act = sys.argv[1:]
result = fit(Net(), batches(24), epochs=1, seed=0, progress=False, callbacks=[Act()], output_dir=folder, resume=True)
print("steps", result.first_step + len(result.steps), result.losses[-1])
"""


def script(tmp_path: Path, act: str, name: str) -> list[str]:
    (tmp_path / "train.py").write_text(SCRIPT)
    return [str(tmp_path / "train.py"), str(tmp_path / name), act]


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT / "src"), str(ROOT), str(ROOT / "tests"))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_training_stops_with_sigterm_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str], importable: Any) -> None:
    assert launch(script(tmp_path, "nothing", "run"), 2) == 0
    whole = sorted(capfd.readouterr().out.splitlines())
    assert launch(script(tmp_path, "SIGTERM", "other"), 2) == 143
    assert launch(script(tmp_path, "nothing", "other"), 2) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == whole and len(whole) == 2 and "steps 12" in whole[0]


@pytest.mark.slow
def test_two_machines_train_and_a_killed_rank_ends_both(tmp_path: Path, capfd: pytest.CaptureFixture[str], importable: Any) -> None:
    def machines(act: str, name: str) -> list[Any]:
        port, command = free_port(), script(tmp_path, act, name)
        return [each.value for each in outcomes(2, lambda node: launch(command, 1, nodes=2, node=node, master=f"127.0.0.1:{port}", grace=10.0), timeout=120.0)]

    assert machines("nothing", "whole") == [0, 0]
    assert capfd.readouterr().out.count("steps 12") == 2
    assert machines("SIGKILL", "killed") == [1, 128 + 9]
    assert "Rank 1 was lost" in capfd.readouterr().err


HANGING = """
import sys, time
from fxopt.train.callbacks import Callback
from fxopt.train.strategies.ddp import DDP
from fxopt.train.trainer import fit
from tests.train.small import Net, batches

class Act(Callback):
    def on_step_end(self, state):
        if state.step == 2 and state.rank == 1:
            time.sleep(1000)

fit(Net(), batches(24), epochs=1, seed=0, progress=False, callbacks=[Act()], strategy=DDP(timeout=3))
"""


@pytest.mark.slow
def test_a_rank_that_hangs_does_not_keep_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str], importable: Any) -> None:
    """Rank 0 ends with its error though its exchange with rank 1 is still open; so the launcher ends rank 1, by SIGKILL after 30 s at most."""
    (tmp_path / "hang.py").write_text(HANGING)
    began = time.monotonic()
    assert launch([str(tmp_path / "hang.py")], 2, grace=2.0) == 1
    assert time.monotonic() - began < 80
    assert "did not come to an exchange within 3 s" in capfd.readouterr().err


@pytest.mark.slow
def test_under_torchrun_on_one_machine_and_on_two(tmp_path: Path, importable: Any) -> None:
    def torchrun(command: list[str], *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *options, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def printed(*runs: subprocess.Popen[str]) -> list[str]:
        said = [run.communicate(timeout=120)[0] for run in runs]
        assert [run.returncode for run in runs] == [0] * len(runs), said
        return sorted(re.findall(r"^.*steps 12.*$", "\n".join(said), re.M))

    one = printed(torchrun(script(tmp_path, "nothing", "one"), "--nproc-per-node", "2", "--master-port", str(free_port())))
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    two = printed(*[torchrun(script(tmp_path, "nothing", "two"), *meet, "--node-rank", str(node)) for node in range(2)])
    assert len(one) == 2 and one == two


@pytest.mark.slow
def test_under_the_variables_of_srun(tmp_path: Path, importable: Any) -> None:
    def task(rank: int) -> subprocess.Popen[str]:
        told = {**SLURM, "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "localhost,x[1-2]", "MASTER_PORT": port}
        return subprocess.Popen([sys.executable, *script(tmp_path, "nothing", "run")], env={**os.environ, **told}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    port = str(free_port())
    tasks = [task(rank) for rank in range(2)]
    said = [each.communicate(timeout=120)[0] for each in tasks]
    assert [each.returncode for each in tasks] == [0, 0] and len(set(said)) == 1 and "steps 12" in said[0], said


CONFIG = """
model: mine:model
passes: canonicalize | fuse | dead_code
processes: 2
data: {train: "mine:train", val: "mine:val"}
trainer: {epochs: 2, lr: 0.01, strategy: ddp, seed: 1, progress: false}
"""
MINE = """
import torch
from tests.train.small import Net, batches

def model(): return Net(), (torch.randn(4, 4), torch.randint(0, 3, (4,)))
def train(): return batches(9)
def val(): return batches(3, seed=7)
"""


def test_a_configuration_starts_its_processes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    asked: list[Any] = []
    monkeypatch.setattr("fxopt.train.launcher.launch", lambda command, processes: asked.append((list(command), processes)) or 0)
    assert main(["train", "run.yaml", "trainer.lr=1", "--resume"]) == 0
    assert asked == [([sys.executable, "-m", "fxopt", "train", "run.yaml", "trainer.lr=1", "--resume"], 2)]
    for name, value in {**TORCHRUN, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "run.yaml"]) != 0 and len(asked) == 1, "a rank starts no others: it looks for the model, which is not there"


@pytest.mark.slow
def test_a_configuration_trains_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], importable: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    Path("mine.py").write_text(MINE)
    assert main(["train", "run.yaml", f"trainer.output_dir={tmp_path / 'run'}"]) == 0
    out = capfd.readouterr().out
    assert "[0] steps 10, epochs 2" in out and "[1]" not in out and (tmp_path / "run" / "metrics.jsonl").exists()
