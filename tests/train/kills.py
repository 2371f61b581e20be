"""Kills training runs at random moments, resumes them, and compares every byte with the run that nobody disturbed.

    python -m tests.train.kills [--points 200] [--seed 0] [--out FILE] [--scenario NAME ...]

One process has torch, the data and the captured graphs in memory; every run is a fork of it, so a kill point costs tenths of a second.
What is compared is the manifest of the last checkpoint, which has the sha256 of the weights, of every optimizer's state, of the random
states and of all else that a run is, and the bytes of its logs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxopt
from fxopt.train.averaging import Averaged
from fxopt.train.folder import MANIFEST
from fxopt.train.guard import Spikes
from fxopt.train.journal import METRICS, TABLE
from fxopt.train.loader import Loader
from fxopt.train.saver import Checkpoints
from fxopt.train.schedule import Plateau
from fxopt.train.snapshot import checkpoints
from fxopt.train.stopping import EarlyStopping
from fxopt.train.strategies.ddp import DDP
from fxopt.train.strategies.fsdp import FSDP
from fxopt.train.trainer import Trainer
from tests.models import llama, tokens
from tests.train.processes import outcomes


class Shifted(torch.utils.data.Dataset):
    """Samples that are shifted at random, with all three generators."""

    def __init__(self, number: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(number, 1, 8, 8, generator=generator)
        self.y = torch.randint(0, 4, (number,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(1, 8, 8) * 0.1 * np.random.rand()
        return torch.roll(self.x[index], random.randint(-1, 1), -1) + noise.float(), self.y[index]


class Net(nn.Module):
    """A convnet with batch norm (buffers) and dropout (random states)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 4))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, y), "logits": logits}


def convnet(folder: Path, **more: Any) -> Trainer:
    """Accumulation with a tail, a checkpoint in the middle of steps, averages, a plateau, early stopping, spikes."""
    return Trainer(epochs=3, lr=0.01, accumulate=3, schedule=["cosine", Plateau(patience=0, factor=0.5)], warmup=2, seed=3, output_dir=folder, progress=False, deterministic=True,
                   metrics={"accuracy": lambda output, batch: output["logits"].argmax(-1) == batch[1]}, callbacks=[Averaged(decay=0.9), EarlyStopping("val_loss", patience=2)],
                   spikes=Spikes(), checkpoints=Checkpoints(every=2, unit="batch", keep=2, best=1), **more)


def images(folder: Path, resume: bool, **more: Any) -> None:
    """The convnet."""
    torch.manual_seed(0)
    convnet(folder, **more).fit(Net(), Loader(Shifted(34, 0), 4, shuffle=True, seed=5), Loader(Shifted(10, 1), 4), resume=resume)


def workers(folder: Path, resume: bool) -> None:
    """The convnet, with processes that load, and checkpoints written by a thread."""
    torch.manual_seed(0)
    policy = Checkpoints(every=1, unit="step", keep=2, background=True)
    Trainer(epochs=2, lr=0.01, accumulate=2, seed=3, output_dir=folder, progress=False, optimizer="momentum", checkpoints=policy).fit(
        Net(), Loader(Shifted(30, 0), 4, shuffle=True, seed=5, workers=2), resume=resume)


def _adapters() -> Callable[[Path, bool], None]:
    texts = [tokens(2, 6 + i % 3, seed=i) for i in range(8)]
    torch.manual_seed(0)
    opt = fxopt.optimize(llama(layers=1), "canonicalize | causal | denominator | lora(rank=2, dropout=0.1) | quantize(nf4) | fuse | loss | remat | dead_code", inputs=texts[0])

    def adapters(folder: Path, resume: bool) -> None:
        """LoRA over NF4, through captured graphs, 8-bit AdamW."""
        Trainer(epochs=2, lr=0.01, optimizer="adamw_8bit", accumulate=2, seed=3, output_dir=folder, progress=False, checkpoints=Checkpoints(every=3, unit="batch")).fit(opt, texts, resume=resume)

    return adapters


def processes(folder: Path, resume: bool, strategy: type[DDP] = DDP) -> None:
    """The convnet on two processes which train together; this one only waits for them.

    Ends with `UNEQUAL` if one was struck and the other stopped because of it, as it must.
    """
    def noted(found: list[int]) -> None:
        ranks_of(folder).write_text(json.dumps(found))

    try:
        # A rank that is struck before they have met is missed by the other after `joining`; a launcher would end it.
        found = outcomes(2, lambda rank: images(folder, resume, strategy=strategy(joining=10.0)), meanwhile=noted)
    finally:
        ranks_of(folder).unlink(missing_ok=True)
    codes = {each.code for each in found}
    if len(codes) == 1:
        sys.exit(codes.pop())
    wrong = [each.error for each in found if each.code not in (0, 128 + signal.SIGTERM, -signal.SIGKILL, -signal.SIGTERM) and "ProcessError: " not in each.error]
    if wrong:
        print("\n".join(wrong), file=sys.stderr, flush=True)
    sys.exit(1 if wrong else UNEQUAL)


def shards(folder: Path, resume: bool) -> None:
    """The same with weights in pieces, of which both processes write their own."""
    processes(folder, resume, FSDP)


UNEQUAL = 99
SCENARIOS: dict[str, Callable[[], Callable[[Path, bool], None]]] = {"images": lambda: images, "adapters": _adapters, "workers": lambda: workers, "processes": lambda: processes, "shards": lambda: shards}


