"""fuse: subgraphs that a fused op computes become one node."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx as fx

from fxopt.errors import CheckError, PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.index import Flow, called, relaid, static
from fxopt.ir.pattern import Match, Matcher, Near
from fxopt.ir.template import emit, without_autocast
from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.op import FusedOp, Pattern
from fxopt.kernels.tolerance import eager_error, excess
from fxopt.passes import residual, rotations
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class Fuse(Pass):
    """norms, gated units and rotary embeddings as fused ops

    Finds each pattern of each op in the kernel catalog; the ops keep less for backward than what they replace. A fused
    op's result is as close to the exact value as the operators' that it replaces, not bitwise equal to it.

    Args:
        ops: names of the ops to look for; empty for all.
    """

    ops: tuple[str, ...] = ()

    name: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    promise: ClassVar[Promise] = Promise(values="tolerance")

    def __post_init__(self) -> None:
        known = sorted({*(rule.op.name for rule in rules()), *residual.OPS})
        for name in self.ops:
            if name not in known:
                raise PassError(f"fuse: there is no op {name!r} with patterns", do=f"the ops are {', '.join(known)}")

    def run(self, edit: Edit) -> None:
        """Larger patterns first: a smaller one may be a part of a larger one."""
        nears: list[tuple[Near, Rule]] = []
        flows = _Flows(edit)
        for rule in rules():
            if not self.ops or rule.op.name in self.ops:
                nears += rule.apply(edit, flows)
        rotations.tidy(edit)
        residual.fold(edit, self.ops or residual.OPS)
        _report(edit, nears)


class _Flows:
    """The facts about the edited graph, made when asked for and kept until something is rewritten."""

    def __init__(self, edit: Edit) -> None:
        self.edit, self.count, self.flow = edit, -1, None

    def now(self) -> Flow:
        """Those of the graph as it is."""
        if self.flow is None or self.count != len(self.edit.rewrites):
            self.flow, self.count = Flow(self.edit.graph, self.edit.slots), len(self.edit.rewrites)
        return self.flow


@dataclass(frozen=True)
class Rule:
    """One pattern of one op, ready to match."""

    op: FusedOp
    pattern: Pattern
    matcher: Matcher
    unproven: dict[tuple[torch.dtype, ...], str | None] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """`op.pattern (file.py:line)`."""
        code = self.pattern.fn.__code__
        return f"{self.op.name}.{self.pattern.name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"

    def apply(self, edit: Edit, flows: _Flows | None = None) -> list[tuple[Near, Rule]]:
        """Rewrite every match; returns the near-misses."""
        nears = []
        ends = self.matcher.ends(edit.graph)
        flow = (flows or _Flows(edit)).now() if ends else None
        gone: set[fx.Node] = set()
        for node in ends:
            if node in gone or edit.spent:
                continue
            found = self.matcher.at(node, lambda inputs, scalars: self._refusal(flow, inputs, scalars))
            if isinstance(found, Near):
                nears.append((found, self))
            elif found is not None:
                reason = self._unsafe(flow, found) or self._rewrite(edit, found, gone)
                if reason is not None:
                    nears.append((Near(found.anchor, reason, self.matcher.sketch.size + 1, found.nodes), self))
        return nears

    def _refusal(self, flow: Flow, inputs: Mapping[str, fx.Node], scalars: Mapping[str, Any]) -> str | None:
        bound: dict[str, Any] = {**standins(inputs, flow), **scalars}
        reason = self.pattern.check(bound) if self.pattern.check is not None else None
        if reason is not None:
            return reason
        dtypes = tuple(bound[name].dtype for name in self.pattern.inputs)
        if dtypes not in self.unproven:
            with without_autocast():
                self.unproven[dtypes] = _unproven(self.op, self.pattern, dtypes)
        return self.unproven[dtypes]

    def _unsafe(self, flow: Flow, match: Match) -> str | None:
        """Why the matched operators may not be computed in one place."""
        for node in match.nodes:
            for source in (node, *node.all_input_nodes):
                if flow.roots.get(source, frozenset()) & flow.written:
                    return f"{meta.placed(source)} is written in place"
        marks = {meta.provenance(node).checkpoint for node in match.nodes}
        return None if len(marks) == 1 else "it is partly inside a checkpointed region"

    def _rewrite(self, edit: Edit, match: Match, gone: set[fx.Node]) -> str | None:
        """Put the op in; returns why not. Adds what is erased to `gone`."""
        made: list[fx.Node] = []

        def apply(fn: Callable[..., torch.Tensor], *inputs: fx.Node) -> fx.Node:
            result, new = emit(edit, fn, inputs, match.anchor)
            made.extend(new)
            return result

        by_name = self.pattern.bind({**match.inputs, **match.scalars}, apply)
        call = edit.call(self.op.overload, tuple(by_name[argument.name] for argument in self.op.overload._schema.arguments), like=match.anchor)
        made.append(call)
        if isinstance(meta.value(call), (tuple, list)):
            made.append(edit.call(operator.getitem, (call, self.pattern.output), like=match.anchor))
        new, old = meta.tensor(made[-1]), meta.tensor(match.anchor)
        reason = None
        if new.dtype != old.dtype or not meta.same_shape(new, old):
            reason = f"the op returns {meta.describe(new)}, not {meta.describe(old)}"
        elif (view := relaid(made[-1], match.anchor)) is not None:
            reason = f"the op returns other strides, and {meta.placed(view)} may depend on them"
        if reason is not None:
            for node in reversed(made):
                edit.erase(node)
            return reason
        edit.replace(match.anchor, made[-1], rule=self.name)
        waiting = set(match.nodes)
        while unread := [node for node in waiting if not node.users]:
            for node in unread:
                edit.erase(node)
            waiting.difference_update(unread)
            gone.update(unread)
        return None


@functools.cache
def rules() -> tuple[Rule, ...]:
    """A rule for each pattern in the catalog that is not another dtype's trace of the same function, largest first."""
    found: dict[Any, Rule] = {}
    for op in CATALOG:
        for pattern in op.patterns:
            key = (op.name, pattern.fn, tuple(sorted(pattern.arguments.items(), key=lambda item: item[0])))
            if key not in found:
                shapes = tuple((name, shape) for name, (shape, _) in pattern.inputs.items())
                other = tuple((name, dtype) for name, (_, dtype) in pattern.inputs.items() if not dtype.is_floating_point)
                found[key] = Rule(op, pattern, _matcher(pattern.fn, shapes, tuple(pattern.scalars.items()), other))
    return tuple(sorted(found.values(), key=lambda rule: -rule.matcher.sketch.size))


