"""Every operator of torch's database as a program of one node: captured, through the whole pipeline, forward and backward."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from house import ROOT
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError, FxoptError
from fxopt.ir.capture import Call, capture
from fxopt.passes.cases import Case
from fxopt.passes.certify import Certifier
from fxopt.passes.pipeline import applied, run
from fxopt.runtime import selfcheck

PASSES = "canonicalize | causal | fuse | loss | compact | remat | dead_code"
_SEEDS = """The database calls operators that draw random numbers under a seed which the call itself sets. A graph has no such statement, so the check of a
capture finds other numbers, and refuses them: those are the refusals "is not equal to the model" (and `empty_like`, whose values are none)."""
OPERATORS = [op for op in op_db if torch.float32 in op.dtypes]


@dataclass(frozen=True)
class Outcome:
    """What came of an operator: "equal", "refused" (with the reason), "no sample", or "wrong" (with what is wrong)."""

    what: str
    says: str = ""


class One(nn.Module):
    """One call of an operator, on tensors among its arguments."""

    def __init__(self, op: OpInfo, spec: pytree.TreeSpec, leaves: list[Any]) -> None:
        super().__init__()
        self.op, self.spec, self.leaves = op.op, spec, leaves

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves], self.spec)
        return self.op(*args, **kwargs)


def samples(op: OpInfo) -> Iterator[tuple[pytree.TreeSpec, list[Any]]]:
    """Its sample calls, with gradients where it has a derivative."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd):
            leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if tensors and all(leaf.layout is torch.strided for leaf in tensors):
                yield spec, leaves


def outcome(op: OpInfo) -> Outcome:
    """Try an operator's first sample call of a size above 1."""
    torch.manual_seed(0)
    try:
        found = list(zip(range(6), samples(op)))
    except Exception as error:  # the database's own: it wants a GPU, or a package
        return Outcome("no sample", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:100])
    if not found:
        return Outcome("no sample", "no call takes a strided tensor")
    spec, leaves = max((pair for _, pair in found), key=lambda pair: min(leaf.numel() for leaf in pair[1] if isinstance(leaf, torch.Tensor)))
    tensors = tuple(leaf.detach().clone().contiguous().requires_grad_(leaf.requires_grad) for leaf in leaves if isinstance(leaf, torch.Tensor))
    model, call = One(op, spec, leaves), Call.of(tensors, {})
    try:
        program = capture(model, call)
        expected, got = (selfcheck.step(model, lambda given, fn=fn: fn(given), tensors, 0) for fn in (lambda given: model(*given), lambda given: program.run(given, {})))
        selfcheck.compare(model, expected, got, "the captured operator")
    except CaptureError as error:
        return Outcome("refused", error.what[:160])
    except Exception as error:
        return Outcome("refused" if isinstance(error, FxoptError) else "untyped", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160])
    try:
        after = run(PASSES, program)
        certifier = Certifier([Case("given", tensors)], {})
        history = list(reversed(list(after.history())))
        stages = [certifier.stage(pass_, a, b) for pass_, a, b in zip(applied(after), history, history[1:])]
    except FxoptError as error:
        return Outcome("refused", error.what[:160])
    except Exception as error:
        return Outcome("untyped", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160])
    wrong = [problem for stage in stages for problem in stage.problems]
    return Outcome("wrong", wrong[0]) if wrong else Outcome("equal")


def name_of(op: OpInfo) -> str:
    """`linalg.norm`, with its variant."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def main() -> int:
    """Try all, write docs/operators.md; the exit code says whether anything was wrong."""
    found = {}
    for op in OPERATORS:
        found[name_of(op)] = outcome(op)
        if found[name_of(op)].what not in ("equal", "refused"):
            print(f"{found[name_of(op)].what:9} {name_of(op)}: {found[name_of(op)].says}", flush=True)
    counts = Counter(each.what for each in found.values())
    lines = ["# Operators", "", "Every operator of torch's own test database that takes fp32 on a CPU, as a program of one node: captured, compared with eager, through",
             f"`{PASSES}`, forward and backward, each pass application certified. `make fuzz-ops` writes this page.", "", _SEEDS, "",
             ", ".join(f"**{number} {what}**" for what, number in counts.most_common()) + f", of {len(found)}.", "", "| operator | outcome | reason |", "|---|---|---|"]
    lines += [f"| {name} | {each.what} | {each.says.replace('|', '/')} |" for name, each in sorted(found.items()) if each.what != "equal"]
    (ROOT / "docs/operators.md").write_text("\n".join(lines) + "\n")
    print(dict(counts))
    return 1 if counts["wrong"] or counts["untyped"] else 0
