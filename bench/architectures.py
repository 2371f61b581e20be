"""Which fused ops fire on which architectures, and whether the training step stays the same.

    python -m bench.architectures [--only NAME ...]

Optimizes a tiny model of each architecture with the preset `exact`, in fp32, in bf16 and under autocast, and compares an
fp32 training step with the model's own. Writes docs/architectures.md (with --only: prints). Exit code 1 when a loss or a
gradient differs, or when more ops fired than there are places.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import fxopt
from bench.configurations import ARCHITECTURES, LAYERS, VOCABULARY, WIDTH
from bench.machine import describe
from bench.sites import KINDS, Sites, count
from fxopt.errors import FxoptError
from fxopt.ir import meta
from fxopt.ir.program import Program
from fxopt.kernels import tolerance
from fxopt.passes.fuse import rules

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
OPS = {"rms_norm": "RMSNorm", "add_rms_norm": "RMSNorm", "layer_norm": "LayerNorm", "add_layer_norm": "LayerNorm", "swiglu": "gated MLP",
       "geglu": "gated MLP", "rope": "RoPE", "linear_cross_entropy": "loss", "cross_entropy": "loss"}
"""The kind of place that each op fills."""
MODES = ("fp32", "bf16", "autocast")


@dataclass
class Result:
    """One architecture in one mode.

    Attributes:
        sites: places, by kind and module path.
        fired: ops, by kind and module path.
        reasons: for each kind with more places than ops, why, and at how many places.
        loss: relative error of the loss against the model's own; None if it was not compared.
        gradient: the largest relative error of any gradient (Frobenius norm), with its parameter's name.
        gradients: how many were compared.
        seconds: processor time of capture, passes and lowering; for the first model, and for another of its kind.
        failed: why the model could not be optimized.
    """

    sites: Sites
    fired: Sites = field(default_factory=dict)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    loss: float | None = None
    gradient: tuple[float, str] | None = None
    gradients: int = 0
    seconds: tuple[float, ...] = ()
    failed: str | None = None

    def k_of_n(self, kind: str) -> tuple[int, int]:
        """Ops that fired, and places."""
        return sum(self.fired.get(kind, {}).values()), sum(self.sites[kind].values())

    def impossible(self) -> list[str]:
        """Modules in which more ops fired than were counted as places: the count is wrong."""
        return [f"{kind} in {path or 'the root'}" for kind in KINDS if kind != "loss" for path, number in self.fired.get(kind, {}).items()
                if number > self.sites[kind][path]]


def examine(name: str, mode: str = "fp32", values: bool = True) -> Result:
    """Optimize one architecture in one mode; with `values`, compare a training step."""
    architecture = ARCHITECTURES[name]
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    model, inputs = architecture.build(dtype), architecture.inputs(dtype)
    original = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        result = Result(count(copy.deepcopy(model), inputs))
        try:
            optimized, first = _timed(model, inputs)
        except FxoptError as error:
            result.failed = str(error).splitlines()[0]
            return result
        program = optimized.program
        result.seconds = (first, _timed(architecture.build(dtype), inputs)[1]) if values else (first,)
        result.fired = fired(program)
        result.reasons = reasons(program, result)
        if values:
            _compare(original, optimized, inputs, result)
    return result


def _timed(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[fxopt.Optimized, float]:
    start = time.process_time()
    optimized = fxopt.optimize(model, inputs=inputs, check=False)
    return optimized, time.process_time() - start


def fired(program: Program) -> Sites:
    """The fused ops of a program by kind and module path; a rotation counts once for each tensor that it turns."""
    found: Sites = {kind: Counter() for kind in KINDS}
    for node in program.nodes:
        namespace, _, rest = str(node.target).partition(".")
        name = rest.partition(".")[0]
        if node.op == "call_function" and namespace == "fxopt" and name in OPS:
            found[OPS[name]][meta.provenance(node).path] += sum(x is not None for x in node.args[:2]) if name == "rope" else 1
    return found


def reasons(program: Program, result: Result) -> dict[str, Counter[str]]:
    """Why places are not filled, in the words of the passes' reports."""
    said: dict[str, Counter[str]] = {}
    for kind in KINDS:
        misses = [miss for record in program.log for miss in record.misses if record.text.startswith("loss" if kind == "loss" else "fuse")]
        if kind == "loss":
            k, n = result.k_of_n(kind)
            left = {"": n - k} if k < n else {}
        else:
            left = {path: n - result.fired[kind][path] for path, n in result.sites[kind].items() if n > result.fired[kind][path]}
        for path, places in left.items():
            near = [miss for miss in misses if path == "" or miss.path == path or miss.path.startswith(f"{path}.")]
            own = [miss for miss in near if OPS.get(miss.rule.partition(".")[0]) == kind]
            words = [f"{miss.rule.partition(' (')[0]}: {miss.reason}" for miss in own or near] or ["no operators there are near to a pattern"]
            said.setdefault(kind, Counter())[words[0]] += places
    return said


def _compare(original: nn.Module, optimized: nn.Module, inputs: Mapping[str, Any], result: Result) -> None:
    """One step each, on equal weights: the loss and the gradient of every parameter."""
    losses = []
    for model in (original, optimized):
        torch.manual_seed(0)  # noise that a router or a dropout draws
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach().double())
    result.loss = float((losses[0] - losses[1]).abs() / losses[0].abs())
    wanted = {name: parameter.grad for name, parameter in original.named_parameters()}
    got = {name: parameter.grad for name, parameter in optimized.named_parameters()}
    floor = tolerance.SELF_CHECK_FLOOR * max(float(grad.norm()) for grad in wanted.values() if grad is not None)
    errors = {}
    for name, grad in wanted.items():
        if (grad is None) != (got[name] is None):
            errors[name] = float("inf")
        elif grad is not None:
            errors[name] = float((grad.double() - got[name].double()).norm()) / max(float(grad.double().norm()), floor)
    worst = max(errors, key=errors.__getitem__)
    result.gradient, result.gradients = (errors[worst], worst), len(errors)


