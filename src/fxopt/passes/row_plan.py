"""Which nodes run on a choice of rows: layouts followed forwards from the inputs, and what is cheap enough to stay in full."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, effectful
from fxopt.ir.index import called, full_arguments
from fxopt.ir.rows import Layout, Mixed, Step, step_of
from fxopt.passes.row_space import OP_RULES

aten = torch.ops.aten


class Stopped(Exception):
    """Why rows cannot be left out, and the node at which that shows."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class Plan:
    """Layouts and steps by node.

    Attributes:
        layouts: where the rows are, of each value that holds rows; items: the same of values that are tuples.
        steps: how a node is run on a choice of rows.
    """

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.inputs = [node for node in edit.nodes if node.op == "placeholder"]
        self.layouts: dict[fx.Node, Layout] = {}
        self.items: dict[fx.Node, tuple[Layout | None, ...]] = {}
        self.steps: dict[fx.Node, Step] = {}
        self._costly: set[fx.Node] = set()
        for node in edit.nodes:
            slot = edit.slots.get(node.target) if node.op == "get_attr" else None
            floating = any(x.is_floating_point() or x.is_complex() for x in meta.tensors(node))
            own = floating and (node.op == "placeholder" or slot is not None and slot.kind == "parameter") or node.op == "call_function" and effectful(node)
            if own or any(x in self._costly for x in node.all_input_nodes):
                self._costly.add(node)

    def cheap(self, node: fx.Node) -> bool:
        """Whether a value comes from integers of the call alone (labels, masks, positions): it stays as it is, for all rows."""
        return node not in self._costly

    def try_rows(self, node: fx.Node) -> str | None:
        """Plan to run a node on rows; returns why that is impossible."""
        try:
            step = self.step(node)
        except Mixed as mixed:
            return str(mixed)
        self.steps[node] = step
        if isinstance(step.layout, tuple):
            self.items[node] = step.layout
        else:
            self.layouts[node] = step.layout
        return None

    def step(self, node: fx.Node) -> Step:
        """How the node runs on rows, from the layouts of what it reads."""
        if node.target is operator.getitem:
            found = self.items.get(node.args[0], ())
            layout = found[node.args[1]] if isinstance(node.args[1], int) and node.args[1] < len(found) else None
            if layout is None:
                raise Mixed("it reads an item that holds no rows")
            return Step(layout)
        if any(x in self.items for x in node.all_input_nodes):
            raise Mixed("it reads several values at once")
        return step_of(node, self.layouts.get, OP_RULES)

    def lift(self, nodes: Iterable[fx.Node], before: fx.Node | None = None) -> fx.Node:
        """Move what computes some cheap nodes to the front; returns the first node behind them that calls something."""
        edit = self.edit
        early: set[fx.Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in early and node.op in ("call_function", "get_attr"):
                if effectful(node):
                    raise Stopped(node, "labels depend on what it does")
                early.add(node)
                waiting += node.all_input_nodes
        first = next(node for node in edit.nodes if node.op == "call_function" and node not in early)
        for node in edit.nodes:
            if node in early:
                edit.move_before(node, first)
        return first

    def resize(self, whole: fx.Node) -> None:
        """Sizes that are read of values on rows are those of an input [batch, seq]: else the values would be computed for them."""
        for node in self.edit.nodes:
            if not called(node, aten.sym_size.int) or node.args[0] in self.inputs or node.args[0] not in self.layouts:
                continue
            layout, dim = self.layouts[node.args[0]], full_arguments(node)["dim"]
            if layout.batch is not None and dim in layout.dims and not layout.start and not layout.stop:
                new = self.edit.call(aten.sym_size.int, (whole, layout.dims.index(dim)), like=node)
                self.edit.replace(node, new)

    def drop(self, nodes: Iterable[fx.Node]) -> None:
        """Erase those of these nodes that nobody reads any more, random ones too: they were made anew."""
        dropped = set(nodes)
        for node in reversed(self.edit.nodes):
            if node in dropped and not node.users:
                self.edit.erase(node)
        left = [node for node in self.edit.nodes if node in dropped and not self.cheap(node)]
        if left:
            self.edit.note(f"{len(left)} values are still computed for all rows: `{left[-1].name}` is read by `{next(iter(left[-1].users)).name}`")


def hint(size: Any) -> int | None:
    """The example's value of a size."""
    return size.node.hint if isinstance(size, torch.SymInt) else size
