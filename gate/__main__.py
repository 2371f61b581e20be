"""Every kernel that the rows of the catalog start, in fp32, bf16 and fp16, for every target.

    python -m gate [--other] [--update] [--only OP ...] [--jobs N]

fp32 and bf16 are compiled for all targets, fp16 (bf16 but for conversions) for sm_90. `--other`, for a second release of
Triton: bf16 for all targets, fp32 for the two with the least shared memory.

Fails on: a kernel that does not compile, spills, wants more shared memory than the device has, multiplies 16-bit matrices
without tensor cores, writes to memory of the caller, needs more than the budget, or is not in the budget. `--update` writes
the budget of the Triton that runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
import triton

from fxopt.kernels.launch import TARGETS, Target
from gate import budget
from gate.build import Job, build, job, written
from gate.record import Launch, cast, launches, rows, with_kernels, without_kernels

AMPERE, HOPPER, BLACKWELL, MI300 = TARGETS
PLAN = {torch.float32: TARGETS, torch.bfloat16: TARGETS, torch.float16: (HOPPER,)}
OTHER = {torch.float32: (AMPERE, MI300), torch.bfloat16: TARGETS}


def recorded(only: list[str], plan: dict[torch.dtype, tuple[Target, ...]]) -> Iterator[tuple[str, Target, Launch]]:
    """(op and row, target, launch) of everything to compile."""
    for op in with_kernels():
        if only and op.name not in only:
            continue
        for label, case in rows(op):
            for dtype, targets in plan.items():
                for target in targets:
                    for launch in launches(op, cast(case, dtype), target):
                        yield f"{op.name} {label}".strip(), target, launch


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", action="store_true", help="the plan of the second release of Triton")
    parser.add_argument("--update", action="store_true", help="write gate/budget.json")
    parser.add_argument("--only", nargs="*", default=[], metavar="OP", help="these ops; the budget is not searched for others")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()

    jobs: dict[tuple[str, str], Job] = {}
    used: dict[str, set[str]] = {}
    failures: list[str] = []
    for label, target, launch in recorded(options.only, OTHER if options.other else PLAN):
        work = job(launch, target)
        if work.key not in used and (bad := written(launch, target) & launch.inputs):
            failures.append(f"{work.key} ({label}): writes to the caller's {', '.join(sorted(bad))}")
        used.setdefault(work.key, set()).add(label)
        jobs.setdefault((work.key, work.place), work)

    allowed = budget.read(triton.__version__)
    found: budget.Budget = {}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for work, result in zip(jobs.values(), pool.map(build, jobs.values()), strict=True):
            for fault in budget.faults(work, result, None if options.update else allowed):
                failures.append(f"{work.place} {work.key} ({', '.join(sorted(used[work.key]))}): {fault}")
            if "failed" not in result:
                found.setdefault(work.key, {})[work.place] = budget.entry(result)
    if options.update:
        kept = allowed if options.only else {}
        budget.write(triton.__version__, kept | found)
    elif not options.only:
        failures += [f"{key}: in the budget, but no row starts it; run `make kernels UPDATE=1`" for key in budget.stale(list(jobs.values()), allowed)]

    for line in failures:
        print(line)
    print(f"torch's own kernels, nothing to compile: {', '.join(op.name for op in without_kernels())}")
    places = sorted({place for _, place in jobs})
    most = {place: max((values[place] for values in found.values() if place in values), default=[0, 0]) for place in places}
    print(f"Triton {triton.__version__}: {len(used)} kernels of {len(with_kernels())} ops, {len(jobs)} compiled in {time.perf_counter() - start:.0f} s; "
          f"most registers " + ", ".join(f"{place} {values[0]}" for place, values in most.items()) + f"; {len(failures)} failures")  # fmt: skip
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