def wrong(name: str, result: Result) -> list[str]:
    """What must not be: other numbers than the model's own, or ops where no place was counted."""
    found = [f"{name}: more ops than places: {place}" for place in result.impossible()]
    if result.failed is None and result.loss is not None and result.gradient is not None:
        allowed = tolerance.SELF_CHECK[torch.float32]
        if not result.loss <= allowed:
            found.append(f"{name}: the loss differs by {result.loss:.1e}")
        if not result.gradient[0] <= allowed:
            found.append(f"{name}: the gradient of {result.gradient[1]} differs by {result.gradient[0]:.1e}")
    return found


# -- the page --------------------------------------------------------------------------------------------------------


def page(results: Mapping[str, Mapping[str, Result]]) -> str:
    """docs/architectures.md."""
    machine = describe()
    full = [kind for kind in KINDS if kind != "loss"]
    everywhere = [name for name, modes in results.items() if all(k == n for r in modes.values() for kind in full for k, n in [r.k_of_n(kind)])]
    lines = [
        "# Architectures",
        "",
        "Made by `python -m bench.architectures`; do not edit.",
        "",
        f"Tiny models from configurations of transformers {machine['versions']['transformers']} ({LAYERS} layers, width {WIDTH}, vocabulary {VOCABULARY}), "
        f"one training step with a loss, `fxopt.optimize(model)`: its fused ops that fired, k, of the places where one could stand, n. Places are counted "
        "while the model's own Python code runs (`bench/sites.py`), without looking at graphs. A rotation counts once for each tensor that it turns. Where "
        "bf16 weights, or fp32 weights under bf16 autocast, give other numbers than fp32, they follow in parentheses.",
        "",
        "Errors are those of an fp32 step against the model's own, relative: of the loss, and the largest of all gradients (Frobenius norm; gradients "
        f"below {tolerance.SELF_CHECK_FLOOR:g} of the largest are measured against that). Times are processor seconds of capture, passes and lowering on one "
        f"thread of {machine['cpu']}, torch {machine['versions']['torch']}, {machine['date']}: for the first model of a process that has the types of its "
        "tensors (patterns are then traced for them), and for another one.",
        "",
        f"k = n for norms, gated MLPs and RoPE, in all modes, on {len(everywhere)} of {len(results)}.",
        "",
        f"| architecture | captured | {' | '.join(KINDS)} | loss error | gradient error | gradients | first s | another s |",
        f"| --- | --- | {' | '.join('---:' for _ in KINDS)} | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_row(name, modes) for name, modes in results.items()]
    why = _reasons(results)
    lines += ["", "## Where k is less than n", "", *(why or ["Nowhere."]), ""]
    return "\n".join(lines)


def _row(name: str, modes: Mapping[str, Result]) -> str:
    first = modes[MODES[0]]
    cells = [name, "whole" if first.failed is None else "no"]
    for kind in KINDS:
        shown = {mode: "{}/{}".format(*result.k_of_n(kind)) for mode, result in modes.items()}
        others = [f"{mode} {text}" for mode, text in shown.items() if text != shown[MODES[0]]]
        cells.append("-" if shown[MODES[0]] == "0/0" and not others else shown[MODES[0]] + (f" ({', '.join(others)})" if others else ""))
    if first.failed is None and first.gradient is not None:
        cells += [f"{first.loss:.0e}", f"{first.gradient[0]:.0e}", str(first.gradients), *(f"{seconds:.1f}" for seconds in first.seconds)]
    else:
        cells += ["-"] * 5
    return f"| {' | '.join(cells)} |"


def _reasons(results: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """One line for each reason: where, how often, in which modes."""
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for name, modes in results.items():
        for mode, result in modes.items():
            if result.failed is not None:
                found.setdefault((name, "not captured", result.failed), {})[mode] = 1
            for kind, counts in result.reasons.items():
                for reason, places in counts.items():
                    found.setdefault((name, kind, reason), {})[mode] = places
    return [f"- {name}, {kind}, {', '.join(f'{places} in {mode}' for mode, places in at.items())}: {reason}" for (name, kind, reason), at in found.items()]


def run(names: Iterable[str], modes: Sequence[str] = MODES) -> dict[str, dict[str, Result]]:
    """Examine architectures in all modes; says each as it is done."""
    rules()  # the patterns are traced once per process: not a cost of the first model
    results: dict[str, dict[str, Result]] = {}
    for name in names:
        results[name] = {mode: examine(name, mode, values=mode == MODES[0]) for mode in modes}
        print(_row(name, results[name]), file=sys.stderr, flush=True)
    return results


def main() -> int:
    """Reads the command line, examines, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=None, metavar="NAME", help=", ".join(ARCHITECTURES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = run(options.only or ARCHITECTURES, options.modes)
    text = page(results)
    if options.only or tuple(options.modes) != MODES:
        print(text)
    else:
        PAGE.write_text(text)
    complaints = [line for name, modes in results.items() for result in modes.values() for line in wrong(name, result)]
    for line in complaints:
        print(f"FAILS  {line}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
