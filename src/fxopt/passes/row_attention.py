"""Attention on a choice of rows: queries of the rows that are live, keys and values of all."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.index import arguments, called, static
from fxopt.ir.rows import Layout, Mixed, Step
from fxopt.kernels.catalog import packed_attention, rope
from fxopt.kernels.live_attention import OVERLOAD
from fxopt.kernels.packed_attention.torch_kernels import FLOATS
from fxopt.passes.row_plan import Plan
from fxopt.passes.row_space import Space

aten = torch.ops.aten
_MOVES = (aten.transpose.int, aten.permute.default, aten.reshape.default, aten.view.default, aten.contiguous.default, aten.to.dtype, operator.getitem)


@dataclass(frozen=True)
class Attended:
    """What an attention reads, as `fxopt::live_attention` takes it."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    segments: fx.Node | None
    mask: fx.Node | None
    scale: float | None
    causal: bool

    @property
    def whole(self) -> tuple[fx.Node, ...]:
        """What is read for all rows."""
        return tuple(x for x in (self.key, self.value, self.segments, self.mask) if x is not None)


def attended(node: fx.Node, plan: Plan) -> Attended | str | None:
    """What an attention reads; why it cannot be computed for some rows alone; None if it is no attention."""
    given = arguments(node)
    if called(node, packed_attention.overload):
        found = Attended(given["query"], given["key"], given["value"], given["segments"], None, given.get("scale"), bool(given.get("causal")))
    elif called(node, aten.scaled_dot_product_attention.default):
        mask = given.get("attn_mask")
        if given.get("dropout_p"):
            return "it drops out, and attention for some rows has no dropout"
        if mask is not None and (not plan.cheap(mask) or meta.tensor(mask).dim() not in (2, 4)):
            return "its mask is computed by the model, or is not one of [batch, heads, seq, seq]"
        found = Attended(given["query"], given["key"], given["value"], None, mask, given.get("scale"), bool(given.get("is_causal")))
    else:
        return None
    query, key = meta.tensor(found.query), meta.tensor(found.key)
    if query.dim() != 4 or key.dim() != 4 or query.dtype not in FLOATS:
        return "its queries are not floats [batch, heads, seq, width]"
    if not meta.same_size(query.shape[2], key.shape[2]) or not meta.same_size(query.shape[0], key.shape[0]):
        return "it has other keys than its own rows"
    if found.query in found.whole:
        return "its queries are its keys"
    return found


def step(node: fx.Node, found: Attended, of: Callable[[Any], Layout | None]) -> Step:
    """How it runs on rows."""
    layout = of(found.query)
    if layout is None or layout.seq != -2 or layout.start or layout.stop or layout.batch not in (None, -4):
        raise Mixed("the sizes of its queries do not show their rows")
    if layout.batch is None and static(meta.tensor(found.query).shape[0]) != 1:
        raise Mixed("its queries are several batches of rows")
    return Step((layout,) if isinstance(meta.value(node), tuple) else layout)


def attend(edit: Edit, space: Space, node: fx.Node, found: Attended) -> fx.Node:
    """The attention of the live rows, whose queries are made already."""
    mask = found.mask
    while mask is not None and meta.tensor(mask).dim() < 4:
        mask = edit.call(aten.unsqueeze.default, (mask, 0), like=node)
    call = edit.call(OVERLOAD, (space.made[found.query], found.key, found.value, space.place, space.real, found.segments, mask, found.scale, found.causal),
                     like=node)
    return call if isinstance(meta.value(node), tuple) else edit.item(call, 0, like=node)


def rotated_together(found: Attended) -> fx.Node | None:
    """The rotation that turns the queries of an attention together with keys."""
    for node in _behind(found.query):
        if called(node, rope.overload):
            return node if node.args[1] is not None and any(user.args[1] == 1 for user in node.users) else None
    return None


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    while called(node, *_MOVES):
        node = node.args[0]
        yield node


def apart(edit: Edit, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """A rotation of queries and keys as two, with the same values."""
    query, key, *rest = node.args
    pair = tuple(edit.call(rope.overload, (x, None, *rest), like=node) for x in (query, key))
    for user in list(node.users):
        edit.replace(user, edit.item(pair[user.args[1]], 0, like=user))
        edit.erase(user)
    edit.erase(node)
    return pair