@functools.cache
def _matcher(fn: Callable[..., torch.Tensor], *parts: tuple[tuple[str, Any], ...]) -> Matcher:
    """Patterns of one function share what is traced of it."""
    return Matcher(fn, *map(dict, parts))


def standins(inputs: Mapping[str, fx.Node], flow: Flow) -> dict[str, torch.Tensor]:
    """Tensors without storage that a pattern's check can look at: dynamic sizes are distinct numbers, so that comparing
    them adds no guard; `requires_grad` says whether a gradient may flow."""
    numbers: dict[str, int] = {}
    found = {}
    for name, node in inputs.items():
        val = meta.tensor(node)
        shape = [numbers.setdefault(str(size), 10_007 + 2 * len(numbers)) if static(size) is None else static(size) for size in val.shape]
        found[name] = torch.empty(shape, dtype=val.dtype, device="meta", requires_grad=node in flow.grad)
    return found


def _unproven(op: FusedOp, pattern: Pattern, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the op may not stand for the pattern in these dtypes: on the pattern's own example it is less exact.

    A pattern is declared for the dtypes of its example. In others, the op may round where the function does not.
    """
    if dtypes == tuple(dtype for _, dtype in pattern.inputs.values()):
        return None
    inputs = {name: value.to(dtype) for (name, value), dtype in zip(pattern.examples().items(), dtypes)}

    def bind(change: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
        by_name = pattern.bind({**{name: change(value) for name, value in inputs.items()}, **pattern.scalars})
        return [by_name[argument.name] for argument in op.overload._schema.arguments]

    said = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    try:
        eager = pattern.fn(*inputs.values(), **pattern.scalars)
        got = op(*bind(lambda value: value))[pattern.output]
    except (RuntimeError, CheckError) as error:  # some operators take inputs of one dtype only
        return f"inputs of {said} are refused: {str(error).splitlines()[0]}"
    if got.dtype != eager.dtype:
        return f"for inputs of {said} the op returns {got.dtype}, not {eager.dtype}"
    truth = op.reference(*bind(lambda value: value.to(torch.complex128 if value.is_complex() else torch.float64)))[pattern.output]
    error = eager_error(eager, truth, torch.float32)
    return None if excess(got, truth, error) <= 0 else f"for inputs of {said} the op rounds more than this does"

_ARITHMETIC = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor, torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor)


def _report(edit: Edit, nears: list[tuple[Near, Rule]]) -> None:
    """Keep the nearest miss at each place where no rule fired and at least half of a pattern fits, sums and products not alone."""
    alive = set(edit.nodes)
    taken: set[fx.Node] = set()
    worth = [(near, rule) for near, rule in nears if near.score >= min(3, rule.matcher.sketch.size) and 2 * near.score > rule.matcher.sketch.size
             and near.nodes <= alive and not all(called(node, *_ARITHMETIC) for node in near.nodes)]
    for near, rule in sorted(worth, key=lambda item: (-item[0].score / item[1].matcher.sketch.size, -item[0].score)):
        if not near.nodes & taken:
            taken |= near.nodes
            edit.missed(rule.name, near.node, near.reason)
