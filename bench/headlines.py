"""The headline rows: what fxopt claims against its peers, each system in its own process, in turns.

    python -m bench.headlines [--only C1 C2 ...] [--systems NAME ... | --all] [--rounds N] [--quick] [--out FILE]

Writes the rows that it ran into bench/results/headlines.jsonl (the others' records stay) and prints a table. Exit code 1 when a system
fails, when its losses are not the eager ones, when it counts other tokens, or when an adapter gets no gradient. A goal that is missed
is said in the table and is no failure. One process runs at a time; the eager ones of C1 and C2 need up to 20 GiB.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
import json
import math
import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from rich.console import Console
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bench.headlines_process import chosen
from bench.headlines_table import show
from bench.headlines_workloads import ALPHA, RANK, ROWS, Row
from bench.machine import describe
from demo.table import PARITY_LIMIT
from fxopt.runtime.store import Adapter, write_adapters

RESULTS = Path(__file__).parent / "results" / "headlines.jsonl"
TIME_LIMIT = 2400
"""Seconds for one process."""
BOUNDING = "checkpointing"
"""The system whose peak is the budget of a row with one."""
Record = dict[str, Any]


def first_adapter(row: Row, folder: Path) -> Path:
    """Writes the adapter that every system of a row starts from: A uniform as PEFT's, B normal with a small deviation."""
    settings = dict(row.config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    generator = torch.Generator().manual_seed(1)
    head = model.get_output_embeddings()
    adapters = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            a = torch.empty(RANK, module.in_features).uniform_(-1, 1, generator=generator) / module.in_features**0.5
            b = torch.empty(module.out_features, RANK).normal_(0, 0.01, generator=generator)
            adapters.append(Adapter(name, a, b, ALPHA))
    return write_adapters(folder, adapters, task_type="CAUSAL_LM")


def process(arguments: Sequence[str], out: Path, cache: Path) -> Record:
    """The record that a system's process wrote, or {"failed": reason}."""
    out.unlink(missing_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, "-W", "ignore", "-m", "bench.headlines_process", str(out), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {TIME_LIMIT} s"}
    if done.returncode or not out.exists():
        return {"failed": reason(done.stderr) or f"exit code {done.returncode}"}
    return json.loads(out.read_text())


def reason(stderr: str) -> str:
    """The error in what a process wrote before it ended: the last line that names one, and the last lines; one line of its own is the last."""
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Killed)\b", line)]
    return "\n".join([*lines[-12:], *named[-1:]])


def measure(row: Row, systems: Sequence[str], folder: Path, options: Sequence[str]) -> Iterator[Record]:
    """Round by round, in each all systems in turn. torch.compile's cache is empty at first, and each time in a cold row."""
    adapter = first_adapter(row, folder / f"{row.name}-adapter")
    budgets: dict[bool, int] = {}
    for index in range(row.rounds):
        for name in systems:
            system = row.systems[name]
            if index >= row.rounds_of(system):
                continue
            arguments = [str(adapter), "--row", row.name, "--system", name, "--round", str(index), *options]
            if system.peer == "fxopt" and row.memory == "budget":
                if system.tight not in budgets:
                    yield {"row": row.name, "system": name, "round": index, "failed": f"no budget: {BOUNDING} did not run"}
                    continue
                arguments += ["--budget", str(budgets[system.tight])]
            cache = folder / (f"{row.name}-{name}-{index}" if row.cold else f"{row.name}-{name}")
            start = time.perf_counter()
            record = process(arguments, folder / "record.json", cache)
            if name == BOUNDING and "failed" not in record:
                budgets |= budgets_of(record)
            yield {"row": row.name, "system": name, "round": index, "process_seconds": time.perf_counter() - start, **record}


def budgets_of(record: Record) -> dict[bool, int]:
    """The bytes of a training step in the checkpointed peer's record, as the memory pass counts them: with weights, adapters, their gradients
    and the optimizer's state. By what its process took; and (True) by what the allocator held, to which the state, twice the adapters,
    is added, because that was there before the profiled step."""
    fixed = record["weights"] + record["trained"]
    found = {False: fixed + max(phase["above"] for phase in record["phases"])}
    held = [phase["allocator"] for phase in record["phases"] if phase["allocator"] is not None]
    return found | ({True: fixed + 2 * record["trained"] + max(held)} if held else {})


def losses(record: Record) -> list[float]:
    """All losses in order, those of the steps that were not timed too."""
    return [record["first_loss"], *(step["loss"] for phase in record["phases"] for step in _steps(phase))]


def _steps(phase: Record) -> list[Record]:
    return [step for step in (phase["profiled"], *phase["steps"]) if step is not None]


def check(row: Row, records: Sequence[Record]) -> list[str]:
    """What is wrong with a row's records. Adds to each its largest relative differences from eager, and how many steps were compared."""
    wrong = [f"{r['row']} {r['system']}, round {r['round']}: {r['failed']}" for r in records if "failed" in r]
    good = {(r["system"], r["round"]): r for r in records if "failed" not in r}
    for (name, index), record in good.items():
        who = f"{row.name} {name}, round {index}"
        if not record["smallest_gradient_norm"] > 0:
            wrong.append(f"{who}: {record['weakest']} gets no gradient")
        # Only where rounds have batches of their own does it have to be the same round.
        of = row.systems[name].reference
        reference = good.get((of, index)) or (good.get((of, 0)) if row.lengths else None)
        if reference is None:
            wrong.append(f"{who}: no eager losses to compare with")
            continue
        record["compared_steps"] = min(len(losses(record)), len(losses(reference)))
        pairs = list(zip(losses(record), losses(reference), strict=False))
        record["largest_relative_loss_difference"] = largest = max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs)
        if not largest <= PARITY_LIMIT:
            wrong.append(f"{who}: a loss differs from eager by {largest:.1e} (relative)")
        for mine, theirs in zip(record["phases"], reference["phases"], strict=True):
            for a, b in zip(_steps(mine), _steps(theirs), strict=False):
                record["largest_relative_norm_difference"] = max(record.get("largest_relative_norm_difference", 0.0),
                                                                 abs(a["gradient_norm"] - b["gradient_norm"]) / b["gradient_norm"])
                if (a["tokens"], a["padded"], a["supervised"]) != (b["tokens"], b["padded"], b["supervised"]):
                    wrong.append(f"{who}: counts other tokens than eager in {mine['label']}")
        if record["adapters"] != reference["adapters"]:
            wrong.append(f"{who}: {record['adapters']} adapter tensors, eager has {reference['adapters']}")
    return wrong


