"""What a step of any Program would take, predicted from its graph alone: nothing is bound, no weight is read or made.

`plan` predicts for a program that is bound to its model. Here the state is a skeleton: tensors of the right sizes without memory. So
the programs before and after each pass can be compared, also where a pass makes weights that do not exist yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from fxopt.ir import meta, regions
from fxopt.ir.facts import Budget
from fxopt.ir.partition import Split
from fxopt.ir.program import Program
from fxopt.runtime import dry_run, saving
from fxopt.runtime.binding import Binding
from fxopt.runtime.machine import of
from fxopt.runtime.plan import OPTIMIZERS, Plan, Planner, concrete
from fxopt.runtime.region import RegionRunner
from fxopt.runtime.timeline import Resident

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Saved:
    """A value that a region keeps from its forward for its backward.

    Attributes:
        name: of the node of the region's forward graph, or of the program's value or slot where the region only received it.
        bytes: its size. received: it is an input or state of the region, which keeps it alive but makes no copy.
        node: the program's node that computed it (of the first of the equal regions), "" if unknown.
    """

    name: str
    bytes: int
    received: bool
    node: str


@dataclass(frozen=True, eq=False)
class Part:
    """Equal regions of a step: where they are, their graphs, what each saves, and what each of them takes.

    `split` was made from `compiled`, a region equal to the first of them, `region`: their nodes come in the same order.
    """

    paths: tuple[str | None, ...]
    region: regions.Region
    compiled: regions.Region
    split: Split
    saved: tuple[Saved, ...]
    seconds: float


@dataclass(frozen=True, eq=False)
class Forecast:
    """A step of a program.

    Attributes:
        plan: peak and time, as `opt.plan` says them.
        parts: of the step, in order; equal regions once.
        work: of the forward of each program node that computes something, by name.
        saved: bytes kept for the backward, by the name of the program's node that computes them.
    """

    plan: Plan
    parts: tuple[Part, ...]
    work: Mapping[str, dry_run.Work]
    saved: Mapping[str, int]


def skeleton(program: Program) -> nn.Module:
    """A module with the program's state under its names: tensors on the "meta" device, with the sizes, dtypes and gradients of the slots."""
    root = nn.Module()
    for slot in program.slots.values():
        if slot.name in program.constants:
            continue
        *path, leaf = slot.name.split(".")
        owner = _owner(root, path)
        grad = program.trainable(slot.name) and (slot.dtype.is_floating_point or slot.dtype.is_complex)
        tensor = torch.empty(slot.shape, dtype=slot.dtype, device="meta")
        if slot.kind == "parameter":
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=grad)
        else:
            owner._buffers[leaf] = tensor.requires_grad_(grad)
    return root


def _owner(root: nn.Module, path: Iterable[str]) -> nn.Module:
    for part in path:
        root = root._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    return root


class _Unbound(Planner):
    """A planner whose weights are those that the program reads: a skeleton's tensors own no memory that could be counted."""

    def _resident(self, shapes: Shapes, gradients: int) -> Resident:
        program = self.binding.program
        read = {str(node.target) for node in program.nodes if node.op == "get_attr"}
        slots = [slot for name, slot in program.slots.items() if name in read]
        held = sum(t.untyped_storage().nbytes() for name, t in program.constants.items() if isinstance(t, torch.Tensor) and name not in program.slots)
        weights = held + sum(torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in slots)
        trained = sum(torch.Size(slot.shape).numel() * 4 for slot in slots if slot.kind == "parameter" and program.trainable(slot.name))
        inputs = sum(torch.Size(shape).numel() * node.meta["val"].element_size() for shape, node in zip(shapes, program.placeholders))
        return Resident(weights, int(trained * OPTIMIZERS[self.optimizer]), inputs, gradients)


def forecast(program: Program, blocks: Iterable[str], shapes: Shapes, guards: Any, optimizer: str | None = None,
             runners: dict[Any, RegionRunner] | None = None) -> Forecast:
    """Predict a step of a program.

    Args:
        blocks: module paths of the repeated blocks, see `ir.regions.repeated_blocks`.
        shapes: of the call's tensors, in order. guards: what their sizes are in the graph (`ir.capture.guards`).
        optimizer: see `runtime.plan.planned`. runners: kept and shared between programs of one history, whose equal regions are traced once.

    Raises:
        CallError: the program asks for a budget that cannot be kept.
        LowerError: the program cannot be cut, or its backward cannot be traced.
    """
    model = skeleton(program)
    for block in blocks:
        _owner(model, block.split("."))
    schedule = regions.cut(program, blocks)
    binding = Binding(model, program, schedule, saving.of(program), {} if runners is None else runners)
    budget = next((fact for fact in program.facts if isinstance(fact, Budget)), None)
    planner = _Unbound(binding, budget, of(program), optimizer)
    plan = planner.plan(shapes, (False,) * len(shapes))
    parts, saved = _parts(binding, plan)
    return Forecast(plan, parts, _work([(region, runner.inference) for region, runner, *_ in binding.steps], numbers(guards.bind(shapes), shapes)), saved)


