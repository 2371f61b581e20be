"""docs/architectures.md, from the results that are kept in bench/results/zoo.jsonl."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from bench.machine import describe
from fxopt.kernels import tolerance
from tests.zoo.examine import MODES, Result
from tests.zoo.sites import KINDS
from tests.zoo.table import ZOO

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE, RESULTS = ROOT / "docs" / "architectures.md", ROOT / "bench" / "results" / "zoo.jsonl"
FULL = [kind for kind in KINDS if kind != "loss"]


def kept() -> dict[str, Result]:
    """The results of the last runs, by name."""
    if not RESULTS.is_file():
        return {}
    found = [Result(**json.loads(line)) for line in RESULTS.read_text().splitlines()]
    return {result.name: result for result in found}


def keep(results: Mapping[str, Result]) -> None:
    """Write the results of all entries that there are, in the order of the table."""
    RESULTS.write_text("".join(json.dumps(dataclasses.asdict(results[name])) + "\n" for name in ZOO if name in results))


def summary(results: Mapping[str, Result]) -> list[str]:
    """How far the zoo is from its goals, a line each."""
    n = len(results)
    whole = [r for r in results.values() if r.captured == "whole"]
    parts = [r for r in results.values() if r.captured == "in parts"]
    right = [r for r in results.values() if r.captured != "refused" and not r.wrong]
    adapted = [r for r in results.values() if r.adapters is not None and "adapted" in r.errors]
    wrong = [r for r in results.values() if r.wrong]
    found = [f"{len(right)} of {n} train correctly ({len(right) / max(n, 1):.1%}; goal 100%), {len(adapted)} of them also with adapters.",
             f"{len(whole)} of {n} are captured whole ({len(whole) / max(n, 1):.1%}; goal 90%), {len(parts)} in parts, {n - len(whole) - len(parts)} refused.",
             f"Wrong results: {len(wrong)}{': ' + ', '.join(r.name for r in wrong) if wrong else ''}."]
    if n < len(ZOO):
        found.append(f"{len(ZOO) - n} of the zoo's {len(ZOO)} entries have no result yet: " + ", ".join(name for name in ZOO if name not in results) + ".")
    if whole:
        times = sorted(r.seconds for r in whole)
        found.append(f"`optimize` with its check takes {times[len(times) // 2]:.1f} s of processor time in the median, at most {times[-1]:.1f} s.")
    if parts:
        found.append(f"Of those in parts, graphs hold at least {min(r.parameters for r in parts):.0%} of the parameters and {min(r.flops for r in parts):.0%} of "
                     f"the operations of matrix products, in the mean {_mean([r.parameters for r in parts]):.0%} and {_mean([r.flops for r in parts]):.0%}.")
    return found


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def page(results: Mapping[str, Result]) -> str:
    """The document."""
    machine = describe()
    filled = [r for r in results.values() if r.fired and all(k >= n for counts in r.fired.values() for kind, (k, n) in counts.items() if kind != "loss")]
    placed = [r for r in results.values() if any(n for counts in r.fired.values() for kind, (_, n) in counts.items() if kind != "loss")]
    lines = [
        "# Architectures",
        "",
        "Made by `make zoo`; do not edit.",
        "",
        f"{len(results)} tiny models with random weights: configurations of transformers {machine['versions']['transformers']} and plain PyTorch (`tests/zoo/`). "
        "Each trains one step of two batch sizes and lengths in training mode, twice: with `fxopt.presets.exact()` against a deep copy of the model in eager "
        "code, and with `fxopt.presets.finetune(rank=4)` and random adapters against eager code whose dense weights are W + scale * B A, and whose gradients give "
        "those of A and B by the chain rule.",
        "",
        *(f"* {line}" for line in summary(results)),
        f"* Where a norm, gated MLP or rotation could be fused, all are, in every mode that was counted, on {len([r for r in filled if r in placed])} of {len(placed)} "
        f"({', '.join(f'{sum(mode in r.fired for r in placed)} in {mode}' for mode in MODES)}).",
        "",
        "Errors are relative: of the loss, and the largest of any gradient or buffer (Frobenius norm; gradients below "
        f"{tolerance.SELF_CHECK_FLOOR:g} of the largest are measured against that), over both steps; more than {tolerance.SELF_CHECK_RESPONSE:g} times what one "
        f"rounding of the parameters does is wrong. Fused ops are counted as k of n places where one could stand; places are counted while the model's own Python "
        "code runs (`tests/zoo/sites.py`), without looking at graphs, and a rotation counts once for each tensor that it turns. Where bf16 weights, or fp32 "
        f"weights under bf16 autocast, give other numbers, they follow in parentheses. Seconds are processor time of `optimize`, check included, on one thread of {machine['cpu']}, "
        f"torch {machine['versions']['torch']}, {machine['date']}.",
    ]
    for family in dict.fromkeys(r.family for r in results.values()):
        lines += ["", f"## {family[0].upper()}{family[1:]}", "",
                  f"| architecture | captured | {' | '.join(KINDS)} | loss error | gradient error | adapters | loss error | gradient error | s |",
                  f"| --- | --- | {' | '.join('---:' for _ in KINDS)} | ---: | ---: | ---: | ---: | ---: | ---: |"]
        lines += [_row(r) for r in results.values() if r.family == family]
    lines += ["", "## Not whole", "", *([_parts(r) for r in results.values() if r.captured != "whole"] or ["All are whole."])]
    lines += ["", "## Captured again for another size", "", *([f"- {r.name}: {r.captures} programs" for r in results.values() if r.captures > 1] or ["None."])]
    lines += ["", "## More ops than places", "", "Where k is more than n, the count does not know the place: a gate whose module holds it under other names.", "",
              *([f"- {r.name}: {', '.join(dict.fromkeys(r.impossible))}" for r in results.values() if r.impossible] or ["None."])]
    lines += ["", "## Without adapters", "", *([f"- {r.name}: {r.refused_adapters}" for r in results.values() if r.refused_adapters] or ["None."])]
    lines += ["", "## Where k is less than n", "", *(_reasons(results) or ["Nowhere."]), ""]
    return "\n".join(lines)


def _row(r: Result) -> str:
    cells = [r.name, r.captured]
    for kind in KINDS:
        shown = {mode: "{}/{}".format(*counts.get(kind, (0, 0))) for mode, counts in r.fired.items()}
        first = shown.get(MODES[0], "0/0")
        others = [f"{mode} {text}" for mode, text in shown.items() if text != first]
        cells.append("-" if first == "0/0" and not others else first + (f" ({', '.join(others)})" if others else ""))
    for check in ("plain", "adapted"):
        steps = r.errors.get(check)
        if check == "adapted":
            cells.append("-" if r.adapters is None else str(r.adapters))
        cells += [f"{max(loss for loss, _ in steps):.0e}", f"{max(gradient for _, gradient in steps):.0e}"] if steps else ["-", "-"]
    return f"| {' | '.join([*cells, f'{r.seconds:.1f}' if r.captured != 'refused' else '-'])} |"


def _parts(r: Result) -> str:
    share = f", {r.parameters:.0%} of the parameters and {r.flops:.0%} of the operations of matrix products in graphs" if r.captured == "in parts" else ""
    return f"- {r.name}, {r.captured}{share}: {r.reason}"


def _reasons(results: Mapping[str, Result]) -> list[str]:
    """One line for each reason: where, how often, in which modes."""
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for r in results.values():
        for kind, modes in r.why.items():
            for mode, counts in modes.items():
                for reason, places in counts.items():
                    found.setdefault((r.name, kind, reason), {})[mode] = places
    return [f"- {name}, {kind}, {', '.join(f'{places} in {mode}' for mode, places in at.items())}: {reason}" for (name, kind, reason), at in found.items()]
