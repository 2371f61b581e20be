"""The plan of a training step: what each region keeps, so that the step stays within a budget and takes least time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
import torch.nn as nn

from fxopt.errors import CallError
from fxopt.ir.facts import Budget
from fxopt.ir.partition import Policy, min_cut, save_all
from fxopt.ir.regions import differentiable_outputs
from fxopt.kernels.live_rows import most
from fxopt.runtime.levels import Level, Levels
from fxopt.runtime.machine import Machine, of
from fxopt.runtime.solver import Option, smallest, solve
from fxopt.runtime.timeline import Peak, Resident, Stage, Timeline

if TYPE_CHECKING:
    from fxopt.runtime.binding import Binding

OPTIMIZERS = {"adamw": 2.0, "adamw_8bit": 0.53, "sgd": 0.0, "momentum": 1.0, "none": 0.0}
"""Bytes of an optimizer's state for each byte of an fp32 trainable parameter; AdamW of 8 bits has a scale for each 256 values."""
GIB = 1024**3


@dataclass(frozen=True, eq=False)
class Plan:
    """What a step will take, and what each region does about it.

    Attributes:
        peak: the moment with most memory.
        seconds: predicted for forward and backward; the optimizer's step is not counted.
        levels: for each region, how it runs.
        paths: the regions' blocks.
        budget: bytes, or None where none was given.
    """

    peak: Peak
    seconds: float
    levels: tuple[Level, ...]
    paths: tuple[str | None, ...]
    budget: int | None

    def __str__(self) -> str:
        lines = [f"peak {size(self.peak.total)} in the {self.peak.phase} of {self.peak.place}, at {self.peak.node or 'its start'}"
                 + (f" (budget {size(self.budget)})" if self.budget is not None else "")]
        lines += [f"  {size(bytes_):>10}  {name}" for name, bytes_ in self.peak.parts.items() if bytes_]
        lines.append(f"predicted time of forward and backward {self.seconds:.3g} s")
        again: dict[tuple[str, ...], list[str]] = {}
        for path, level in zip(self.paths, self.levels):
            again.setdefault(level.again, []).append(path or "between the blocks")
        for names, paths in again.items():
            if names:
                lines.append(f"  computed again in {len(paths)} of {len(self.paths)} regions ({paths[0]}, ...): {', '.join(names)}")
        away = [(path or "between the blocks", level.offloaded) for path, level in zip(self.paths, self.levels) if level.offloaded]
        if away:
            lines.append(f"  {size(sum(bytes_ for _, bytes_ in away))} wait on the host, of {len(away)} of {len(self.paths)} regions ({away[0][0]}, ...)")
        small = [path or "between the blocks" for path, level in zip(self.paths, self.levels) if level.split.compressed]
        if small:
            lines.append(f"  kept in 8 bits in {len(small)} of {len(self.paths)} regions ({small[0]}, ...): gradients are approximate")
        return "\n".join(lines)


def size(number: float) -> str:
    """A number of bytes in words."""
    for unit, many in (("GiB", GIB), ("MiB", 1024**2), ("KiB", 1024)):
        if number >= many:
            return f"{number / many:.3g} {unit}"
    return f"{int(number)} B"


