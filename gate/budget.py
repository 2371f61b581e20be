"""The committed cost of every kernel, and what may not get worse.

`budget.json`: release of Triton, then kernel (name, argument types, constants), then target, to
[registers, shared memory in bytes, spills, tensor-core instructions].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gate.build import Job

FILE = Path(__file__).parent / "budget.json"
# More registers than this part above the budget is a regression: fewer programs fit a processor.
REGISTERS = 0.10
# So many leave room for as many programs as a processor can hold anyway (64 warps of 65,536 registers; 8 of 512).
FREE = {"cuda": 32, "hip": 64}

Budget = dict[str, dict[str, list[int]]]


def read(release: str) -> Budget:
    """The budget of one release of Triton."""
    return json.loads(FILE.read_text()).get(release, {}) if FILE.exists() else {}


def write(release: str, budget: Budget) -> None:
    """Replace the budget of one release; a line per kernel."""
    whole = json.loads(FILE.read_text()) if FILE.exists() else {}
    whole[release] = budget
    parts = []
    for name, kernels in sorted(whole.items()):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(dict(sorted(value.items())))}" for key, value in sorted(kernels.items()))
        parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def faults(work: Job, found: dict[str, Any], budget: Budget | None) -> list[str]:
    """What is wrong with a compiled kernel: by itself, and (unless the budget is None) against the budget."""
    if "failed" in found:
        return [f"does not compile: {found['failed']}"]
    wrong = []
    if found["spills"]:
        wrong.append(f"{found['spills']} spills")
    if found["shared"] > work.target.shared:
        wrong.append(f"{found['shared']} bytes of shared memory, the device has {work.target.shared}")
    if found["narrow"] and not found["mma"]:
        wrong.append("tl.dot without tensor-core instructions")
    if budget is None:
        return wrong
    allowed = budget.get(work.key, {}).get(work.place)
    if allowed is None:
        return [*wrong, "not in gate/budget.json: run `make kernels UPDATE=1` and commit it"]
    registers, shared, _, mma = allowed
    if found["registers"] > max(registers * (1 + REGISTERS), FREE[work.target.backend]):
        wrong.append(f"{found['registers']} registers, the budget has {registers}")
    if found["shared"] > shared:
        wrong.append(f"{found['shared']} bytes of shared memory, the budget has {shared}")
    if mma and not found["mma"]:
        wrong.append(f"no tensor-core instructions, the budget has {mma}")
    return wrong


def stale(jobs: list[Job], budget: Budget) -> list[str]:
    """Kernels of the budget that no launch starts any more."""
    return sorted(set(budget) - {work.key for work in jobs})


def entry(found: dict[str, Any]) -> list[int]:
    """What the budget keeps of `gate.build.Resources`."""
    return [found[name] for name in ("registers", "shared", "spills", "mma")]
