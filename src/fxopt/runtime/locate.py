"""Where a step stops being finite: a recorded batch is replayed node by node, forward and backward, and the first culprit is named.

Not every infinity is a fault: masks are built of minus infinity, and an overflow may be divided away. So the search starts from what is
wrong in the end (an output or a gradient) and goes back along values that are not finite. A node is the culprit if it makes what none of its
inputs had: a NaN from inputs without one, or an infinity from finite inputs without being told to by a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.errors import CheckError
from fxopt.ir import meta
from fxopt.ir.edit import mutates
from fxopt.ir.program import Program
from fxopt.ir.text import Symbols, called_as, output_names
from fxopt.torch_private import OpOverload, pytree

_ZERO = {"sqrt", "rsqrt", "log", "log2", "log10", "div", "reciprocal", "pow", "linalg_vector_norm", "norm", "std", "atan2", "prod"}


@dataclass(frozen=True)
class Range:
    """What a tensor holds: elements, the least and the largest finite one, how many are NaN, infinite and zero."""

    name: str
    type: str
    size: int
    low: float
    high: float
    nan: int
    inf: int
    zero: int

    @classmethod
    def of(cls, name: str, value: Any) -> Range:
        """Of all floating point elements of a value, which may be a tuple."""
        parts = [torch.view_as_real(t) if t.is_complex() else t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        floats = [t.detach().flatten() for t in parts if t.is_floating_point()]
        others = [t.detach().flatten().double() for t in parts if not t.is_floating_point()]
        low, high, nan, inf, zero = math.inf, -math.inf, 0, 0, 0
        for t in floats or others:
            finite = t[t.isfinite()]
            nan, inf, zero = nan + int(t.isnan().sum()), inf + int(t.isinf().sum()), zero + int((t == 0).sum())
            if finite.numel():
                low, high = min(low, float(finite.min()) + 0.0), max(high, float(finite.max()) + 0.0)  # no -0.0
        return cls(name, meta.describe(value) if parts else type(value).__name__, sum(t.numel() for t in floats or others), low, high, nan, inf, zero)

    @property
    def bad(self) -> bool:
        """Whether an element is not finite."""
        return bool(self.nan or self.inf)

    def __str__(self) -> str:
        parts = [f"from {self.low:.4g} to {self.high:.4g}" if self.low <= self.high else "nothing finite"]
        parts += [f"{count} {what}" for count, what in ((self.nan, "NaN"), (self.inf, "infinite"), (self.zero, "zero")) if count]
        return f"{self.name}: {self.type}, {self.size} elements, {', '.join(parts)}"


@dataclass(frozen=True)
class NonFinite:
    """The first value that is not finite.

    Attributes:
        phase: "forward"; "backward" (its inputs' gradients are what is bad); "input" or "state": it came so.
        node: name of the program's node, input or slot. call: as Python.
        path, source, code: module and line of the model's code.
        passes: that made or rewrote the node; none: it is as captured.
        inputs: what it reads. result: what it gives; in the backward, the first gradient of an input that is bad.
        gradient: in the backward, the gradient of its own result, which is finite.
    """

    phase: str
    node: str
    call: str
    path: str
    source: str
    code: str
    passes: tuple[str, ...]
    inputs: tuple[Range, ...]
    result: Range
    gradient: Range | None = None
    do: str = ""

    def __str__(self) -> str:
        where = f"in {self.path or '<root>'}" + (f" ({self.source})" if self.source else "")
        what = {"input": f"the input {self.node} is not finite", "state": f"{self.node} is not finite: it was damaged before this step",
                "forward": f"the first value that is not finite is made by `{self.node}` {where}, in the forward",
                "backward": f"the first gradient that is not finite is made by the backward of `{self.node}` {where}"}[self.phase]
        lines = [what]
        if self.code:
            lines.append(f"  code:     {self.code}")
        if self.call:
            lines.append(f"  call:     {self.call}")
            lines.append(f"  made by:  {', '.join(self.passes) or 'the capture'}")
        lines += [f"  reads:    {each}" for each in self.inputs]
        if self.gradient is not None:
            lines.append(f"  gradient: {self.gradient}")
        lines.append(f"  gives:    {self.result}")
        if self.do:
            lines.append(f"  do:       {self.do}")
        return "\n".join(lines)


def locate(program: Program, inputs: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor], scale: float = 1.0) -> NonFinite | None:
    """Replay a step and find the first value, or gradient, that is not finite; None if all that counts is finite.

    What counts are the outputs, and if one of them is a scalar loss, the gradients of parameters. Weights, gradients, buffers and random
    state stay as they are.

    Args:
        inputs: one tensor per placeholder. state: a value for every slot that the graph reads.
        scale: what the loss is multiplied by for the backward (a loss scale).

    Raises:
        CheckError: the backward cannot be replayed.
    """
    held = {name: t.detach().requires_grad_(program.trainable(name)) if program.slots[name].kind == "parameter" and t.is_floating_point() else t.detach().clone()
            for name, t in state.items()}
    devices = sorted({t.device.index for t in (*inputs, *held.values()) if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        replay = _Replay(program, held)
        outputs = replay.run(*(t.detach().clone() for t in inputs))
        found = _forward(program, replay)
        if found is not None:
            return found
        loss = _loss(program, outputs)
        if loss is None:
            return None
        try:
            (loss.float() * scale).backward()
        except RuntimeError as error:
            raise CheckError(f"the backward cannot be replayed: {str(error).splitlines()[0]}", do="the forward is finite; look for gradients that are not "
                             "with torch.autograd.set_detect_anomaly") from error
        return _backward(program, replay)


def _loss(program: Program, outputs: Sequence[Any]) -> torch.Tensor | None:
    """The scalar that training differentiates: the output named loss, else the first scalar."""
    named = list(zip(output_names(program), outputs))
    scalars = [(name, out) for name, out in named if isinstance(out, torch.Tensor) and out.dim() == 0 and out.is_floating_point() and out.requires_grad]
    return next((out for name, out in scalars if name.split(".")[-1] == "loss"), scalars[0][1] if scalars else None)


class _Replay(fx.Interpreter):
    """Runs a program with autograd. Keeps the range of every value, of its gradient, and of what each reader adds to it."""

    def __init__(self, program: Program, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=True, graph=program.graph)
        self.program, self.state = program, state
        self.values: dict[fx.Node, Range] = {}
        self.gradients: dict[fx.Node, Range] = {}
        self.edges: dict[tuple[fx.Node, fx.Node], Range] = {}  # (reader, what it reads)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = self.state.get(target)
        return found if found is not None else self.program.constants[target]

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        if mutates(n) or n.op != "call_function":
            return super().fetch_args_kwargs_from_env(n)
        return fx.node.map_arg((n.args, n.kwargs), lambda source: self._edge(n, source))

    def _edge(self, reader: fx.Node, source: fx.Node) -> Any:
        value = self.env[source]
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        alias = value.view_as(value)  # of this reader alone: its gradient is what the reader adds
        alias.register_hook(lambda grad: self._keep(self.edges, (reader, source), source, grad))
        return alias

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output" and not isinstance(value, torch.nn.Module):
            self.values[n] = Range.of(n.name, value)
            for part in pytree.tree_leaves(value):
                if isinstance(part, torch.Tensor) and part.requires_grad:
                    part.register_hook(lambda grad: self._keep(self.gradients, n, n, grad))
        return value

    @staticmethod
    def _keep(kept: dict[Any, Range], key: Any, of: fx.Node, grad: torch.Tensor) -> None:
        found = Range.of(f"gradient of {of.name}", grad)
        if key not in kept or found.bad:
            kept[key] = found


def _forward(program: Program, replay: _Replay) -> NonFinite | None:
    """The culprit of an output that is not finite."""
    bad = {node for node, found in replay.values.items() if found.bad}
    stack = [out for out in program.outputs if isinstance(out, fx.Node) and out in bad]
    reached: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack += [source for source in node.all_input_nodes if source in bad]
    if not reached:
        return None
    ordered = [node for node in program.nodes if node in reached]
    given = [node for node in ordered if node.op != "call_function"]
    culprits = [node for node in given if replay.values[node].nan] + [node for node in ordered if node.op == "call_function" and _makes(node, replay.values)]
    return _said(program, replay, (culprits or given or ordered)[0], "forward")


def _makes(node: fx.Node, values: Mapping[fx.Node, Range]) -> bool:
    """Whether a node's value has what no input has."""
    own, read = values[node], [values[source] for source in node.all_input_nodes if source in values]
    if own.nan:
        return not any(each.nan for each in read)
    told = any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in pytree.tree_leaves((node.args, node.kwargs)))
    return not any(each.bad for each in read) and not told