class Planner:
    """Plans the steps of one binding; a plan for each set of sizes.

    Args:
        budget: what the memory pass asked for; None plans without a limit.
        optimizer: whose state counts; None: the budget's, else AdamW's.
    """

    def __init__(self, binding: Binding, budget: Budget | None = None, machine: Machine | None = None, optimizer: str | None = None) -> None:
        self.binding, self.budget = binding, budget
        self.optimizer = optimizer or (budget.optimizer if budget is not None else "adamw")
        self.machine = machine or of(binding.program)
        self.levels: dict[Any, Levels] = {}

    def plan(self, shapes: tuple[tuple[int, ...], ...], requires_grad: Sequence[bool], autocast: torch.dtype | None = None, gradients: int = 0) -> Plan:
        """The fastest plan within the budget for a call.

        Args:
            shapes, requires_grad: of its tensors.
            gradients: bytes of the parameters' gradients that an earlier backward left.

        Raises:
            CallError: no plan keeps the budget; with the smallest that one could keep.
        """
        env = self.binding.guards.bind(shapes)
        known: dict[Any, int] = {}

        def number(value: Any) -> int:
            if not isinstance(value, torch.SymInt):
                return int(value)
            expr = value.node.expr
            if expr not in known:
                known[expr] = concrete(value, env, shapes)
            return known[expr]

        ways = self._ways(requires_grad, autocast)
        resident = self._resident(shapes, gradients)
        sizes = tuple(env.items())
        usual = save_all if self.budget is None and "remat" not in self.binding.program.facts else min_cut
        fastest = [way.level(usual, number, sizes) for way in ways]
        chosen, peak = fastest, self._timeline(fastest, resident).peak
        limit = self.budget.bytes if self.budget is not None else None
        if self.budget is not None and (limit is None or peak.total > limit):
            chosen, peak = self._chosen(limit, [way.all(number, sizes) for way in ways], lambda: [way.compressed(number, sizes) for way in ways], resident)
        return Plan(peak, _seconds(chosen), tuple(chosen), tuple(region.path for region, *_ in self.binding.steps), limit)

    def _ways(self, requires_grad: Sequence[bool], autocast: torch.dtype | None) -> list[Levels]:
        """For each step its levels, under the requires_grad flags that its arguments will have."""
        flags = dict(zip(self.binding.inputs, requires_grad))
        found = []
        for region, runner, _, cells in self.binding.steps:
            wanted = (*(flags.get(name, False) for name in region.inputs), *(isinstance(t := store[leaf], torch.Tensor) and t.requires_grad for store, leaf in cells))
            key = id(runner), wanted, autocast
            if key not in self.levels:
                self.levels[key] = Levels(runner, wanted, autocast, self.machine)
            found.append(self.levels[key])
            outs = runner.joint(wanted, autocast)[1] if any(wanted) else (False,) * len(region.outputs)
            possible = differentiable_outputs(region, wanted)
            flags.update((name, a and b) for name, a, b in zip(region.outputs, outs, possible))
        return found

    def _resident(self, shapes: tuple[tuple[int, ...], ...], gradients: int) -> Resident:
        binding = self.binding
        weights = weights_bytes(binding.model) + sum(t.untyped_storage().nbytes() for t in binding.program.constants.values() if isinstance(t, torch.Tensor))
        trainable = sum(p.numel() * 4 for p in binding.model.parameters() if p.requires_grad)
        inputs = sum(torch.Size(shape).numel() * node.meta["val"].element_size() for shape, node in zip(shapes, binding.program.placeholders))
        return Resident(weights, int(trainable * OPTIMIZERS[self.optimizer]), inputs, gradients)

    def _timeline(self, chosen: Sequence[Level], resident: Resident) -> Timeline:
        stages = [Stage(region.path, region.inputs, region.state, region.outputs, level.split, level.forward, level.backward, tuple(dead), bool(runner.quiet), level.gone,
                        level.offloaded)
                  for (region, runner, *_), dead, level in zip(self.binding.steps, self.binding.dead_after, chosen)]
        return Timeline(stages, resident)

    def _chosen(self, limit: int | None, exact: list[list[Level]], compressed: Callable[[], list[list[Level]]], resident: Resident) -> tuple[list[Level], Peak]:
        """The fastest exact choice; one with values in 8 bits where that is allowed, and no exact one fits or only with products computed again,
        which take longer."""
        if self.budget is None or not self.budget.compress:
            return self._within(limit, exact, resident)
        found = None
        if limit is not None:
            with contextlib.suppress(CallError):
                found = self._within(limit, exact, resident)
            if found is not None and not any(level.again for level in found[0]):
                return found
        other = self._within(limit, [[*a, *b] for a, b in zip(exact, compressed())], resident)
        return other if found is None or _seconds(other[0]) < _seconds(found[0]) else found

    def _within(self, limit: int | None, ways: list[list[Level]], resident: Resident) -> tuple[list[Level], Peak]:
        """The fastest choice whose timeline stays within the limit; without one, the choice that needs least."""
        options = [[level.option(region.inputs, dead) for level in levels] for levels, (region, *_), dead in zip(ways, self.binding.steps, self.binding.dead_after)]
        behind = self._timeline([levels[0] for levels in ways], resident).behind
        least = smallest(options, behind)

        def take(budget: int) -> tuple[list[Level], Peak]:
            picked = solve(options, budget, behind)
            assert picked is not None
            chosen = [levels[index] for levels, index in zip(ways, picked)]
            return chosen, self._timeline(chosen, resident).peak

        chosen, peak = best = take(least)
        if limit is None:
            return best
        if peak.total > limit:
            more = "" if size(limit) != size(peak.total) else f" ({peak.total - limit} bytes more)"
            raise CallError(f"memory({size(limit)}) cannot hold this step: the least that it can be made to take is {size(peak.total)}{more}",
                            where=f"the {peak.phase} of {peak.place}, at {peak.node or 'its start'}",
                            do=f"give memory({-(-peak.total // 1024**2)}MiB) or more, or shorter or fewer samples; "
                               + ", ".join(f"{name} {size(bytes_)}" for name, bytes_ in peak.parts.items() if bytes_))
        # the solver's sums leave out what only the timeline knows (values between regions), so its budget is moved until they agree
        low, high = least, max(limit - resident.total, least)
        high += high // 8
        for _ in range(12):
            middle = (low + high) // 2
            found = take(middle)
            if found[1].total <= limit:
                low = middle
                if _seconds(found[0]) <= _seconds(best[0]):
                    best = found
            else:
                high = middle
            if high - low <= limit // 512:
                break
        return best


