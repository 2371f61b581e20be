"""Which weights can take few bits: output error by format, measured on one call, and the best plan under a byte budget."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir.program import Program, Sample, Slot
from fxopt.kernels.formats import FORMATS
from fxopt.passes import linears

# What a plan chooses from. The GGUF formats are read from files only.
CANDIDATES = tuple(name for name in ("nf4_nested", "nf4", "fp8", "int8") if name in FORMATS)
# Rows of a linear's input that the error is measured on, evenly spaced. 256 rows measure a relative error to about 5%.
ROWS = 256

Errors = Mapping[str, Mapping[str, float]]


def measure(program: Program, sample: Sample, names: set[str]) -> dict[str, dict[str, float]]:
    """||X (Q(W) - W)^T||^2 / ||X W^T||^2 of each weight and candidate format, X being what the linear reads in the call.

    One forward pass with the dense weights; a weight's copies live for the time of its measurement only. A weight that several
    nodes read gets the sum.
    """
    found: dict[str, dict[str, float]] = {}

    def see(node: fx.Node, value: object, env: Mapping[fx.Node, object]) -> None:
        linear = linears.read(node)
        if linear is None or linear.name not in names:
            return
        x, weight = env[linear.x], env[linear.weight]
        rows = x.reshape(-1, x.shape[-1])
        rows = rows[:: max(1, rows.shape[0] // ROWS)].float()
        dense = weight.detach().float()
        out = rows @ (dense if linear.transposed else dense.t())
        norm = float(out.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
        errors = found.setdefault(linear.name, {})
        for name in CANDIDATES:
            if FORMATS[name].fits(weight.shape) is None:
                change = FORMATS[name].dequantize(FORMATS[name].quantize(dense), weight.shape, torch.float32).sub_(dense)
                error = float((rows @ (change if linear.transposed else change.t())).square().sum()) / norm
                errors[name] = errors.get(name, 0.0) + error

    program.watch(sample, see)
    return found


def choose(errors: Errors, weights: Mapping[str, tuple[tuple[int, ...], torch.dtype]], bits: float) -> dict[str, str]:
    """A format for each weight, "dense" among them: at most `bits` per weight on average, least sum of squared errors.

    Greedy: every weight starts in its smallest format; the step that saves most error per byte is taken until none fits. Steps
    lie on each weight's lower convex hull, so a step never has to be undone; the result is optimal up to the last step.

    Raises:
        PassError: the smallest formats take more than the budget.
    """
    ladders = {name: _hull([(bits_of(shape, dtype, format) * math.prod(shape), error, format)
                            for format, error in (*errors[name].items(), ("dense", 0.0))]) for name, (shape, dtype) in weights.items()}
    count = sum(math.prod(shape) for shape, _ in weights.values())
    spent = sum(ladder[0][0] for ladder in ladders.values())
    budget = bits * count
    if spent > budget:
        raise PassError(f"quantize: the smallest formats take {spent / max(count, 1):.3f} bits per weight, the budget is {bits}", do="raise `bits`")
    chosen = {name: 0 for name in ladders}
    heap = [(-_gain(ladder, 0), name) for name, ladder in ladders.items() if len(ladder) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        at, ladder = chosen[name], ladders[name]
        cost = ladder[at + 1][0] - ladder[at][0]
        if spent + cost > budget:
            continue
        spent, chosen[name] = spent + cost, at + 1
        if at + 2 < len(ladder):
            heapq.heappush(heap, (-_gain(ladder, at + 1), name))
    return {name: ladders[name][at][2] for name, at in chosen.items()}


def bits_of(shape: Sequence[int], dtype: torch.dtype, format: str) -> float:
    """Bits per weight in a format, scales included; dense weights by their dtype."""
    return 8.0 * dtype.itemsize if format == "dense" else FORMATS[format].bits(shape)


def _gain(ladder: list[tuple[float, float, str]], at: int) -> float:
    return (ladder[at][1] - ladder[at + 1][1]) / (ladder[at + 1][0] - ladder[at][0])


def _hull(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The lower convex hull of (size, error, format), from the smallest size on, errors falling."""
    hull: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-2][1] - hull[-1][1]) * (point[0] - hull[-1][0]) <= (hull[-1][1] - point[1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append(point)
    return hull


def totals(chosen: Mapping[str, str], slots: Mapping[str, Slot]) -> list[str]:
    """A choice in words: bits per weight on average, then each format's share."""
    count = {name: math.prod(slots[name].shape) for name in chosen}
    whole = max(sum(count.values()), 1)
    spent = sum(bits_of(slots[name].shape, slots[name].dtype, format) * count[name] for name, format in chosen.items())
    lines = [f"{spent / whole:.3f} bits per weight on average"]
    for format, times in Counter(chosen.values()).most_common():
        share = sum(count[name] for name, each in chosen.items() if each == format) / whole
        lines.append(f"{format}: {times} weights, {100 * share:.1f}% of all")
    return lines


def said(chosen: Mapping[str, str], errors: Errors, slots: Mapping[str, Slot]) -> list[str]:
    """The choice in words: totals, then each weight that is not in the most common format."""
    (most, _), *_ = Counter(chosen.values()).most_common(1) or [("", 0)]
    lines = totals(chosen, slots)
    for name, format in chosen.items():
        if format != most:
            options = ", ".join(f"{f} {math.sqrt(e):.4f}" for f, e in errors[name].items())
            lines.append(f"{name} is {format} (relative output error: {options})")
    return lines