@dataclass
class Counts:
    """What happened in one scenario."""

    scenario: str
    kills: int = 0
    of_one_rank: int = 0
    in_the_middle_of_a_save: int = 0
    signals: int = 0
    runs: int = 0
    different: list[str] = field(default_factory=list)
    seconds_to_stop: list[float] = field(default_factory=list)
    seconds_to_notice: list[float] = field(default_factory=list)
    seconds_of_a_run: float = 0.0


def ranks_of(folder: Path) -> Path:
    """The file with the process ids of a run's ranks, while they live."""
    return folder.with_suffix(".ranks")


def child(run: Callable[[Path, bool], None], folder: Path, resume: bool) -> int:
    """A fork that trains; its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)  # its own loading processes are killed with it
        run(folder, resume)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def ended(process: int, timeout: float = 60.0) -> int:
    """The exit code of a fork; a signal that killed it is negative."""
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return -signal.SIGALRM


def outcome(folder: Path) -> dict[str, str]:
    """What a finished run left behind, by hash."""
    last = checkpoints(folder / "checkpoints")[-1]
    manifest = json.loads((last / MANIFEST).read_text())
    logs = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (METRICS, TABLE)}
    config = {"config.json"}  # it has the run's folder in it
    return {"checkpoint": last.name, **logs, **{name: entry["sha256"] for name, entry in manifest["files"].items() if name not in config}}


def attack(name: str, points: int, seed: int) -> Counts:
    """Kill runs of a scenario at so many random moments."""
    run, counts, chance = SCENARIOS[name](), Counts(name), random.Random(seed)
    with tempfile.TemporaryDirectory() as base:
        began = time.monotonic()
        assert ended(child(run, Path(base) / "whole", False)) == 0, "the undisturbed run failed"
        counts.seconds_of_a_run = time.monotonic() - began
        wanted = outcome(Path(base) / "whole")
        while counts.kills + counts.signals < points:
            folder = Path(base) / "disturbed"
            shutil.rmtree(folder, ignore_errors=True)
            kills, code = chance.randint(3, 8), None
            while code != 0:
                process = child(run, folder, (folder / "checkpoints").exists())
                if kills:
                    kills -= 1
                    time.sleep(chance.uniform(0.0, 0.6 * counts.seconds_of_a_run))
                    gentle = chance.random() < 0.2
                    _strike(process, gentle, folder, counts, chance)
                    continue
                code = ended(process)
                assert code == 0, f"{name}: the resumed run ended with {code}"
            counts.runs += 1
            found = outcome(folder)
            if found != wanted:
                counts.different.append(", ".join(key for key in {**wanted, **found} if wanted.get(key) != found.get(key)))
    return counts


def _strike(process: int, gentle: bool, folder: Path, counts: Counts, chance: random.Random) -> None:
    try:
        ranks = json.loads(ranks_of(folder).read_text())
    except (OSError, ValueError):
        ranks = []  # one process, or the others are not there yet, or no longer
    if ranks and (gentle or chance.random() < 0.5):
        _strike_one(chance.choice(ranks), process, gentle, folder, counts)
        return
    if gentle:
        began = time.monotonic()
        try:
            os.kill(process, signal.SIGTERM)
        except ProcessLookupError:
            return
        code = ended(process)
        # before a run has set its handlers, SIGTERM ends the process as it always did
        assert code in (128 + signal.SIGTERM, 0, -signal.SIGTERM), f"SIGTERM: the run ended with {code}"
        counts.signals += code == 128 + signal.SIGTERM
        counts.seconds_to_stop += [time.monotonic() - began] if code == 128 + signal.SIGTERM else []
        return
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(process, signal.SIGKILL)
    if ended(process) == -signal.SIGKILL:
        counts.kills += 1
        counts.in_the_middle_of_a_save += any((folder / "checkpoints").glob(".*"))


def _strike_one(rank: int, process: int, gentle: bool, folder: Path, counts: Counts) -> None:
    """Strike one of several ranks: the others must end by themselves."""
    began = time.monotonic()
    try:
        os.kill(rank, signal.SIGTERM if gentle else signal.SIGKILL)
    except ProcessLookupError:
        pass
    code = ended(process)
    assert code in (0, UNEQUAL, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL), f"one rank was struck: the run ended with {code}"
    if gentle and code == 128 + signal.SIGTERM:
        counts.signals += 1
        counts.seconds_to_stop.append(time.monotonic() - began)
    if not gentle and code == UNEQUAL:
        counts.kills, counts.of_one_rank = counts.kills + 1, counts.of_one_rank + 1
        counts.in_the_middle_of_a_save += any((folder / "checkpoints").glob(".*"))
        counts.seconds_to_notice.append(time.monotonic() - began)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200, help="kill points of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append a line for each scenario")
    parser.add_argument("--scenario", nargs="+", choices=tuple(SCENARIOS), default=list(SCENARIOS))
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork has no threads but its own
    failed = False
    for name in options.scenario:
        counts = attack(name, options.points, options.seed)
        line = {"scenario": name, "seed": options.seed, "kills": counts.kills, "in_the_middle_of_a_save": counts.in_the_middle_of_a_save, "sigterm": counts.signals,
                "slowest_stop_seconds": round(max(counts.seconds_to_stop, default=0.0), 2), "median_stop_seconds": round(statistics.median(counts.seconds_to_stop or [0.0]), 2),
                **({"of_one_rank": counts.of_one_rank, "slowest_notice_seconds": round(max(counts.seconds_to_notice, default=0.0), 2)} if name in ("processes", "shards") else {}),
                "resumed_runs": counts.runs, "different": counts.different, "seconds_of_a_run": round(counts.seconds_of_a_run, 2), "torch": torch.__version__}
        print(json.dumps(line), flush=True)
        if options.out is not None:
            with options.out.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        failed |= bool(counts.different)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