def numbers(bound: Mapping[Any, int], shapes: Shapes) -> Callable[[Any], int]:
    """What the sizes of a call are as numbers. `bound`: what the symbols of its inputs stand for (`ShapeGuards.bind`)."""
    known: dict[Any, int] = {}

    def number(size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        if size.node.expr not in known:
            known[size.node.expr] = concrete(size, dict(bound), shapes)
        return known[size.node.expr]

    return number


def forward_work(program: Program, blocks: Iterable[str], number: Callable[[Any], int]) -> dict[str, dry_run.Work]:
    """The work of each node of a program's forward, by name. Cheap: no backward is traced."""
    made: dict[str, fx.GraphModule] = {}
    steps = []
    for region in regions.cut(program, blocks).regions:
        if region.key not in made:
            made[region.key] = fx.GraphModule(dict(region.modules), region.graph)
        steps.append((region, made[region.key]))
    return _work(steps, number)


def _work(steps: Sequence[tuple[regions.Region, fx.GraphModule]], number: Callable[[Any], int]) -> dict[str, dry_run.Work]:
    """Each step is a region and the module of an equal one, whose nodes come in the same order; a module is run once."""
    work: dict[str, dry_run.Work] = {}
    ran: dict[int, list[dry_run.Work | None]] = {}
    for region, module in steps:
        if id(module) not in ran:
            costs = dry_run.run(module, number).nodes
            ran[id(module)] = [costs.get(node.name) for node in module.graph.nodes]
        for node, cost in zip(region.graph.nodes, ran[id(module)]):
            if cost is not None and node.op == "call_function":
                work[node.name] = cost
    return work


def _parts(binding: Binding, plan: Plan) -> tuple[tuple[Part, ...], dict[str, int]]:
    saved: dict[str, int] = {}
    groups: dict[Any, list[int]] = {}
    for at, ((_, runner, *_), level) in enumerate(zip(binding.steps, plan.levels)):
        groups.setdefault((id(runner), id(level.split)), []).append(at)
    parts = []
    for steps in groups.values():
        (first, runner, *_), level = binding.steps[steps[0]], plan.levels[steps[0]]
        kept = _saved(runner.region, first, level.split, [value.size for value in level.forward.outputs])
        parts.append(Part(tuple(plan.paths[at] for at in steps), first, runner.region, level.split, kept, level.seconds))
        for at in steps:
            for value in _saved(runner.region, binding.steps[at][0], level.split, [v.size for v in level.forward.outputs]):
                if value.node:
                    saved[value.node] = saved.get(value.node, 0) + value.bytes
    return tuple(parts), saved


def _saved(compiled: regions.Region, region: regions.Region, split: Split, sizes: list[int]) -> tuple[Saved, ...]:
    """What `region` saves; its graphs were made from `compiled`, an equal one whose nodes come in the same order."""
    graph = split.forward.graph
    outputs = graph.output_node().args[0]
    start = split.n_outputs + len(split.mutated)
    arguments = {node: name for node, name in zip((n for n in graph.nodes if n.op == "placeholder"), (*region.inputs, *region.state))}
    own = {node.name: other.name for node, other in zip(compiled.graph.nodes, region.graph.nodes)}
    found = []
    for value, size in zip(outputs[start:], sizes[start:]):
        if not isinstance(value, fx.Node) or not isinstance(meta.value(value), torch.Tensor):
            continue
        if value in arguments:
            name = arguments[value]
            found.append(Saved(name, size, True, name if name in region.inputs else ""))
        else:
            found.append(Saved(value.name, size, False, own.get(origin(value), "")))
    return tuple(found)


def origin(node: fx.Node) -> str:
    """Name of the region's node that a node of its joint graph was traced from, "" if unknown."""
    found = node.meta.get("from_node")
    return found[-1].name if found else ""