def write(file: Path, machine: Record, row: Row, records: Sequence[Record], *, quick: bool) -> None:
    """Puts a row's records into the results in place of its old ones: a line about the machine, then one line per process."""
    kept = [line for line in file.read_text().splitlines() if json.loads(line)["row"] != row.name] if file.exists() else []
    head = {"row": row.name, "quick": quick, "machine": machine}
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join([*kept, json.dumps(head), *map(json.dumps, records)]) + "\n")


def wanted(row: Row, names: Sequence[str] | None, *, every: bool = False) -> list[str]:
    """The systems to run: those named, and what they are compared with or bounded by. None: all but the extra ones."""
    if names is None:
        return [name for name, system in row.systems.items() if every or not system.extra]
    needed = {name for name in names if name in row.systems}
    needed |= {row.systems[name].reference for name in needed}
    needed |= {BOUNDING} if row.memory == "budget" and any(row.systems[name].peer == "fxopt" for name in needed) else set()
    return [name for name in row.systems if name in needed]


def main() -> int:
    """Reads the command line and measures."""
    known = sorted({name for row in ROWS.values() for name in row.systems})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--systems", nargs="+", choices=known, help="these, and what they are compared with")
    parser.add_argument("--all", action="store_true", help="the extra systems too")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="one round of few steps; marked so in the records")
    parser.add_argument("--tiny", action="store_true", help="on tiny models, to see that everything runs; writes no results unless --out is given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = [chosen(name, quick=given.quick, tiny=given.tiny, rounds=given.rounds) for name in given.only]
    torch.set_num_threads(given.threads)
    machine = describe()
    print(f"about {sum(row.minutes for row in rows):.0f} minutes", file=sys.stderr, flush=True)
    options = ["--threads", str(given.threads), *(["--quick"] * given.quick), *(["--tiny"] * given.tiny),
               *(["--rounds", str(given.rounds)] if given.rounds is not None else [])]
    out = given.out or (None if given.tiny else RESULTS)
    wrong: list[str] = []
    console = Console(width=None if sys.stdout.isatty() else 180)
    with tempfile.TemporaryDirectory() as temporary:
        for row in rows:
            records = []
            for record in measure(row, wanted(row, given.systems, every=given.all), Path(temporary), options):
                print(_line(record), file=sys.stderr, flush=True)
                records.append(record)
            wrong += check(row, records)
            if out is not None:
                write(out, machine, row, records, quick=given.quick or given.tiny)
            show(console, row, records, quick=given.quick or given.tiny)
    for line in wrong:
        print(f"FAILS  {line}", file=sys.stderr)
    return 1 if wrong else 0


def _line(record: Record) -> str:
    start = f"{record['row']} round {record['round']}  {record['system']}:"
    if "failed" in record:
        return f"{start} FAILED: {record['failed'].splitlines()[-1]}"
    last = record["phases"][-1]
    return (f"{start} {min(step['seconds'] for step in last['steps']):.2f} s/step, {last['above'] / 2**30:.2f} GiB above the weights, "
            f"first step {record['prepare_seconds'] + record['first_step_seconds']:.1f} s, process {record['process_seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
