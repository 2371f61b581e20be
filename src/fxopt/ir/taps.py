"""Taps: a value from the middle of a program, or the gradient of one, as a further output of its graph.

A value is reduced to a number inside the graph, right where it is computed. The gradient of a value comes out through a probe: an
identity `probe(x, z)` whose backward gives its tangent g to x, and `measure(g)` to the extra leaf z, whose `.grad` then holds it. So
both are ordinary parts of the joint graph, whatever is saved or recomputed around them, and there is no hook anywhere.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from fxopt.errors import CallError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, mutates
from fxopt.ir.program import Program, Slot
from fxopt.ir.regions import memory

NAMESPACE = "fxopt_tap"
LOW, HIGH = -32, 16
REDUCTIONS = ("max", "norm", "mean", "histogram", "value")
_LIBRARY = Library(NAMESPACE, "DEF")
_LIBRARY.define("measure(Tensor x, str kind) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("probe(Tensor x, Tensor z, str kind) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@dataclass(frozen=True)
class Tap:
    """What is asked of a program.

    Attributes:
        node: pattern of a node's name (`linear_3`), or of a module's path, whose last value is meant (`*layers.1.mlp`). A pattern that
            matches several means the last of them.
        reduce: "max" of the absolute values, Euclidean "norm", "mean", "histogram", or the whole "value". The first three are 0-dim
            float32 (float64 of a float64 value); a histogram is float32 [HIGH - LOW]: how many elements have an absolute value in
            [2**(LOW+i), 2**(LOW+i+1)), zeros and what is smaller in the first bin, what is larger in the last, NaN in none.
        gradient: of the loss with respect to the value, not the value itself; "value" is not offered for it. Of a batch of several in a
            step it is that of the batch's share of the loss, scaled if the run has a loss scaler.
    """

    node: str
    reduce: str = "max"
    gradient: bool = False

    def __post_init__(self) -> None:
        if self.reduce not in REDUCTIONS or (self.gradient and self.reduce == "value"):
            raise CallError(f"a tap reduces {'a gradient ' if self.gradient else ''}by {self.reduce!r}", where=self.node,
                            do=f"write one of {', '.join(REDUCTIONS[:-1] if self.gradient else REDUCTIONS)}")


def measure(x: Tensor, kind: str) -> Tensor:
    """`x` reduced as `Tap.reduce` says; x itself, copied, for "value"."""
    if kind == "value":
        return x.clone()
    x = x if x.dtype == torch.float64 else x.float()
    if kind == "histogram":
        return torch.histc(x.abs().log2().clamp(LOW, HIGH - 1).float(), bins=HIGH - LOW, min=LOW, max=HIGH)
    if kind == "mean":
        return x.mean()
    if kind == "norm":
        return torch.linalg.vector_norm(x)
    return x.abs().amax() if x.numel() else x.new_zeros(())


def _fake(x: Tensor, kind: str) -> Tensor:
    if kind == "value":
        return x.clone()
    return x.new_empty((HIGH - LOW,), dtype=torch.float32) if kind == "histogram" else x.new_empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.kind = inputs[2]


def _spread(ctx: Any, tangent: Tensor) -> tuple[Any, ...]:
    return tangent, _MEASURE(tangent, ctx.kind).float(), None


_LIBRARY.impl("measure", measure, "CompositeExplicitAutograd")
_LIBRARY.impl("probe", lambda x, z, kind: x.clone(), "CompositeExplicitAutograd")
register_fake(f"{NAMESPACE}::measure", _fake, lib=_LIBRARY)
register_fake(f"{NAMESPACE}::probe", lambda x, z, kind: x.clone(), lib=_LIBRARY)
register_autograd(f"{NAMESPACE}::probe", _spread, setup_context=_save, lib=_LIBRARY)
_MEASURE, _PROBE = getattr(torch.ops, NAMESPACE).measure.default, getattr(torch.ops, NAMESPACE).probe.default


def tapped(program: Program, taps: Mapping[str, Tap]) -> tuple[Program, tuple[str, ...], dict[str, Tensor]]:
    """A program with taps: the value ones are its last outputs, in the order of the names returned; the gradients of the leaves, by name,
    are the gradient ones. The program itself stays as it is.

    Raises:
        CallError: a pattern matches nothing, or only what a pass took away (which, and what is nearest now); a gradient is asked of what has
            none.
    """
    edit = Edit(program, "tap")
    found = {name: edit.mapping[find(program, tap.node)] for name, tap in taps.items()}
    outputs, leaves = list(edit.outputs), {}
    written = {memory(node.all_input_nodes[0]) for node in edit.nodes if node.op == "call_function" and node.all_input_nodes and mutates(node)}
    for name, tap in taps.items():
        if tap.gradient:
            continue
        detached = edit.call(torch.ops.aten.detach.default, (found[name],), like=found[name], before=found[name].next)
        outputs.append(edit.call(_MEASURE, (detached, tap.reduce), like=found[name], before=detached.next))
    edit.set_args(edit.graph.output_node(), (tuple(outputs),))
    for name, tap in taps.items():
        if not tap.gradient:
            continue
        node, value = found[name], meta.tensor(found[name])
        if value is None or not value.is_floating_point() or not node.users or memory(node) in written:
            why = "is written into later" if memory(node) in written else "has no gradient: it is no floating point value that something reads"
            raise CallError(f"{node.name} {why}", where=str(meta.provenance(node)), do="tap a value before or after it")
        leaf = f"tap.{name}.{len(leaves)}"
        leaves[leaf] = torch.zeros((HIGH - LOW,) if tap.reduce == "histogram" else (), device=value.device, requires_grad=True)
        z = edit.state(Slot(leaf, tuple(leaves[leaf].shape), torch.float32, "constant", requires_grad=True), like=node)
        probe = edit.call(_PROBE, (node, z, tap.reduce), like=node, before=node.next)
        edit.replace(node, probe, unless=lambda user, probe=probe: user is probe or user.target is torch.ops.aten.detach.default and any(u.target is _MEASURE for u in user.users))
    made = edit.finish("tap")
    made = made.replace(constants={**program.constants, **leaves}, log=program.log)
    return made, tuple(name for name, tap in taps.items() if not tap.gradient), dict(zip((name for name, tap in taps.items() if tap.gradient), leaves.values()))


def find(program: Program, pattern: str) -> fx.Node:
    """The last node with a tensor as its value that a pattern means: by its name, else by the path of its module.

    Raises:
        CallError: there is none; if an earlier program had one, with the pass that took it away and the nearest node that is left.
    """
    node = _match(program, pattern)
    if node is not None:
        return node
    newer = program
    for older in program.history():
        gone = _match(older, pattern)
        if gone is not None:
            where = meta.provenance(gone)
            near = _nearest(gone, program)
            raise CallError(f"{gone.name} is not in the program any more: `{newer.log[-1].text}` took it away", where=str(where),
                            do=f"the nearest that is left is {near.name} ({meta.provenance(near)})" if near is not None else "nothing behind it is left")
        newer = older
    paths = sorted({meta.provenance(node).path for node in _tensors(program)} - {""})
    raise CallError(f"no node and no module is matched by {pattern!r}", do=f"the modules are {', '.join(paths[:6])}, ...; `print(opt.program.text())` shows the nodes")


def _tensors(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "call_function" and meta.tensor(node) is not None]


def _match(program: Program, pattern: str) -> fx.Node | None:
    nodes = _tensors(program)
    for says in (lambda node: node.name, lambda node: meta.provenance(node).path):
        found = [node for node in nodes if fnmatch.fnmatchcase(says(node), pattern)]
        if found:
            return found[-1]
    return None


def _nearest(gone: fx.Node, program: Program) -> fx.Node | None:
    """What is left of a node that a pass took away: what has its source line in its module, else the first of what read it that is left."""
    where, left = meta.provenance(gone), {node.name: node for node in _tensors(program)}
    same = [node for node in left.values() if where.source and (meta.provenance(node).path, meta.provenance(node).source) == (where.path, where.source)]
    if same:
        return same[-1]
    seen, queue = {gone}, [gone]
    for node in queue:
        if node.name in left:
            return left[node.name]
        queue += [user for user in node.users if user not in seen]
        seen.update(node.users)
    return None
