"""Which weights can take few bits: what each format costs the model, measured on one call, and the best plan under a byte budget."""

from __future__ import annotations

import functools
import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir.program import Program, Sample, Slot
from fxopt.kernels.formats import FORMATS
from fxopt.passes import linears
from fxopt.passes.promises import written

# What a plan chooses from. The GGUF formats are read from files only.
CANDIDATES = tuple(name for name in ("nf4_nested", "nf4", "fp8", "int8") if name in FORMATS)
# Rows of a linear's input that errors are measured on, drawn at random: evenly spaced ones can all be first tokens of sequences, whose
# activations are far from all others'. In docs/mixed-bits.md's measurement 128 rows lead to plans as good as 1,024, but to estimates twice too large.
ROWS = 1024

Errors = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Measured:
    """What formats cost.

    Attributes:
        errors: for each weight, of each candidate format that it fits: numbers that add up, and can be compared across weights.
        unit: what the numbers are.
        note: why they are not what they should be, or None.
    """

    errors: Errors
    unit: str
    note: str | None = None


def measure(program: Program, sample: Sample, names: Collection[str], weighted: bool = True) -> Measured:
    """What each candidate format does to what the call is for, for each weight.

    With y = x W^T and D = x (Q(W) - W)^T the change of y: n / 2 * sum of (dL/dy * D)^2 over rows and columns, L being the first
    scalar that the call returns, n the most rows that any of the linears reads. This is the second-order change of the loss with the
    Fisher information for the Hessian, and of that the diagonal in y: Li et al., 2021 (BRECQ), https://arxiv.org/abs/2102.05426,
    equation 10, and, for weights instead of outputs, Kim et al., 2023 (SqueezeLLM), https://arxiv.org/abs/2306.07629, section 4.1.
    If L is a mean over n tokens, the numbers are near the mean KL divergence that a format brings about (docs/mixed-bits.md).

    A call that returns no scalar: L is the sum of all floating point outputs with random signs, each output by its root mean square:
    the numbers are then, in expectation, squared relative errors of what is returned, times n / 2 (Hutchinson's estimator).

    Without gradients, or if not weighted, ||D||^2 / ||y||^2, and the note says why.

    One forward and one backward pass of the sample with the dense weights; no weight takes a gradient. In memory: the activations of
    such a step, up to 1,024 rows of each linear's input, and copies of one weight at a time. State and random state stay as they are. A
    weight that several nodes read gets the sum.

    Raises:
        PassError: what the linears compute is not finite.
    """
    run = _Run(program, sample, names)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs = [out for out in run.forward() if isinstance(out, torch.Tensor) and out.is_floating_point() and out.requires_grad]
        unit, scalar = _scalar(outputs)
        if scalar is None or not weighted:
            note = "as asked" if not weighted else "no floating point output depends on a linear"
        else:
            note = run.backward(scalar)
    if note is None:
        return Measured(run.weighted, unit)
    relative = run.relative()
    if not all(math.isfinite(error) for errors in relative.values() for error in errors.values()):
        raise PassError("quantize(bits=...): what the linears compute on the example call is not finite", do="give example inputs without NaN or infinity")
    return Measured(relative, "squared relative output error", f"errors are those of each linear's output, not weighed by what they do to the loss: {note}")


def _scalar(outputs: Sequence[torch.Tensor]) -> tuple[str, torch.Tensor | None]:
    """(unit, what to differentiate)."""
    for out in outputs:
        if out.dim() == 0:
            return "estimated rise of the loss", out
    if not outputs:
        return "", None
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, out.shape, generator=generator).to(out.device, out.dtype) * 2 - 1 for out in outputs]
    sizes = [out.detach().float().square().sum().sqrt().clamp_min(torch.finfo(torch.float32).tiny) for out in outputs]
    return "estimated squared relative error of the outputs", sum((out * sign).float().sum() / size for out, sign, size in zip(outputs, signs, sizes))


