"""What fuse does with rotations after they are found: whole tensors, narrow dtypes, queries and keys in one op."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.ir.index import called, full_arguments, relaid, static
from fxopt.ir.normal import merge_equal
from fxopt.ir.pattern import CAST, strip
from fxopt.kernels.catalog import rope

aten = torch.ops.aten
_ROPE = rope.overload


def tidy(edit: Edit) -> None:
    """Bring the rotations of a graph into the form that costs least."""
    edit.dead()  # earlier passes leave readers that nobody reads
    merge_equal(edit)  # tables that two patterns made of one
    widen(edit)
    narrow(edit)
    join(edit)


def widen(edit: Edit) -> None:
    """A rotation of the first columns, put back before the others, is a rotation of the whole: the op copies the rest."""
    for cat in edit.nodes:
        if edit.spent or not called(cat, aten.cat.default) or len(cat.args[0]) != 2:
            continue
        turned, rest = cat.args[0]
        if not called(turned, operator.getitem) or not called(turned.args[0], _ROPE) or not called(rest, aten.slice.Tensor):
            continue
        single, part = turned.args[0], strip(turned.args[0].args[0])
        if single.args[1] is not None or not called(part, aten.slice.Tensor) or part.args[0] is not rest.args[0]:
            continue
        last = {full_arguments(node)["dim"] for node in (part, rest)} | {full_arguments(cat)["dim"]}
        width = static(meta.tensor(turned).shape[-1])
        ends = (part.args[2:], rest.args[2:])
        if last != {-1} or ends != ((0, width), (width, sys.maxsize)):
            continue
        outside = [user for node in (single, turned) for user in node.users if user not in (turned, cat)]
        if outside:
            edit.missed("rope.partial", cat, f"the turned columns are also read by {meta.placed(outside[0])}")
            continue
        made = []
        if part is not single.args[0]:  # widened to the tables' dtype, as joining with the rest widens the rest
            made.append(edit.call(CAST, (part.args[0], meta.tensor(cat).dtype), like=cat))
        made.append(edit.call(_ROPE, (made[0] if made else part.args[0], *single.args[1:]), like=cat))
        made.append(edit.call(operator.getitem, (made[-1], 0), like=cat))
        new = made[-1]
        if (view := relaid(new, cat)) is not None:
            edit.missed("rope.partial", cat, f"the op returns other strides, and {meta.placed(view)} may depend on them")
            for node in reversed(made):
                edit.erase(node)
            continue
        edit.replace(cat, new, rule=rule_here("rope.partial"))
        _erase_unread(edit, cat, turned, single, single.args[0], part, rest)


def narrow(edit: Edit) -> None:
    """A rotation of a widened tensor whose result is cast back: the op computes in the wide dtype and rounds once itself."""
    for single in edit.nodes:
        if edit.spent or not called(single, _ROPE) or single.args[1] is not None or not called(single.args[0], CAST):
            continue
        wide, (turned,) = single.args[0], single.users
        x = wide.args[0]
        if not all(called(user, CAST) and meta.tensor(user).dtype == meta.tensor(x).dtype for user in turned.users):
            continue
        call = edit.call(_ROPE, (x, *single.args[1:]), like=turned)
        new = edit.call(operator.getitem, (call, 0), like=turned)
        for cast in list(turned.users):
            edit.replace(cast, new, rule=rule_here("rope.narrow"))
            edit.erase(cast)
        _erase_unread(edit, turned, single, wide)


def join(edit: Edit) -> None:
    """Two rotations by the same tables in one module become one op, which reads the tables once."""
    waiting: dict[Any, fx.Node] = {}
    for node in edit.nodes:
        if not called(node, _ROPE) or node.args[1] is not None:
            continue
        key = (*node.args[2:], meta.tensor(node.args[0]).dtype, meta.provenance(node).path)
        first = waiting.pop(key, None)
        if first is None:
            waiting[key] = node
            continue
        order = {each: i for i, each in enumerate(edit.graph.nodes)}
        turned = [next(iter(each.users)) for each in (first, node)]
        if all(order[user] > order[node] for user in turned[0].users):
            place = node
        elif order[node.args[0]] < order[first]:
            place = first
        else:
            waiting[key] = node
            continue
        both = edit.call(_ROPE, (first.args[0], node.args[0], *node.args[2:]), like=node, before=place)
        for i, old in enumerate(turned):
            new = edit.call(operator.getitem, (both, i), like=old, before=place)
            edit.replace(old, new)
            edit.moved(old, new)
            edit.erase(old)
        edit.erase(node)
        edit.erase(first)


def _erase_unread(edit: Edit, *nodes: fx.Node) -> None:
    """Erase those of the nodes, readers first, that nobody reads any more."""
    for node in dict.fromkeys(nodes):
        if not node.users:
            edit.erase(node)
