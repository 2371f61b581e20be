"""What a captured call became: programs, what they cover, and questions about a pipeline."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from fxopt.ir import regions
from fxopt.ir.edit import mutates
from fxopt.ir.program import Assumption, Program, ShapeGuards
from fxopt.passes.pipeline import Pipeline
from fxopt.runtime.binding import Binding


@dataclass(eq=False)
class Lowered:
    """A program after the passes, cut and bound. `binding` is made on first use and not copied."""

    program: Program
    schedule: regions.Schedule
    writes: bool = False  # into the inputs of the call
    binding: Binding | None = None
    checks: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Entry:
    """One capture: the raw program, the sizes it covers, and what the passes made of it.

    `assuming` holds for calls that meet the program's assumptions (an attention mask of ones), `plain` for all.
    """

    raw: Program
    guards: ShapeGuards
    assumptions: tuple[Assumption, ...] | None = None
    begun: tuple[Pipeline, Program] | None = None  # the program behind the last pass that assumes something
    assuming: Lowered | None = None
    plain: Lowered | None = None
    edges: set[Any] = field(default_factory=set)


def edges(shapes: Any) -> Any:
    """Which sizes are 0 or 1."""
    return tuple(tuple(size if size < 2 else -1 for size in shape) for shape in shapes)


def last_assuming(passes: Pipeline) -> int:
    """How many passes there are up to the last one that may assume something of the inputs."""
    return max((i + 1 for i, p in enumerate(passes) if getattr(p, "assume", False)), default=0)


def writes_input(node: fx.Node) -> bool:
    """Whether a node writes into memory of one of the call's tensors."""
    return node.op == "call_function" and mutates(node) and any(regions.memory(i).op == "placeholder" for i in node.all_input_nodes[:1])


def reads(program: Program, name: str) -> bool:
    """Whether a program reads this slot."""
    return any(node.op == "get_attr" and node.target == name for node in program.graph.nodes)


def unbound(lowered: Lowered | None) -> Lowered | None:
    """The same without its binding, which holds a model."""
    return None if lowered is None else Lowered(lowered.program, lowered.schedule, lowered.writes, None, list(lowered.checks))


def adapter_of(passes: Pipeline) -> str | None:
    """The name of the adapter that a pipeline adds."""
    return next((str(p.adapter) for p in passes if hasattr(p, "adapter")), None)


def without_assumptions(passes: Pipeline) -> Pipeline:
    """The same passes, asked not to assume anything of the inputs."""
    return Pipeline(tuple(dataclasses.replace(p, assume=False) if any(f.name == "assume" for f in dataclasses.fields(p)) else p for p in passes))
