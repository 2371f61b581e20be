"""Rows that are sorted by a key and put back: what a mixture of experts does with its tokens.

Sorting brings rows of all samples together, and nothing is lost by it as long as each row is still computed by itself: element by
element, or by the matrix that belongs to its key. `Rows.order` names the sort whose order the rows are in; an `Order` is a tensor of
numbers about that order. Indexing with the inverse of the permutation puts the rows back.
"""

from __future__ import annotations

from dataclasses import replace

import torch.fx as fx

from fxopt.ir.index import full_arguments
from fxopt.ir.sample_rules import RULES, free_along, rank_of
from fxopt.ir.samples import Free, Mixed, Order, Rows, Samples, State, operator_name

_LIKE = ("empty_like", "zeros_like")
_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


def ordered(samples: Samples, node: fx.Node) -> State | None:
    """The state of a node that sorts rows, or that reads sorted rows or their order; None where neither is so."""
    name = operator_name(node)
    first = node.args[0] if node.args else None
    states = [samples[source] for source in node.all_input_nodes]
    orders = [state for state in states if isinstance(state, Order)]
    sorted_rows = [state for state in states if isinstance(state, Rows) and state.order is not None]
    if name in ("sort", "argsort") and isinstance(first, fx.Node) and isinstance(key := samples[first], Rows) and rank_of(first) == 1 and not sorted_rows:
        samples.keys[node] = replace(key, data=False)
        return Order(node, "sorted" if name == "sort" else "permutation")
    if not orders and not sorted_rows:
        return None
    if not orders and (name in _ROW_BY_ROW or RULES.get(name) is RULES["pointwise"] or samples.rule(node) is RULES["pointwise"]):
        return None  # as for rows in their own order
    return _of_order(samples, node, name) or Mixed(node, f"`{name}` reads rows of all samples in the order of their keys")


_ROW_BY_ROW = frozenset({"chunk", "split", "split_with_sizes", "slice", "unsqueeze", "linear"})


def _of_order(samples: Samples, node: fx.Node, name: str) -> State | None:
    first, second = (*node.args, None, None)[:2]
    own = samples[first] if isinstance(first, fx.Node) else None
    if isinstance(own, Order):
        if own.role == "key" and name in ("to", "_to_copy", "clone", "contiguous"):
            return own
        if own.role == "key" and name == "histc" and (bins := full_arguments(node)["bins"]) == full_arguments(node)["max"] + 1 and full_arguments(node)["min"] == 0 and bins:
            return Order(own.sort, "sizes")  # keys are whole numbers: one bin for each
        if own.role == "sizes" and name == "cumsum":
            return Order(own.sort, "ends")
        if own.role == "permutation" and name in ("floor_divide", "div") and isinstance(second, int) and own.each == 1:
            floors = name == "floor_divide" or full_arguments(node).get("rounding_mode") == "floor"
            return replace(own, each=second) if floors else None
        if own.role == "permutation" and name in _LIKE:
            return replace(own, role="like")
        if own.role == "permutation" and name == "argsort" and own.each == 1:
            return replace(own, role="inverse")
        if own.role == "like" and name == "index_put":
            return _inverse(samples, own, node.args[1], node.args[2])
        return None
    if name == "index" and isinstance(own, Rows) and len(second) == 1 and own.dim == -rank_of(first):
        order = samples[second[0]]
        key = samples.keys.get(order.sort) if isinstance(order, Order) else None
        if key is None or own.over != key.over or own.by is not None:
            return None
        if order.role == "permutation" and own.order is None and own.under * order.each == key.under:
            return Rows(own.dim, key.over, key.under, data=False, order=order.sort)
        if order.role == "inverse" and own.order is order.sort:
            return Rows(own.dim, key.over, key.under, data=False)
        return None
    if name in _GROUPED and isinstance(own, Rows) and own.dim == -2 and isinstance(samples[second], Free) and len(node.args) > 2:
        ends = samples[node.args[2]]
        if isinstance(ends, Order) and ends.role == "ends" and ends.sort is own.order and own.by is None and not free_along(second, -3):
            return replace(own, data=False)
    return None


def _inverse(samples: Samples, like: Order, indices: list[fx.Node], values: fx.Node) -> State | None:
    """What counts up at the places of a permutation is its inverse."""
    at, counting = samples[indices[0]], samples[values]
    whole = len(indices) == 1 and isinstance(at, Order) and at == replace(like, role="permutation") and at.each == 1
    return replace(like, role="inverse") if whole and isinstance(counting, Order) and counting.role == "counting" else None