def _backward(program: Program, replay: _Replay) -> NonFinite | None:
    """The culprit of a gradient that is not finite: the first node in the order of the backward that adds one to an input's gradient, or
    for whose own gradient its readers add up finite ones to one that is not."""
    added: dict[fx.Node, list[Range]] = {}  # by what is read
    by_reader: dict[fx.Node, list[Range]] = {}
    for (reader, source), found in replay.edges.items():
        added.setdefault(source, []).append(found)
        by_reader.setdefault(reader, []).append(found)
    for node in reversed(program.nodes):  # readers come first
        own = replay.gradients.get(node)
        if own is not None and own.bad:
            return _said(program, replay, node, "backward", own, added.get(node, []))
        bad = next((found for found in by_reader.get(node, []) if found.bad), None)
        if bad is not None:
            return _said(program, replay, node, "backward", bad)
    return None


def _said(program: Program, replay: _Replay, node: fx.Node, phase: str, result: Range | None = None, added: Iterable[Range] | None = None) -> NonFinite:
    where = meta.provenance(node)
    if node.op == "placeholder":
        names = dict(zip(program.placeholders, program.signature.names()))
        return NonFinite("input", names[node], "", "", "", "", (), (), replay.values[node])
    if node.op == "get_attr":
        return NonFinite("state", str(node.target), "", "", "", "", (), (), replay.values[node], do="load an earlier checkpoint, or look at the step before")
    reads = tuple(replay.values[source] for source in node.all_input_nodes if source in replay.values)
    if added is not None:  # finite parts, whose sum is not
        return NonFinite(phase, node.name, called_as(node, Symbols()), where.path, where.source, where.code, where.passes, tuple(added), result or replay.values[node],
                         do="the gradients of its readers are finite, their sum is not: scale the loss down")
    shown = result or replay.values[node]
    return NonFinite(phase, node.name, called_as(node, Symbols()), where.path, where.source, where.code, where.passes, reads, shown,
                     replay.gradients.get(node) if phase == "backward" else None, _advice(node, reads, shown))


def _advice(node: fx.Node, reads: Sequence[Range], result: Range) -> str:
    name = node.target._schema.name.split("::")[1].rstrip("_") if isinstance(node.target, OpOverload) else ""
    if name in _ZERO and any(each.zero for each in reads):
        return "keep what it reads away from zero: add a small number before it, or clamp"
    if any(each.inf for each in reads) and result.nan:
        return "an infinity meets another, or a zero: a row of a mask that hides everything does so"
    if "float16" in result.type and "bfloat16" not in result.type and result.inf:
        return f"the result does not fit float16 (at most {torch.finfo(torch.float16).max:g}): compute it in float32, or in bfloat16"
    if result.inf and result.name.startswith("gradient of "):
        return "the gradient is too large for its dtype: scale the loss down, or look at the ranges that it reads"
    if result.inf and not any(each.bad for each in reads):
        return "the result is too large for its dtype: look at the ranges that it reads"
    return ""
