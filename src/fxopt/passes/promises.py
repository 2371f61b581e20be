"""What a pass promised, checked on the graphs alone: outputs, trainable state, writes, random numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, random
from fxopt.ir.index import Flow, writes
from fxopt.ir.program import Program
from fxopt.passes.base import Pass

aten = torch.ops.aten


def changed(edit: Edit) -> bool:
    """Whether an edit differs from its source: in nodes, arguments, tags, slots, frozen names or assumptions."""
    before = edit.source
    if edit.rewrites or edit.slots != dict(before.slots) or edit.frozen != before.frozen or tuple(edit.assumptions) != before.assumptions:
        return True
    old, new = before.nodes, edit.nodes
    if len(old) != len(new):
        return True
    for a, b in zip(old, new):
        same = (a.name, a.op, a.target) == (b.name, b.op, b.target) and str((a.args, a.kwargs)) == str((b.args, b.kwargs))
        if not same or a.meta.keys() != b.meta.keys() or any(b.meta[key] is not found for key, found in a.meta.items()):
            return True
    return False


def facts(pass_: Pass, before: Program, after: Program) -> dict[str, str | None]:
    """The structural facts that hold between two programs whatever the values are: None, or what is wrong, for each.

    "outputs": number, dtypes, ranks, devices. "inputs": the same ones. "writes": the same buffers and inputs, as often. "gradients":
    the same parameters take one (a pass that declares its gradients may freeze, and train what it made). "random": the same random
    operations in the same order, unless the pass declares its own.
    """
    return {"outputs": _outputs(before, after), "inputs": _inputs(before, after), "writes": _writes(before, after),
            "gradients": _trainable(before, after) if pass_.promise.gradients == "all" else _untrained(before, after),
            "random": _random(before, after) if pass_.promise.random == "same" else None}


def check(pass_: Pass, before: Program, after: Program) -> None:
    """Raise a PassError if `after` breaks what `pass_` promised about `before`: one of `facts` does not hold."""
    broken = next((says for says in facts(pass_, before, after).values() if says is not None), None)
    if broken is not None:
        raise PassError(f"{pass_} broke its promise: {broken}", where=f"pass {pass_.name}", do="this is a bug of the pass: report it with the program's text")


def _kind(out: Any) -> str:
    """What a caller relies on of an output: dtype, rank and device of a tensor, the value of a constant."""
    val = meta.value(out) if isinstance(out, fx.Node) else out
    if isinstance(val, torch.Tensor):
        return f"{str(val.dtype).removeprefix('torch.')} of rank {val.dim()} on {val.device}"
    return type(val).__name__ if isinstance(out, fx.Node) else repr(val)


def _outputs(before: Program, after: Program) -> str | None:
    old, new = before.outputs, after.outputs
    if len(old) != len(new):
        return f"{len(old)} outputs became {len(new)}"
    for i, (a, b) in enumerate(zip(old, new)):
        if _kind(a) != _kind(b):
            return f"output {i} was {_kind(a)} and is {_kind(b)}"
    return None


def _inputs(before: Program, after: Program) -> str | None:
    old, new = [node.target for node in before.placeholders], [node.target for node in after.placeholders]
    return None if old == new else f"the inputs were {old} and are {new}"


def written(program: Program) -> Counter[str]:
    """How often the graph may write into each slot or input, by name."""
    into = [source for node in program.nodes for source in writes(node)]
    flow = Flow(program.graph, program.slots) if into else None
    roots = (root for source in into for root in flow.roots[source])
    return Counter(str(root.target) for root in roots if root.op in ("get_attr", "placeholder"))


def _writes(before: Program, after: Program) -> str | None:
    old, new = written(before), written(after)
    for name in sorted(old.keys() | new.keys()):
        if old[name] != new[name]:
            return f"{name!r} was written {old[name]} times and is written {new[name]} times"
    return None


def differentiable(program: Program) -> set[str]:
    """Trainable slots with a path of differentiable values to an output."""
    written_into = any(True for node in program.nodes for _ in writes(node))
    reached = reaching(program.nodes, program.outputs, Flow(program.graph, program.slots).roots if written_into else {})
    return {str(node.target) for node in reached if node.op == "get_attr" and node.target in program.slots and program.trainable(str(node.target))}


def reaching(nodes: Sequence[fx.Node], outputs: Iterable[object], roots: Mapping[fx.Node, frozenset[fx.Node]]) -> set[fx.Node]:
    """The nodes with a path of differentiable values to an output.

    Args:
        nodes: of a graph, in order.
        roots: whose memory each node's value may share; empty where nothing is written. What is written into memory that is read later
            reaches what its reader reaches, though the reader may take another view of it.
    """
    reached: set[fx.Node] = {out for out in outputs if isinstance(out, fx.Node)}
    memory: set[fx.Node] = {root for node in reached for root in roots.get(node, ())}
    for node in reversed(nodes):
        if node not in reached and any(root in memory for source in writes(node) for root in roots.get(source, ())):
            reached.add(node)
        if node not in reached or node.target is aten.detach.default or not _carries(node):
            reached.discard(node)
            continue
        reached.update(node.all_input_nodes)
        memory.update(root for source in node.all_input_nodes for root in roots.get(source, ()))
    return reached


def _carries(node: fx.Node) -> bool:
    """Whether a gradient can flow through the node's value. Unknown values count as yes."""
    found = meta.tensors(node)
    return not found or any(t.is_floating_point() or t.is_complex() for t in found)


def _trainable(before: Program, after: Program) -> str | None:
    old, new = differentiable(before), differentiable(after)
    if old - new:
        return f"{sorted(old - new)[0]!r} no longer takes a gradient"
    if new - old:
        return f"{sorted(new - old)[0]!r} now takes a gradient"
    return None


def _untrained(before: Program, after: Program) -> str | None:
    """Of a pass that declares its gradients: none of the model's own comes to take one."""
    more = {name for name in differentiable(after) - differentiable(before) if after.slots[name].made is None}
    return f"{min(more)!r} now takes a gradient" if more else None


def _random(before: Program, after: Program) -> str | None:
    old, new = ([node.name for node in program.nodes if node.op == "call_function" and random(node)] for program in (before, after))
    if len(old) != len(new):
        return f"{len(old)} random operations became {len(new)}"
    for i, name in enumerate(old):
        if name in new and new.index(name) != i:
            return f"the random operation {name} moved: the stream of random numbers is another"
    return None
