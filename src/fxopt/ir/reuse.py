"""In-place reuse: an operation writes its result over an operand that nobody reads later.

In the graphs of regions alone, whose values no user sees: an operand qualifies if the same graph made it, nothing that shares its memory
is read later or returned, and the result has its dtype, sizes and strides. What one graph hands to another (a value kept for the
backward) is returned, so it is never overwritten: a second backward finds it as it was.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.index import called
from fxopt.ir.region_graph import retarget
from fxopt.ir.tiling import Tiled
from fxopt.torch_private import OpOverload

aten = torch.ops.aten
_SWAPS = {aten.add.Tensor, aten.mul.Tensor}


def reuse(module: fx.GraphModule) -> int:
    """Make what can be in place so, in the graph and in its tiled parts. Returns how many operations were changed."""
    found = _in_graph(module.graph) + sum(reuse(part.body) for part in module.children() if isinstance(part, Tiled))
    if found:
        module.recompile()
    return found


def _in_graph(graph: fx.Graph) -> int:
    order = {node: at for at, node in enumerate(graph.nodes)}
    root: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        root[node] = root[node.args[0]] if node.args and isinstance(node.args[0], fx.Node) and not _fresh(node) else node
    last: dict[fx.Node, int] = {}  # when the memory of a value is read last
    for node in graph.nodes:
        for source in node.all_input_nodes:
            for memory in {root[source], *_others(source, root)}:
                last[memory] = order[node]
    whole = {node for node in graph.nodes if root[node] is node and _fresh(node)}  # values that are all of their memory
    changed = 0
    for node in list(graph.nodes):
        twin = _twin(node)
        if twin is None:
            continue
        swaps = (False, True) if node.target in _SWAPS and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2 else (False,)
        for swap in swaps:
            args = (node.args[1], node.args[0]) if swap else node.args
            if isinstance(args[0], fx.Node) and args[0] in whole and _dies(args[0], node, root, last, order):
                retarget(node, twin, tuple(args))
                whole.add(node)
                memory = root[args[0]]
                last[memory] = max(last[memory], last.get(node, order[node]))
                root = {value: memory if at is node else at for value, at in root.items()}
                changed += 1
                break
    return changed


def _others(source: fx.Node, root: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """Memory that a value may share beside its first argument's: an operation of which nothing is known, or a tiled part, may return any
    of its arguments."""
    source = source.args[0] if called(source, operator.getitem) and isinstance(source.args[0], fx.Node) else source
    if source.op not in ("call_function", "call_module") or _fresh(source) or isinstance(source.target, OpOverload):
        return set()
    return {root[each] for each in source.all_input_nodes}


def _fresh(node: fx.Node) -> bool:
    """Whether the value is memory of its own."""
    if called(node, operator.getitem):
        return isinstance(node.args[0], fx.Node) and _fresh(node.args[0])
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    return all(each.alias_info is None for each in node.target._schema.returns)


def _twin(node: fx.Node) -> Any:
    """The operation in place, if there is one that writes its first argument alone."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or target.namespace != "aten" or torch.Tag.pointwise not in target.tags:
        return None
    packet = getattr(aten, target._schema.name.split("::")[1] + "_", None)
    twin = getattr(packet, target._overloadname, None) if packet is not None else None
    if twin is None or [a.name for a in twin._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in twin._schema.arguments]
    return twin if written[0] and not any(written[1:]) else None


def _dies(operand: fx.Node, node: fx.Node, root: dict[fx.Node, fx.Node], last: dict[fx.Node, int], order: dict[fx.Node, int]) -> bool:
    """Whether the node is the last that reads the operand's memory, reads it through the operand alone, and has a value of its kind."""
    a, b, memory = meta.tensor(operand), meta.tensor(node), root[operand]
    if a is None or b is None or last.get(memory) != order[node]:
        return False
    if a.dtype != b.dtype or a.dim() != b.dim() or a.device != b.device or any(other is not operand and root[other] is memory for other in node.all_input_nodes):
        return False
    return all(meta.same_size(x, y) for x, y in zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True)) and a.is_contiguous()
