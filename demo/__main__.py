"""`make demo`: trains with fxopt and with its peers, one process each, and shows what each claim rests on.

    python -m demo [--steps N] [--batch N] [--keep FOLDER]

Exit code: 0, 1 if a claim fails, 3 if a package is missing and cannot be fetched.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

from demo import assets, fetch, table
from demo.plan import Plan


def process(module: str, out: Path, *arguments: str) -> dict[str, Any]:
    """Runs a module of the demo in a process of its own and returns the record that it wrote."""
    out.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode or not out.exists():
        raise SystemExit(f"{' '.join(command[4:])} ended with code {done.returncode}")
    return json.loads(out.read_text())


def main() -> int:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--batch", type=int, default=Plan.batch)
    parser.add_argument("--keep", type=Path, default=assets.cache_folder() / "demo", help="where the run's files go")
    options = parser.parse_args()
    if code := fetch.main():
        return code
    started = time.perf_counter()
    plan = Plan(str(options.keep), steps=options.steps, batch=options.batch)
    folder, file = options.keep, str(plan.save())
    table.introduce(plan)
    ours = process("demo.ours", folder / "ours.json", file, str(folder / "ours.json"))
    peers = [
        process("demo.peer", folder / f"{base}.json", file, str(folder / f"{base}.json"), "--base", base)
        for base in ("nf4", "dense")
    ]
    check = folder / "verify.json"
    adapter, logits = ours["adapter"], str(folder / "logits.safetensors")
    verified = process("demo.peer", check, file, str(check), "--verify", adapter, logits)
    return table.show(plan, ours, peers, verified, time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
