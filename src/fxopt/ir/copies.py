"""A captured graph in which some nodes are replaced by copies of other nodes, before it is a Program."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta

_NUMBER = re.compile(r"_\d+$")


@dataclass(frozen=True, eq=False)
class Copy:
    """What stands in the place of a node: copies of other nodes (see `copy_in`).

    Attributes:
        body: the nodes, in order.
        values: nodes from outside to what the copy reads instead.
        results: the items of the value.
        later: nodes to the nodes of the body whose copies are read instead behind it.
        state: names of state, and what is read instead.
        paths, marks: module path and checkpoint region of the body, and those of the copy.
    """

    body: list[fx.Node]
    values: Mapping[fx.Node, fx.Node]
    results: list[fx.Node]
    later: Mapping[fx.Node, fx.Node]
    state: Mapping[str, str]
    paths: tuple[str, str]
    marks: tuple[Any, Any]


def copy_in(graph: fx.Graph, copies: Mapping[fx.Node, Copy], drop: Collection[fx.Node]) -> fx.Graph:
    """A graph without `drop`, in which each node of `copies`, whose value is a list, is replaced. Calls and checkpoint regions are numbered anew."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    reads = {node.target: node for node in graph.nodes if node.op == "get_attr"}
    numbers: dict[Any, int] = {}

    def emit(node: fx.Node, local: Mapping[fx.Node, fx.Node]) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: local[n] if n in local else env[n])
        name = _NUMBER.sub("", node.name) if node.op == "call_function" else node.name
        made = new.create_node(node.op, node.target, args, kwargs, name)
        made.meta = dict(node.meta)
        return made

    def number(node: fx.Node, mark: Any) -> None:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            mark = None  # torch gives it the mark of whatever ran before
        if "custom" in node.meta:
            rest = {key: value for key, value in node.meta["custom"].items() if key != "checkpoint"}
            node.meta["custom"] = rest if mark is None else {**rest, "checkpoint": numbers.setdefault(mark, len(numbers))}
            was = meta.provenance(node)
            node.meta[meta.PROVENANCE] = replace(was, checkpoint=node.meta["custom"].get("checkpoint"))

    for node in graph.nodes:
        copy = copies.get(node)
        if copy is None:
            if node not in drop and not (node.target is operator.getitem and node.args[0] in copies):
                env[node] = emit(node, {})
                number(env[node], meta.provenance(node).checkpoint)
            continue
        local = {old: env[now] for old, now in copy.values.items()}
        local.update((read, env[reads[copy.state[name]]]) for name, read in reads.items() if copy.state.get(name, name) != name and read not in local)
        around = meta.provenance(node).stack
        for old in copy.body:
            local[old] = made = emit(old, local)
            made.meta.update(meta.moved(old, *copy.paths, around))
            mark = meta.provenance(old).checkpoint
            number(made, copy.marks[1] if mark == copy.marks[0] else (node, mark))
        env.update((now, local[then]) for now, then in copy.later.items())
        for item in node.users:
            env[item] = local[copy.results[item.args[1]]]
    return new


def moved_state(graph: fx.Graph, old: str, new: str) -> fx.Graph:
    """A copy of a graph, with the same node names, in which the module at `old` is the one at `new`: its state and its places."""
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = made = copy.node_copy(node, env.__getitem__)
        if node.op == "get_attr" and str(node.target).startswith(f"{old}."):
            made.target = new + str(node.target)[len(old):]
        made.meta = dict(node.meta)
        made.meta.update(meta.moved(node, old, new, meta.provenance(node).stack))
    return copy
