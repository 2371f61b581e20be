"""Where to cast: the least bytes through casts, exactly, as a minimum cut.

Every value exists in the dtype of the node that makes it, and at most once more in the other one, shared by all readers that want
that. So a value costs one cast if the nodes that make and read it do not all have one dtype, and nothing if they do: the
cost of a hyperedge that is cut. Hyperedges are submodular, so the best choice for the nodes that are free to choose is a minimum cut:
each becomes two extra vertices with an edge of its cost between them (Lawler, 1973, "Cutsets and partitions of hypergraphs",
Networks 3(3)). Nodes that may not choose are the source and the sink; between them the graph falls into small components.

Among equal cuts the one with the most nodes in the narrow dtype is taken. It is unique, so equal layers come out equal.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx

Vertex = Hashable


@dataclass(frozen=True)
class Value:
    """One value: the nodes that make or read it, and what a cast of it costs (in bytes moved)."""

    members: tuple[Vertex, ...]
    cost: int


def choose(fixed: Mapping[Vertex, bool], values: Iterable[Value]) -> dict[Vertex, bool]:
    """Whether each node is narrow.

    Args:
        fixed: the nodes that may not choose. Every other member of a value is free.
    """
    values = [value for value in values if len(set(value.members)) > 1]
    neighbours = networkx.utils.UnionFind()
    for value in values:
        free = [member for member in value.members if member not in fixed]
        neighbours.union(*free)
    groups: dict[Vertex, list[Value]] = {}
    for value in values:
        free = [member for member in value.members if member not in fixed]
        if free:
            groups.setdefault(neighbours[free[0]], []).append(value)
    found = dict(fixed)
    for group in groups.values():
        found |= _solve(fixed, group)
    return found


def _solve(fixed: Mapping[Vertex, bool], values: Sequence[Value]) -> dict[Vertex, bool]:
    """The free members of some values. Narrow is the source's side."""
    free = {member: None for value in values for member in value.members if member not in fixed}
    ends = {fixed[member] for value in values for member in value.members if member in fixed}
    if len(ends) < 2:
        return dict.fromkeys(free, ends != {False})
    graph = networkx.DiGraph()
    for i, value in enumerate(values):
        members = {("narrow" if fixed[member] else "wide") if member in fixed else (member,): None for member in value.members}
        if len(members) < 2:
            continue
        graph.add_edge(("in", i), ("out", i), capacity=value.cost)
        for member in members:
            graph.add_edge(member, ("in", i))  # no capacity: without end
            graph.add_edge(("out", i), member)
    _, (narrow, _) = networkx.minimum_cut(graph, "narrow", "wide")  # the other side is what still reaches the sink: the fewest nodes
    return {member: (member,) in narrow for member in free}


def casts(labels: Mapping[Vertex, bool], values: Iterable[Value]) -> int:
    """How many values have to be cast."""
    return sum(len({labels[member] for member in value.members}) > 1 for value in values)