@dataclass(frozen=True)
class _Seen:
    """One product with a weight: the weight, which rows of its input are looked at (None: all), those rows, and one of how many they are."""

    linear: linears.Linear
    weight: torch.Tensor
    chosen: torch.Tensor | None
    rows: torch.Tensor
    share: float

    def changes(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(format, change of the product's rows)."""
        dense = self.weight.float()
        for name in CANDIDATES:
            if FORMATS[name].fits(dense.shape) is None:
                yield name, self.times(FORMATS[name].dequantize(FORMATS[name].quantize(dense), dense.shape, torch.float32).sub_(dense))

    def times(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows times a weight of this kind, in fp32."""
        return self.rows.float() @ (weight if self.linear.transposed else weight.t())


class _Run(fx.Interpreter):
    """One forward and backward pass of a program that sees what linears read, and the gradients of what they compute."""

    def __init__(self, program: Program, sample: Sample, names: Collection[str]) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=True, graph=program.graph)
        changed = written(program)
        self.inputs = [_own(value, str(node.target) in changed) for node, value in zip(program.placeholders, sample.inputs)]
        self.state = {name: _own(value, name in changed) for name, value in sample.state.items()}
        self.constants, self.names = program.constants, names
        self.probe = torch.zeros((), requires_grad=True)
        self.seen: list[_Seen] = []
        self.weighted: dict[str, dict[str, float]] = {}
        self.count = 0

    def forward(self) -> Sequence[Any]:
        """The outputs."""
        return self.run(*self.inputs)

    def backward(self, scalar: torch.Tensor) -> str | None:
        """Fill `weighted`; why it could not be filled."""
        try:
            torch.autograd.grad(scalar * self.count, self.probe, allow_unused=True)  # times n: small gradients stay in the range of fp16
        except RuntimeError as error:
            return f"the call has no gradient ({str(error).splitlines()[0]})"
        found = [error for errors in self.weighted.values() for error in errors.values()]
        if not all(map(math.isfinite, found)):
            return "the gradient is not finite"
        return None if any(found) else "no weight changes it"

    def relative(self) -> dict[str, dict[str, float]]:
        """||D||^2 / ||y||^2."""
        found: dict[str, dict[str, float]] = {}
        for seen in self.seen:
            norm = float(seen.times(seen.weight.float()).square().sum().clamp_min(torch.finfo(torch.float32).tiny))
            for name, change in seen.changes():
                _add(found, seen.linear.name, name, float(change.square().sum()) / norm)
        return found

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = self.state.get(target)
        return found if found is not None else self.constants[target]

    def run_node(self, n: fx.Node) -> Any:
        linear = linears.read(n)
        if linear is None or linear.name not in self.names:
            return super().run_node(n)
        x = self.env[linear.x].detach()
        count = x.shape[:-1].numel()
        self.count = max(self.count, count)
        chosen = _draw(count).to(x.device) if count > ROWS else None
        seen = _Seen(linear, self.state[linear.name], chosen, _rows(x, chosen).clone(), count / min(max(count, 1), ROWS))
        self.seen.append(seen)
        for name in CANDIDATES:
            if FORMATS[name].fits(seen.weight.shape) is None:
                _add(self.weighted, linear.name, name, 0.0)
        y = super().run_node(n) + self.probe.to(x.device)  # y itself, as something that takes a gradient
        if y.requires_grad:
            y.register_hook(functools.partial(self._weigh, seen))
        return y

    def _weigh(self, seen: _Seen, gradient: torch.Tensor) -> None:
        """The hook of a linear's output: n times dL/dy arrived."""
        with torch.no_grad():
            rows = _rows(gradient, seen.chosen).float()
            for name, change in seen.changes():
                _add(self.weighted, seen.linear.name, name, float((rows * change).square().sum()) * seen.share / (2 * self.count))


def _rows(value: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
    flat = value.reshape(-1, value.shape[-1])
    return flat if chosen is None else flat[chosen]


@functools.lru_cache(maxsize=8)
def _draw(count: int) -> torch.Tensor:
    """The rows that are looked at; of equal counts the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:ROWS].sort().values


def _own(value: torch.Tensor, changed: bool) -> torch.Tensor:
    return value.detach().clone() if changed else value.detach()


def _add(errors: dict[str, dict[str, float]], name: str, format: str, error: float) -> None:
    of = errors.setdefault(name, {})
    of[format] = of.get(format, 0.0) + error


def choose(errors: Errors, weights: Mapping[str, tuple[tuple[int, ...], torch.dtype]], bits: float) -> dict[str, str]:
    """A format for each weight, "dense" among them: at most `bits` per weight on average, least sum of errors.

    Greedy: every weight starts in its smallest format; the step that saves most error per byte is taken until none fits. Steps
    lie on each weight's lower convex hull, so a step never has to be undone. The sum is above the least possible one by at most
    what the first step that did not fit would have saved, and never rises with the budget (Sinha and Zoltners, 1979, "The
    multiple-choice knapsack problem", Operations Research 27(3): the linear relaxation). Equal gains: by name.

    Args:
        errors: of each weight, by format. weights: shape and dtype of each.

    Raises:
        PassError: the smallest formats take more than the budget.
    """
    ladders = {name: _hull([(bits_of(shape, dtype, format) * math.prod(shape), error, format)
                            for format, error in (*errors[name].items(), ("dense", 0.0))]) for name, (shape, dtype) in weights.items()}
    count = sum(math.prod(shape) for shape, _ in weights.values())
    spent = math.fsum(ladder[0][0] for ladder in ladders.values())
    budget = bits * count
    if spent > budget:
        least = math.ceil(1000 * spent / count) / 1000
        raise PassError(f"quantize: the smallest formats take {least} bits per weight, the budget is {bits}", do=f"raise `bits` to {least} or more")
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
    return {name: ladders[name][chosen[name]][2] for name in weights}


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


def said(chosen: Mapping[str, str], measured: Measured, slots: Mapping[str, Slot]) -> list[str]:
    """The choice in words: what errors are, totals, then each weight that is not in the most common format."""
    (most, _), *_ = Counter(chosen.values()).most_common(1) or [("", 0)]
    errors = measured.errors
    whole = sum(errors[name].get(format, 0.0) for name, format in chosen.items())
    lines = [*([measured.note] if measured.note is not None else []), *totals(chosen, slots), f"{measured.unit}: {whole:.2e} in all"]
    for name, format in chosen.items():
        if format != most:
            lines.append(f"{name} is {format} (errors: {', '.join(f'{f} {e:.2e}' for f, e in errors[name].items())})")
    return lines
