"""Takes the measurements: every system in a process of its own, on the same data, in turns.

    python -m bench.run [--only demo|ops] [--rounds N] [--systems NAME ...]

Writes bench/results/demo.jsonl and bench/results/ops.jsonl, one line per process. Exit code 1 when a system's losses
are not the eager ones or an adapter gets no gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any

from bench.machine import describe
from bench.ops import SYSTEMS as OPS
from demo import fetch
from demo.plan import Plan
from demo.table import PARITY_LIMIT, relative_differences

RESULTS = Path(__file__).parent / "results"
REFERENCE = "peft-dense"
SYSTEMS: dict[str, list[str]] = {
    "fxopt": ["demo.ours"],
    "fxopt-no-remat": ["demo.ours", "--no-remat"],
    "peft-nf4": ["demo.peer", "--base", "nf4"],
    REFERENCE: ["demo.peer", "--base", "dense"],
    "peft-nf4-checkpointing": ["demo.peer", "--base", "nf4", "--checkpointing"],
    "peft-dense-checkpointing": ["demo.peer", "--base", "dense", "--checkpointing"],
    "peft-dense-compile": ["demo.peer", "--base", "dense", "--compile"],
}
"""Name of a row: the module that runs it and its arguments. Systems run in this order in every round."""
WARMUP, TIMED = 2, 3
"""Steps per process; the rounds together give TIMED * rounds timed steps."""
TIME_LIMIT = 1800
"""Seconds for one process."""


def process(module: str, arguments: Sequence[str], out: Path, cache: Path) -> Any:
    """The record that a process wrote, or {"failed": reason}."""
    out.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
    }
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {TIME_LIMIT} s"}
    if done.returncode or not out.exists():
        return {"failed": "\n".join(done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode}"}
    return json.loads(out.read_text())


def demo_rounds(rounds: int, systems: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Records of the demo's workload: round by round, each round all systems in turn.

    torch.compile's cache is empty in the first round (which gives the cold start) and kept for the later ones.
    """
    plan = Plan(str(folder), steps=WARMUP + TIMED, held_out=0, samples=0)
    file, out, cache = str(plan.save()), folder / "record.json", folder / "compiled"
    for index in range(rounds):
        for name in systems:
            module, *options = SYSTEMS[name]
            record = process(module, [file, str(out), *options], out, cache)
            record.pop("adapter", None)  # a path of this machine
            yield {"row": name, "round": index, "warmup": WARMUP, "batch": plan.batch, **record}


def check_demo(records: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong: losses that are not the eager ones, adapters without a gradient, systems that failed."""
    wrong = [f"{r['row']}, round {r['round']}: {r['failed']}" for r in records if "failed" in r]
    good = [record for record in records if "failed" not in record]
    reference = next((record["losses"] for record in good if record["row"] == REFERENCE), None)
    for record in good:
        if reference is not None:
            difference = max(relative_differences(record["losses"], reference))
            record["largest_relative_loss_difference"] = difference
            if difference > PARITY_LIMIT:
                wrong.append(f"{record['row']}: a loss differs from eager by {difference:.1e} (relative)")
        if not record["smallest_gradient_norm"] > 0:
            wrong.append(f"{record['row']}: an adapter gets no gradient")
    return wrong


def ops_rounds(rounds: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Records of the fused ops: each round all systems in turn. A peer that is not installed here has no records."""
    out, cache = folder / "ops.json", folder / "compiled-ops"
    for index in range(rounds):
        for system in OPS:
            found = process("bench.ops", [str(out), "--system", system], out, cache)
            for record in found if isinstance(found, list) else [{"row": "all", "system": system, **found}]:
                yield {"round": index, **record}


def write(kind: str, records: Sequence[dict[str, Any]]) -> None:
    """Writes bench/results/<kind>.jsonl; the first line tells of the machine."""
    RESULTS.mkdir(exist_ok=True)
    lines = [json.dumps({"machine": describe()}), *(json.dumps(record) for record in records)]
    (RESULTS / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")


def main() -> int:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("demo", "ops"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    options = parser.parse_args()
    if code := fetch.main():
        return code
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.only != "ops":
            records = []
            for record in demo_rounds(options.rounds, options.systems, folder):
                print(_line(record), file=sys.stderr, flush=True)
                records.append(record)
            wrong += check_demo(records)
            write("demo", records)
        if options.only != "demo":
            records = list(ops_rounds(options.rounds, folder))
            wrong += [f"ops in {r['system']}: {r['failed']}" for r in records if "failed" in r]
            write("ops", records)
    for line in wrong:
        print(f"FAILS  {line}", file=sys.stderr)
    return 1 if wrong else 0


def _line(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f"round {record['round']}  {record['row']}: {record['failed']}"
    return (
        f"round {record['round']}  {record['row']}: {record['step_seconds']:.2f} s/step, "
        f"{record['tokens_per_second']:.0f} tokens/s, {record['memory']['above'] / 2**30:.2f} GiB above the weights"
    )


if __name__ == "__main__":
    sys.exit(main())