def _seconds(chosen: Sequence[Level]) -> float:
    return sum(level.seconds for level in chosen)


def weights_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers; what is shared counts once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(found.values())


def concrete(size: int | torch.SymInt, env: dict[sympy.Symbol, int], shapes: tuple[tuple[int, ...], ...]) -> int:
    """A size in a call. One that depends on data counts as the largest it can be: of rows that are found live all, rounded as they are; else
    the samples times tokens (the first two sizes) of the largest input."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    value = sympy.sympify(size.node.expr)
    live = most(size.node.shape_env)
    while more := {symbol: live[symbol] for symbol in value.free_symbols if symbol in live and symbol not in env}:  # rows that are live among live rows
        value = value.xreplace(more)
    rows = max((torch.Size(shape[:2]).numel() for shape in shapes), default=1)
    return int(value.xreplace({symbol: sympy.Integer(env.get(symbol, rows)) for symbol in value.free_symbols}))


def planned(binding: Binding, tensors: Sequence[torch.Tensor], optimizer: str | None = None) -> Plan:
    """The plan of a training step of a binding on a call with these tensors, of which only sizes are read.

    Raises:
        CallError: the budget that the program asks for cannot be kept.
    """
    return planner(binding, lambda _: tensors, optimizer)(0)


def planner(binding: Binding, tensors: Callable[[int], Sequence[torch.Tensor]], optimizer: str | None = None) -> Callable[[int], Plan]:
    """`planned` for calls of many sizes: from a size to the plan of a step on the tensors of that size."""
    if optimizer not in (None, *OPTIMIZERS):
        raise CallError(f"no optimizer {optimizer!r} is known", do=f"they are {', '.join(OPTIMIZERS)}")
    budget = next((fact for fact in binding.program.facts if isinstance(fact, Budget)), None)
    maker = Planner(binding, budget, optimizer=optimizer)

    def plan(number: int) -> Plan:
        given = tensors(number)
        device = given[0].device.type if given else "cpu"
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return maker.plan(tuple(tuple(t.shape) for t in given), tuple(t.requires_grad for t in given), autocast)

    return plan


class Planned:
    """A `Saving` that keeps a budget: plans are made for the sizes of each call, and kept.

    A plan for larger sizes holds for smaller ones. So it is first tried for sizes rounded up, which many calls share, and made for the very
    sizes only where that does not fit.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.planner: Planner | None = None
        self.plans: dict[Any, Plan] = {}
        self.last: Plan | None = None

    def policies(self, binding: Binding, tensors: Sequence[torch.Tensor]) -> Sequence[Policy]:
        """The policies of the plan for a call.

        Raises:
            CallError: no plan keeps the budget.
        """
        if not torch.is_grad_enabled():
            return (min_cut,) * len(binding.steps)
        self.planner = self.planner or Planner(binding, self.budget)
        device = tensors[0].device.type if tensors else "cpu"
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        gradients = sum(p.grad.untyped_storage().nbytes() for p in binding.model.parameters() if p.grad is not None and not p.grad.is_sparse)
        flags = tuple(t.requires_grad for t in tensors)
        shapes = tuple(tuple(t.shape) for t in tensors)
        quiet = tuple(runner.quiet for _, runner, *_ in binding.steps)
        key = shapes, flags, autocast, gradients, quiet
        if key not in self.plans:
            if len(self.plans) > 4096:
                self.plans.clear()
            self.plans[key] = self._plan(binding.guards.shapes, key)
        self.last = self.plans[key]
        return [level.policy for level in self.last.levels]

    def _plan(self, symbolic: Sequence[Sequence[Any]], key: Any) -> Plan:
        shapes, flags, autocast, gradients, quiet = key
        assert self.planner is not None
        raised = {size: _rounded(size) for wanted, got in zip(symbolic, shapes) for expr, size in zip(wanted, got) if not isinstance(expr, int)}
        larger = tuple(tuple(size if isinstance(expr, int) else raised[size] for expr, size in zip(wanted, got)) for wanted, got in zip(symbolic, shapes))
        if self.budget.bytes is not None and larger != shapes:
            if (larger, *key[1:]) not in self.plans:
                try:
                    self.plans[(larger, *key[1:])] = self.planner.plan(larger, flags, autocast, gradients)
                except CallError:
                    return self.planner.plan(shapes, flags, autocast, gradients)
            return self.plans[(larger, *key[1:])]
        return self.planner.plan(shapes, flags, autocast, gradients)


def _rounded(size: int) -> int:
    """The next larger size with three significant binary digits: at most an eighth more."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step
