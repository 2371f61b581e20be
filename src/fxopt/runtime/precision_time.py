"""What a choice of dtypes is worth in time, predicted from a machine's rates for each dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fxopt.ir.program import Program
from fxopt.runtime.dry_run import Work
from fxopt.runtime.forecast import forward_work
from fxopt.runtime.machine import Machine, present


def predicted(program: Program, blocks: Iterable[str], machine: Machine | None = None) -> list[str]:
    """One sentence for each precision pass in a program's history: the forward's time before and after it at the sizes of the capture, by the
    dry runs and the calibration that plans use. Bytes moved count with products, so fewer bytes show too.

    Args:
        blocks: module paths of the repeated blocks, see `ir.regions.repeated_blocks`.
        machine: None: this one, measured at the first call.
    """
    stages, blocks = list(program.history()), list(blocks)
    lines = []
    for after, before in zip(stages, stages[1:]):
        if not after.log or after.log[-1].text.partition("(")[0] != "precision" or not after.log[-1].rewrites:
            continue
        machine = machine or present()
        was, now = (_total(stage, blocks) for stage in (before, after))
        seconds = machine.seconds(was), machine.seconds(now)
        change = f"{abs(seconds[0] - seconds[1]):.2g} s {'less' if seconds[1] <= seconds[0] else 'more'}"
        rates = ", ".join(f"{kind} {rate / 1e9:.3g} GFLOP/s" for kind, rate in machine.flops.items() if kind in {*was.flops, *now.flops})
        lines.append(f"{after.log[-1].text}: predicted time of a forward at the sizes of the capture {seconds[0]:.2g} s before, {seconds[1]:.2g} s after: {change} "
                     f"({rates or 'no products'}; bytes moved {_moved(was)} before, {_moved(now)} after)")
    return lines


def _total(program: Program, blocks: list[str]) -> Work:
    total = Work()
    for work in forward_work(program, blocks, _hint).values():
        total.add(work)
    return total


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _moved(work: Work) -> str:
    return f"{(work.moved + work.near) / 2**20:.3g} MiB"
