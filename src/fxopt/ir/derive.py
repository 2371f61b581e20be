"""A second way to a value: what the backward reads may be had from less than what the forward made it from.

A norm with a residual add folded in reads two tensors. Recomputed in the backward from those, its results cost two saved
tensors; from the sum, which the norm's own gradient reads anyway, they cost one, and half the reads.
"""

from __future__ import annotations

import operator
from collections.abc import Container

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.index import called, full_arguments
from fxopt.ir.region_graph import call_behind, drop_unread
from fxopt.torch_private import OpOverload

# f(x, residual, *rest) = (y, sum, *statistics), where g(sum, *rest) = (y, *statistics).
_OF_A_SUM = {"fxopt::add_rms_norm": "rms_norm", "fxopt::add_layer_norm": "layer_norm"}


def _items(node: fx.Node) -> dict[int, fx.Node]:
    """The results of a node that has a second way, by position; empty for any other node, and where nobody reads the sum."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or node.target._schema.name not in _OF_A_SUM:
        return {}
    found = {user.args[1]: user for user in node.users if called(user, operator.getitem)}
    return found if 1 in found else {}


def sources(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each value with a second way, the value that it can be computed from."""
    return {item: items[1] for node in graph.nodes if (items := _items(node)) for index, item in items.items() if index != 1}


def shorten(graph: fx.Graph) -> None:
    """Calls of which a backward reads a by-product alone, computed without the rest: of an adapted linear layer x A^T, [rows, rank], without
    the product of x with the weight."""
    for node in list(graph.nodes):
        if node.op != "call_function" or str(node.target) != "fxopt.lora_linear.default":
            continue
        given = full_arguments(node)
        low, (a, *others) = len(given["formats"]), given["lora_a"]
        small = [user for user in node.users if called(user, operator.getitem) and user.args[1] == low]
        if len(small) != 1 or len(node.users) != 1 or others or given["dropout"] or meta.tensor(a).dtype != meta.tensor(given["x"]).dtype:
            continue
        call_behind(graph, node, torch.ops.aten.linear.default, (given["x"], a), meta.value(small[0]), small[0], {small[0]: None})
    drop_unread(graph)


def take(graph: fx.Graph, saved: Container[fx.Node]) -> list[fx.Node]:
    """From here on, values that are not saved come the second way, where that starts from a saved one. Returns the new nodes."""
    made: list[fx.Node] = []
    for node in list(graph.nodes):
        items = _items(node)
        instead = {item: max(index - 1, 0) for index, item in items.items() if index != 1 and item not in saved}
        if instead and items[1] in saved:
            norm = getattr(torch.ops.fxopt, _OF_A_SUM[node.target._schema.name]).default
            val = tuple(value for index, value in enumerate(meta.value(node)) if index != 1)
            made += call_behind(graph, items[1], norm, (items[1], *node.args[2:]), val, node, instead)
    return made
