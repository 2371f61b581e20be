"""Every fused op of the catalog against its reference, eager and under torch.compile; one process per system.

    python -m bench.ops OUT --system fxopt|eager|compile --rounds N

The calls are the `rows()` of each op's cases.py: shapes of SmolLM2-135M on 1,024 tokens, fp32; each round is forward and
backward of every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
import gc
import importlib
import json
from pathlib import Path
import time
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.in_place import InPlaceOp
from fxopt.kernels.op import Case, FusedOp
from fxopt.runtime.memory import peak_bytes, reset_peak, resident_bytes

WARMUP = 2


@dataclass(frozen=True)
class Row:
    """One call to measure."""

    op: FusedOp
    label: str
    case: Case


def rows() -> Iterator[Row]:
    """The rows of every op of the catalog."""
    for op in CATALOG:
        for label, case in importlib.import_module(f"{op.folder}.cases").rows():
            yield Row(op, f"{op.name} {label}".strip(), case)


def step(call: Callable[..., Any], row: Row) -> tuple[float, list[Tensor], list[Tensor]]:
    """Seconds of one forward and backward, the outputs and the gradients."""
    args = [
        arg.detach().requires_grad_(True) if place in row.case.grads else arg for place, arg in enumerate(row.case.args)
    ]
    torch.manual_seed(1)
    given, in_place = row.case.packed(args), isinstance(call, InPlaceOp)
    if in_place:  # Nobody copies what an optimizer writes.
        given = call.copies(given)
    start = time.perf_counter()
    results = call.overload(*given) if in_place else call(*given)
    forward = time.perf_counter() - start
    outputs = [out for out in (call.results(given) if in_place else results) if isinstance(out, Tensor)]
    upstream = [torch.randn(out.shape, dtype=out.dtype) for out in outputs]  # The same for any strides.
    start = time.perf_counter()
    if row.case.grads:
        torch.autograd.backward(outputs, upstream)
    seconds = forward + time.perf_counter() - start
    return seconds, [out.detach() for out in outputs], [args[place].grad for place in row.case.grads]


def measure(row: Row, system: str, rounds: int) -> dict[str, Any]:
    """The seconds of each round after warm-up, peak memory above the arguments, and the parity with eager."""
    reference = row.op.reference
    calls = {"fxopt": row.op, "eager": reference, "compile": torch.compile(reference)}
    call = calls[system]
    first, outputs, grads = step(call, row)
    if system != "eager":
        _, wanted, wanted_grads = step(reference, row)
        pairs = list(zip([*outputs, *grads], [*wanted, *wanted_grads], strict=True))
        error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        del wanted, wanted_grads, pairs
    else:
        error = 0.0
    norms = [float(grad.norm()) for grad in grads]
    del outputs, grads
    for _ in range(WARMUP):
        step(call, row)
    gc.collect()
    reset_peak()
    before = resident_bytes() or 0
    seconds = [step(call, row)[0] for _ in range(rounds)]
    if error > 1e-4 or not all(norm > 0 for norm in norms):
        raise SystemExit(f"{row.label} in {system}: relative error {error:.1e}, gradient norms {norms}")
    return {
        "row": row.label,
        "system": system,
        "seconds": seconds,
        "first_call_seconds": first,
        "above": peak_bytes() - before,
        "relative_error": error,
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--system", choices=("fxopt", "eager", "compile"), required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    records = [measure(row, options.system, options.rounds) for row in rows()]
    options.out.write_text(json.dumps(records) + "\n")


if __name__ == "__main__":
    main()
