"""Every fused op of the catalog against its reference, eager and under torch.compile, and against other libraries' kernels.

    python -m bench.ops OUT --system fxopt|eager|compile|bitsandbytes|... [--rounds N] [--device cuda] [--dtype bfloat16] [--only OP]

One process per system. The calls are the `rows()` of each op's cases.py: shapes of SmolLM2-135M on 1,024 tokens; each round is
forward and backward of every row. fxopt's are timed as a region of a program runs them: its forward graph, then its backward graph.
A peer that is not installed, or cannot do a row as it is given, has no record of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
from dataclasses import dataclass, replace
import gc
import importlib
import json
from pathlib import Path
import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import PEERS
from bench.traffic import Traffic, kept, least
from fxopt.ir.capture import Call, capture
from fxopt.ir.partition import save_all
from fxopt.ir.regions import cut
from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.in_place import InPlaceOp
from fxopt.kernels.op import Case, FusedOp
from fxopt.runtime.memory import peak_bytes, reset_peak, resident_bytes
from fxopt.runtime.region import RegionRunner

WARMUP = 2
SYSTEMS = ("fxopt", "eager", "compile", *PEERS)


@dataclass(frozen=True)
class Row:
    """One call to measure."""

    op: FusedOp
    label: str
    case: Case


@dataclass
class Step:
    """One forward and backward: what came out, what was kept between them, and the seconds of each."""

    outputs: list[Tensor]
    grads: list[Tensor]
    saved: list[Any]
    seconds: list[float]


def rows(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """The rows of every op of the catalog."""
    for op in CATALOG:
        for label, case in importlib.import_module(f"{op.folder}.cases").rows():
            args = tuple(_moved(arg, device, torch.float32 if place in case.fixed else dtype) for place, arg in enumerate(case.args))
            yield Row(op, f"{op.name} {label}".strip(), replace(case, args=args))


def _moved(arg: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(arg, torch.dtype):
        return dtype
    return arg.to(device, dtype if arg.dtype == torch.float32 else arg.dtype) if isinstance(arg, Tensor) else arg


@contextlib.contextmanager
def timed(seconds: list[float], device: torch.device) -> Iterator[None]:
    """Appends how long the block took, the work that it gave to a CUDA device included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    seconds.append(time.perf_counter() - start)


def upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for each output, the same in every system whatever the strides."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator).to(out) for out in outputs]


def under_autograd(function: Callable[..., Any], row: Row, device: torch.device) -> Callable[[], Step]:
    """Steps of a function as a program without fxopt runs it."""

    def step() -> Step:
        case = row.case
        args = [arg.detach().requires_grad_(place in case.grads) if isinstance(arg, Tensor) else arg for place, arg in enumerate(case.args)]
        given = row.op.copies(case.packed(args)) if isinstance(row.op, InPlaceOp) else case.packed(args)
        seconds: list[float] = []
        saved: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), timed(seconds, device):
            results = function(*given)
        outputs = [out for out in results if isinstance(out, Tensor) and out.requires_grad == bool(case.grads)]
        pulls = upstream(outputs)
        with timed(seconds, device):
            if case.grads:
                torch.autograd.backward(outputs, pulls)
        return Step([out.detach() for out in outputs], [args[place].grad for place in case.grads], saved, seconds)

    return step


class _Alone(nn.Module):
    """A program of one node."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        return self.row.op(*self.row.case.packed([next(given) if isinstance(arg, Tensor) else arg for arg in self.row.case.args]))


def in_region(row: Row, device: torch.device) -> Callable[[], Step]:
    """Steps of the op as a region of a program runs it: a forward and a backward graph of nodes."""
    case = row.case
    places = [place for place, arg in enumerate(case.args) if isinstance(arg, Tensor)]
    tensors = [case.args[place].detach().requires_grad_(place in case.grads) for place in places]
    program = capture(_Alone(row), Call.of(tuple(tensors), {}), exact=True)
    (region,) = cut(program, ()).regions
    inputs = [[node.name for node in program.placeholders].index(name) for name in region.inputs]
    mask = tuple(tensors[place].requires_grad for place in inputs)
    plan = RegionRunner(region, program.fake_mode).compile(mask, None, save_all).split

    def step() -> Step:
        seconds: list[float] = []
        with torch.no_grad():
            with timed(seconds, device):
                results = plan.forward(*(tensors[place] for place in inputs))
            outputs, saved = [results[index] for index in plan.tangents], results[plan.n_outputs :]
            pulls = upstream(outputs)
            with timed(seconds, device):
                found = plan.backward(*saved, *pulls)
        grads = {places[inputs[index]]: grad for index, grad in zip(plan.wanted, found, strict=True)}
        return Step(outputs, [grads[place] for place in case.grads], list(saved), seconds)

    return step


def system_of(name: str, row: Row, device: torch.device) -> Callable[[], Step] | None:
    """What a system runs for a row, or None if it has nothing for it."""
    if name == "eager":
        return under_autograd(row.op.reference, row, device)
    if name == "compile":
        return under_autograd(torch.compile(row.op.reference), row, device)
    if name != "fxopt":
        call = PEERS[name](row.op.name, row.case, row.case.packed())
        return None if call is None else under_autograd(call, row, device)
    if row.case.grads:
        return in_region(row, device)

    def alone(*given: Any) -> tuple[Tensor, ...]:
        if not isinstance(row.op, InPlaceOp):
            return row.op(*given)
        row.op.overload(*given)
        return tuple(row.op.results(given))

    return under_autograd(alone, row, device)


def measure(row: Row, system: str, rounds: int, device: torch.device) -> dict[str, Any] | None:
    """A record: the seconds of each round after warm-up, bytes, and the parity with eager."""
    step = system_of(system, row, device)
    if step is None:
        return None
    first = step()
    eager = under_autograd(row.op.reference, row, device)()
    error = max(float((a - b).norm() / b.norm()) for a, b in zip([*first.outputs, *first.grads], [*eager.outputs, *eager.grads], strict=True))
    norms = [float(grad.norm()) for grad in first.grads]
    if error > (1e-4 if row.case.args[0].dtype == torch.float32 else 2e-2) or not all(norm > 0 for norm in norms):
        raise SystemExit(f"{row.label} in {system}: relative error {error:.1e}, gradient norms {norms}")
    record = {"row": row.label, "system": system, "first_call_seconds": sum(first.seconds), "relative_error": error}
    args = [arg for arg in row.case.args if isinstance(arg, Tensor)]
    record["kept"] = kept(first.saved, [*args, *first.outputs])
    if system == "fxopt":
        record["least"] = least(args, first.outputs, first.saved, first.grads, "embedding" in row.op.name)
    if system in ("fxopt", "eager") and device.type == "cpu":
        with Traffic() as traffic:
            step()
        record["moved"] = traffic.moved
    del first, eager
    for _ in range(WARMUP):
        step()
    gc.collect()
    reset_peak(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes() or 0
    record["seconds"] = [sum(step().seconds) for _ in range(rounds)]
    record["above"] = peak_bytes(device) - before
    return record


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--only", help="rows whose label begins so")
    options = parser.parse_args()
    wanted = (row for row in rows(options.device, getattr(torch, options.dtype)) if row.label.startswith(options.only or ""))
    records = [record for row in wanted if (record := measure(row, options.system, options.rounds, options.device)) is not None]
    options.out.write_text(json.dumps(records) + "\n")


if __name__ == "__main__":
    main()
