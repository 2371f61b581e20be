"""What fuse does with a residual add whose result a norm reads: one op, which gives the sum to its other readers as well.

The add is found by data flow, after the norms: whatever a program's norm looks like, it is one node by then.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.ir.index import Flow, called, relaid
from fxopt.kernels.catalog import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fxopt.kernels.op import FusedOp
from fxopt.passes.promises import reaching

aten = torch.ops.aten
_FOLDED = {rms_norm.overload: add_rms_norm, layer_norm.overload: add_layer_norm}
OPS = tuple(op.name for op in _FOLDED.values())


def fold(edit: Edit, ops: Iterable[str] = OPS) -> None:
    """Each norm of a sum that may be made in one place with it becomes one of `ops`."""
    flow, blocks = Flow(edit.graph, edit.slots), repeated(edit.nodes)
    learning = reaching(edit.nodes, edit.outputs, flow.roots)
    for norm in edit.nodes:
        op = _FOLDED.get(norm.target) if norm.op == "call_function" else None
        if op is None or edit.spent or op.name not in ops or not called(norm.args[0], aten.add.Tensor):
            continue
        if norm.args[0] in learning and norm not in learning:
            reason = "nothing takes a gradient through the norm's result, but through the sum"
        else:
            reason = _refusal(flow, blocks, norm.args[0], norm) or _rewrite(edit, op, norm.args[0], norm)
        if reason is not None:
            edit.missed(op.name, norm, reason)


def repeated(nodes: Iterable[fx.Node]) -> frozenset[str]:
    """Paths of the modules that become regions of their own, as far as a graph tells: the outermost entries of lists that hold
    two or more modules of one class with modules inside (`ir.regions.repeated_blocks` asks the model)."""
    kinds: dict[tuple[str, str], set[str]] = {}
    parents: set[str] = set()
    for node in nodes:
        stack = meta.provenance(node).stack
        parents.update(path for path, _ in stack[:-1])
        for path, kind in stack:
            parent, _, name = path.rpartition(".")
            if name.isdigit():
                kinds.setdefault((parent, kind), set()).add(path)
    found = {path for paths in kinds.values() for path in paths & parents if len(paths & parents) > 1}
    return frozenset(path for path in found if not any(path.startswith(f"{other}.") for other in found))


def _block(node: fx.Node, blocks: frozenset[str]) -> str | None:
    return next((path for path, _ in meta.provenance(node).stack if path in blocks), None)


def _refusal(flow: Flow, blocks: frozenset[str], add: fx.Node, norm: fx.Node) -> str | None:
    """Why the two may not be one op."""
    operands, result = add.args[:2], meta.tensor(add)
    values = [meta.tensor(operand) for operand in operands]
    if add.kwargs.get("alpha", 1) != 1 or any(value is None for value in values):
        return "it is no sum of two tensors"
    if any(value.dtype != result.dtype for value in values):
        return "it adds " + " and ".join(meta.describe(value) for value in values)
    if not all(meta.same_shape(value, result) for value in values):
        return "the add broadcasts " + " and ".join(meta.describe(value) for value in values)
    inside = _block(add, blocks), _block(norm, blocks)
    if inside[0] != inside[1]:
        return f"the add is in {inside[0] or 'no block'} and the norm in {inside[1] or 'no block'}: blocks are compiled apart"
    if meta.provenance(add).checkpoint != meta.provenance(norm).checkpoint:
        return "one of the add and the norm is inside a checkpointed region"
    for node in (add, *operands, *norm.all_input_nodes):
        if flow.roots.get(node, frozenset()) & flow.written:
            return f"`{node.name}` is written in place"
    return None


def _rewrite(edit: Edit, op: FusedOp, add: fx.Node, norm: fx.Node) -> str | None:
    """Put the op in; returns why not."""
    order = {node: i for i, node in enumerate(edit.graph.nodes)}
    first = min(add.users, key=order.__getitem__)
    late = [node for node in norm.all_input_nodes if order[node] > order[first]]
    if late:
        return f"`{first.name}` reads the sum before `{late[0].name}` is known"
    call = edit.call(op.overload, (*add.args[:2], *norm.args[1:]), like=norm, before=first)
    others = [user for user in add.users if user is not norm]
    total = edit.call(operator.getitem, (call, 1), like=add, before=first)
    if others and (view := relaid(total, add)) is not None:
        edit.erase(total)
        edit.erase(call)
        return f"the op returns other strides, and `{view.name}` may depend on them"
    for item in list(norm.users):  # the op's results are y, the sum, and the norm's statistics
        index = item.args[1]
        new = edit.call(operator.getitem, (call, index and index + 1), like=item)
        edit.replace(item, new, rule=None if index else rule_here(op.name))
        edit.erase(item)
    edit.erase(norm)
    edit.replace(add, total)
    edit.erase(add)
    if not others:
        edit.erase(total)
    return None
