"""Values on a choice of the rows of a batch: gathered where they enter, computed there, and put back where they leave."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.index import called, full_arguments, static
from fxopt.ir.rows import Layout, RowRule, Step, per_row
from fxopt.kernels.catalog import (add_layer_norm, add_rms_norm, geglu, layer_norm, lora_embedding, lora_linear, quantized_linear, rms_norm, rope,
                                   swiglu)
from fxopt.kernels.live_rows import OVERLOAD

aten = torch.ops.aten

_ABSENT = -99  # a dimension that no value has


def _rotated(node: fx.Node, of: Callable[[Any], Layout | None]) -> Step:
    """Queries and keys are rows; the tables line up with both."""
    key, *tables = node.args[1:4]
    step = per_row(*(("q", "k") if key is not None else ("q",)), outputs=2)(_Without(node, tables), of)
    return Step(step.layout, aligned=tuple(tables))


class _Without:
    """A node as a rule sees it, without some of what it reads."""

    def __init__(self, node: fx.Node, hidden: list[fx.Node]) -> None:
        self.target, self.args, self.kwargs, self.meta = node.target, node.args, node.kwargs, node.meta
        self.all_input_nodes = [x for x in node.all_input_nodes if x not in hidden]


def _adapted(node: fx.Node, of: Callable[[Any], Layout | None]) -> Step:
    return per_row("x", outputs=len(meta.value(node)))(node, of)


def _looked_up(node: fx.Node, of: Callable[[Any], Layout | None]) -> Step:
    layout = per_row("ids", outputs=0, last=0)(node, of).layout
    return Step((layout.moved(lambda d: d - 1),) * 2)


OP_RULES: Mapping[Any, RowRule] = {
    lora_linear.overload: _adapted, lora_embedding.overload: _looked_up, quantized_linear.overload: per_row("x", outputs=0),
    rms_norm.overload: per_row("x"), layer_norm.overload: per_row("x"), add_rms_norm.overload: per_row("x", "residual", outputs=2),
    add_layer_norm.overload: per_row("x", "residual", outputs=2), swiglu.overload: per_row("gate", "up", outputs=0, last=0),
    geglu.overload: per_row("gate", "up", outputs=0, last=0), rope.overload: _rotated,
}


class Space:
    """The live rows of a batch, and what has been computed on them.

    Args:
        edit: where nodes are made.
        keep: the mask of rows that attend to each other, or None. size: nodes or numbers, sequences and tokens of each.
        read: nodes with one bool for each row of a layout: rows that are live whether they are kept or not.
        alike, causal, blank, multiple: as `fxopt::live_rows` takes them.
        like: the node whose provenance the first nodes get; `before`: where they go.
        steps: how each node is run on rows, by node.
    """

    def __init__(self, edit: Edit, keep: fx.Node | None, size: tuple[Any, Any], read: list[tuple[fx.Node, Layout]], alike: list[fx.Node],
                 causal: bool, blank: bool, multiple: int, like: fx.Node, before: fx.Node, steps: Mapping[fx.Node, Step]) -> None:
        self.edit, self.size, self.steps = edit, size, steps
        edit.values = {key: val for key, val in edit.values.items() if key[0] is not OVERLOAD}  # each has a number of rows of its own
        cuts = [cut for _, layout in read for cut in (layout.start, layout.stop)]
        self.call = edit.call(OVERLOAD, (keep, list(size), [x for x, _ in read], cuts, alike, causal, blank, multiple), like=like, before=before)
        items = [edit.call(operator.getitem, (self.call, i), like=like, before=before) for i in range(7)]
        self.place, self.slot, self.sequence, self.position, self.segment, self.real, self.sees = items
        self.count = edit.call(aten.sym_size.int, (self.place, 0), like=like, before=before)
        self.made: dict[fx.Node, fx.Node] = {}
        self.gathered: dict[Any, fx.Node] = {}

    # -- entering ----------------------------------------------------------------------------------------------------

    def gather(self, node: fx.Node, layout: Layout, before: fx.Node) -> fx.Node:
        """The live rows of a value whose dimensions line up with a layout: 1 in place of the batch, the rows in place of the tokens."""
        shape = meta.tensor(node).shape
        held = [d for d in layout.dims if len(shape) >= -d and not meta.same_size(shape[d], 1)]
        if not held:
            return node
        if called(node, aten.unsqueeze.default) and layout.seq != (dim := full_arguments(node)["dim"]):
            inner = layout.moved(lambda d: _ABSENT if d == dim else d if d > dim else d + 1)  # what several layers widen is gathered once
            return self.edit.call(node.target, (self.gather(node.args[0], inner, before), node.args[1]), like=node, before=before)
        key = node, layout, tuple(held)
        if key not in self.gathered:
            self.gathered[key] = self._gather(node, layout, held, before)
        return self.gathered[key]

    def _gather(self, node: fx.Node, layout: Layout, held: list[int], before: fx.Node) -> fx.Node:
        def call(target: Any, *args: Any) -> fx.Node:
            return self.edit.call(target, args, like=node, before=before)

        rank = meta.tensor(node).dim()
        if layout.batch is None:
            return call(aten.index_select.default, node, layout.seq, self._index(node, layout, before))
        if held == [layout.seq]:
            return call(aten.index_select.default, node, layout.seq, self._within(node, layout, before))
        if held == [layout.batch]:
            chosen = call(aten.index_select.default, node, layout.batch, self.sequence)
            return call(aten.transpose.int, chosen, layout.batch, layout.seq) if rank >= -layout.seq else chosen
        order = [d for d in range(-rank, 0) if d != layout.batch]
        at = order.index(layout.seq)
        order.insert(at, layout.batch)
        if order != list(range(-rank, 0)):
            node_ = call(aten.permute.default, node, [d + rank for d in order])
        else:
            node_ = node
        sizes = [self._plain(size, node) for d, size in zip(order, meta.tensor(node_).shape) if d not in layout.dims]
        flat = call(aten.reshape.default, node_, [*sizes[:at], -1, *sizes[at:]])
        return call(aten.unsqueeze.default, call(aten.index_select.default, flat, at, self._index(node, layout, before)), layout.batch + rank)

    def _within(self, node: fx.Node, layout: Layout, before: fx.Node) -> fx.Node:
        """The position of each row in sequences that are cut; for rows that are cut off, any."""
        if not (layout.start or layout.stop):
            return self.position
        edit = self.edit
        last = edit.call(operator.sub, (self.size[1], layout.start + layout.stop + 1), like=node, before=before)
        moved = edit.call(aten.sub.Tensor, (self.position, layout.start), like=node, before=before)
        return edit.call(aten.clamp_min.default, (edit.call(aten.clamp.default, (moved, None, last), like=node, before=before), 0), like=node, before=before)

    def _index(self, node: fx.Node, layout: Layout, before: fx.Node) -> fx.Node:
        """The place of each row among sequences that are cut, one after the other; for rows that are cut off, any."""
        def call(target: Any, *args: Any) -> fx.Node:
            return self.edit.call(target, args, like=node, before=before)

        if not (layout.start or layout.stop):
            return self.place
        length = call(operator.sub, self.size[1], layout.start + layout.stop)
        inside = call(aten.clamp.default, call(aten.sub.Tensor, self.position, layout.start), None, call(operator.sub, length, 1))
        return call(aten.add.Tensor, call(aten.mul.Tensor, self.sequence, length), call(aten.clamp_min.default, inside, 0))

    def target(self, node: fx.Node, layout: Layout, ignored: int, before: fx.Node) -> fx.Node:
        """Labels of the live rows, from labels of the rows of a layout; `ignored` for a row of none and one that is cut off."""
        def call(target: Any, *args: Any) -> fx.Node:
            return self.edit.call(target, args, like=node, before=before)

        index, valid = self._index(node, layout, before), self.real
        flat = node if meta.tensor(node).dim() == 1 else call(aten.reshape.default, node, [-1])
        if layout.start or layout.stop:  # where sequences are no longer than the cut, there is no label at all
            flat = call(aten.cat.default, [flat, call(aten.new_full.default, flat, [1], ignored)])
            valid = call(aten.logical_and.default, valid, call(aten.ge.Scalar, self.position, layout.start))
            valid = call(aten.logical_and.default, valid, call(aten.lt.Scalar, self.position, call(operator.sub, self.size[1], layout.stop)))
        chosen = call(aten.where.ScalarOther, valid, call(aten.index_select.default, flat, 0, index), ignored)
        return chosen if layout.batch is None else call(aten.unsqueeze.default, chosen, 0)

    # -- computing ---------------------------------------------------------------------------------------------------

    def run(self, node: fx.Node) -> fx.Node:
        """The node on the live rows, of which its row arguments are made already; placed before it."""
        step, edit = self.steps[node], self.edit
        if step.how == "cut":
            return self._keep(node, self.made[node.args[0]])

        def new(x: fx.Node) -> fx.Node:
            if x in self.made:
                return self.made[x]
            return self.gather(x, step.layout if isinstance(step.layout, Layout) else step.layout[0], node) if x in step.aligned else x

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), new)
        target = node.target
        if step.how == "shape":
            sizes = self._sizes(node, step.layout)
            target = aten.expand.default if node.target is aten.expand.default else aten.reshape.default
            args, kwargs = (args[0], sizes), {}
        return self._keep(node, edit.call(target, tuple(args), dict(kwargs), like=node))

    def _keep(self, node: fx.Node, new: fx.Node) -> fx.Node:
        self.made[node] = new
        return new

    def _sizes(self, node: fx.Node, layout: Layout) -> list[Any]:
        rank = meta.tensor(node).dim()
        sizes = []
        for d, size in zip(range(-rank, 0), meta.tensor(node).shape):
            sizes.append(self.count if d == layout.seq else 1 if d == layout.batch else self._plain(size, node))
        return sizes

    def _plain(self, size: Any, node: fx.Node) -> Any:
        found = static(size)
        if found is None:
            raise Unsized(node, f"`{node.name}` has a size {size} that is none of rows")
        return found

    # -- leaving -----------------------------------------------------------------------------------------------------

    def scatter(self, node: fx.Node, layout: Layout, before: fx.Node) -> fx.Node:
        """The value of `node`, made on the live rows, as it was: zero for every other row."""
        def call(target: Any, *args: Any) -> fx.Node:
            return self.edit.call(target, args, like=node, before=before)

        x, rank, at = self.made[node], meta.tensor(node).dim(), layout.seq
        if layout.batch is not None:
            x, at = call(aten.squeeze.dim, x, layout.batch), layout.seq + (layout.seq < layout.batch)
        rows, small = call(operator.mul, self.size[0], self.size[1]), meta.tensor(x)
        sizes = [self._plain(size, node) if d != at else call(operator.add, rows, 1) for d, size in zip(range(-small.dim(), 0), small.shape)]
        full_ = call(aten.index_copy.default, call(aten.new_zeros.default, x, sizes), at, self.slot, x)
        full_ = call(aten.slice.Tensor, full_, at, 0, rows)
        where = at + small.dim()
        parts = [*sizes[:where], self.size[0], self.size[1], *sizes[where + 1:]]
        full_ = call(aten.reshape.default, full_, parts)
        if layout.start or layout.stop:
            end = call(operator.sub, self.size[1], layout.stop) if layout.stop else (1 << 63) - 1
            full_ = call(aten.slice.Tensor, full_, where + 1, layout.start, end)
        if layout.batch is None:
            flat = [*sizes[:where], -1, *sizes[where + 1:]]
            return call(aten.reshape.default, full_, flat)
        order = list(range(rank))
        order.remove(where)
        order.insert(layout.batch + rank, where)
        return full_ if order == list(range(rank)) else call(aten.permute.default, full_, order)


class Unsized(Exception):
    """A size that cannot be said on the live rows, and the node that has it."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason
