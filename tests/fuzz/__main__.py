"""`python -m fuzz N [FIRST]`: N random programs; failures are made smaller and written to tests/regressions/. `python -m fuzz ops`: torch's operators."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from fuzz.minimize import nodes, smaller
from fuzz.run import Counts, Failure, check, plan_of

REGRESSIONS = Path(__file__).resolve().parent.parent / "regressions"


def programs(count: int, first: int = 0) -> int:
    """Run programs number `first` to `first + count`; returns how many failed."""
    counts, failed, start = Counts(), [], time.process_time()
    for seed in range(first, first + count):
        plan = plan_of(seed)
        try:
            check(plan, counts)
        except Failure as failure:
            small = smaller(plan)
            failed.append(seed)
            (REGRESSIONS / f"{seed}.json").write_text(small.json())
            print(f"program {seed} fails, {nodes(small)} operations: {failure}", flush=True)
        if (seed - first) % 100 == 99:
            print(f"{seed - first + 1} programs, {time.process_time() - start:.0f} s, {counts.applications} applications, {counts.changed} changed something", flush=True)
    print(f"{counts.programs} programs, {counts.applications} pass applications, {counts.changed} changed something and were certified ({counts.unproven} of them unproven), {len(failed)} programs failed, "
          f"{time.process_time() - start:.0f} s of one core")
    for reason, number in counts.refused.most_common():
        print(f"  refused {number} times: {reason}")
    return len(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["ops"]:
        from fuzz.operators import main

        sys.exit(main())
    sys.exit(1 if programs(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, int(sys.argv[2]) if len(sys.argv) > 2 else 0) else 0)
