"""Losses over rows with a label each: which rows count, and the loss of a choice of rows that holds all that do."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.index import arguments
from fxopt.ir.rows import Layout
from fxopt.kernels.catalog import cross_entropy, linear_cross_entropy
from fxopt.passes.row_space import Space

aten = torch.ops.aten

# The argument that holds rows, and the items of the value that are no rows, by operator.
LOSSES: Mapping[Any, tuple[str, tuple[int, ...]]] = {
    linear_cross_entropy.overload: ("hidden", (0, 1)), cross_entropy.overload: ("logits", (0, 4)), aten.cross_entropy_loss.default: ("self", (0,)),
}


@dataclass(frozen=True)
class RowLoss:
    """A loss that is the mean or the sum over rows whose label counts.

    Attributes:
        node: the loss. rows: what it is computed from, [..., width]. target: a label for each row.
        layout: of the labels. ignored: the label of rows that do not count.
    """

    node: fx.Node
    rows: fx.Node
    target: fx.Node
    layout: Layout
    ignored: int

    @classmethod
    def of(cls, node: fx.Node, layout_of: Callable[[fx.Node], Layout | None]) -> RowLoss | str | None:
        """The loss that a node computes of rows; why it is none over rows that may be left out; None if of no rows."""
        name, plain = LOSSES[node.target]
        given = arguments(node)
        rows, target = given[name], given["target"]
        layout = layout_of(rows)
        if layout is None:
            return None
        if layout.seq >= -1:
            return "its classes are not the last dimension"
        if meta.tensor(target).is_floating_point() or meta.tensor(target).dim() != meta.tensor(rows).dim() - 1:
            return "its labels are not one class for each row"
        if given.get("reduction", 1) in (0, "none"):
            return "it is a loss of each row"
        if not isinstance(given.get("ignore_index", -100), int):
            return "the label that it ignores is a size of the call, not a number"
        wanted = [user.args[1] for user in node.users if user.target is operator.getitem]
        if any(item not in plain for item in wanted):
            return "statistics of each row are read of it"
        return cls(node, rows, target, layout.moved(lambda d: d + 1), given.get("ignore_index", -100))

    def counted(self, edit: Edit, before: fx.Node) -> tuple[fx.Node, Layout]:
        """Whether the label of each row counts, and the layout of that."""
        return edit.call(aten.ne.Scalar, (self.target, self.ignored), like=self.target, before=before), self.layout

    def build(self, edit: Edit, space: Space) -> fx.Node:
        """The same loss, of the rows of a space."""
        target = space.target(self.target, self.layout, self.ignored, self.node)
        new = {self.rows: space.made[self.rows], self.target: target}
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), lambda x: new.get(x, x))
        call = edit.call(self.node.target, tuple(args), dict(kwargs), like=self.node)
        edit.replace(self.node, call)
        return call
