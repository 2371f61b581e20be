"""compact: behind the last operation that mixes rows, only rows whose label counts are computed."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import sympy
import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, effectful, rule_here
from fxopt.ir.index import called
from fxopt.ir.program import Lazy
from fxopt.ir.rows import Layout, Mixed, Step, expression, step_of
from fxopt.kernels.catalog import lora_linear, quantized_linear
from fxopt.passes.base import Pass, Promise
from fxopt.passes.row_attention import Attended, apart, attend, attended, rotated_together, step as attention_step
from fxopt.passes.row_loss import LOSSES, RowLoss
from fxopt.passes.row_plan import Plan, Stopped
from fxopt.passes.row_space import OP_RULES, Space, Unsized

aten = torch.ops.aten

_PRODUCTS = (aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default, lora_linear.overload, quantized_linear.overload)
_LAYOUT = (aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.slice.Tensor, aten.split.Tensor,
           aten.chunk.default, aten.alias.default, aten.detach.default, aten.contiguous.default)


@dataclass(frozen=True)
class Compact(Pass):
    """rows that no loss counts go no further than their keys and values in the last attention

    A row whose label is ignored matters only through what other rows read of it: in the last layer its keys and values. All else
    (queries: their projection, norm, rotation; the attention of these queries to all keys, its projection, the residual, norms, the MLP, the
    final norm) is computed for the rows that count alone; the loss op then has no others. It is proven operation by operation, backwards from the loss, that row r
    of a value needs row r of the ones before; the first that mixes rows ends it, attention aside, from which it goes on along the queries.
    Queries stay those of all rows where their product also makes keys or values. The loss and all gradients are equal.
    Logits that the model also returns are computed, when the caller reads them, from what came before: for all rows, and
    equal. Values that are returned otherwise are computed for all rows, and end it too. A dropout in an adapter draws
    other masks of the same law.

    Args:
        multiple: the number of rows is rounded up to it, so that few different sizes occur.
    """

    multiple: int = 8

    name: ClassVar[str] = "compact"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    promise: ClassVar[Promise] = Promise(values="tolerance", random="declared")

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise PassError(f"compact: multiple must be at least 1, got {self.multiple}")

    def run(self, edit: Edit) -> None:
        """Try every loss over rows."""
        for node in edit.nodes:
            if node.op == "call_function" and node.target in LOSSES and not edit.spent:
                try:
                    _compact(edit, node, self.multiple)
                except (Stopped, Unsized) as stopped:
                    edit.missed("rows that count", stopped.node, stopped.reason)
        edit.dead()


@dataclass(frozen=True)
class _Sizes:
    """How a value shows that it holds the rows: by its sizes, which only rows have.

    Attributes:
        batch: sequences, or None where all rows are in one dimension. seq: tokens of each, or rows.
        start, stop: tokens that the labels leave out.
    """

    batch: sympy.Expr | None
    seq: sympy.Expr
    start: int = 0
    stop: int = 0

    @classmethod
    def of(cls, rows: fx.Node) -> _Sizes:
        """The rows that a loss reads, [..., width]: followed back through views, and through the cut of a shift."""
        node, start, stop = rows, 0, 0
        while called(node, aten.view.default, aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints):
            node = node.args[0]
        shape = meta.tensor(node).shape
        if len(shape) >= 3 and called(node, aten.slice.Tensor):
            try:
                step = step_of(node, lambda x: Layout(-2, -3) if x is node.args[0] else None, {})
            except Mixed:
                step = None  # a cut at a length: the rows are those that are left
            if step is not None and step.how == "cut":
                start, stop, shape = step.layout.start, step.layout.stop, meta.tensor(node.args[0]).shape
        sizes = [expression(size) for size in shape]
        if len(sizes) >= 3 and not sizes[-3].is_Integer and not sizes[-2].is_Integer:
            return cls(sizes[-3], sizes[-2], start, stop)
        return cls(None, sizes[-2])

    @property
    def fixed(self) -> bool:
        """Whether a size is a number, which others may have too."""
        return self.seq.is_Integer or self.batch == self.seq

    def layout(self, x: Any) -> Layout | None:
        """Where a value has its rows; None if its sizes do not say it."""
        val = meta.tensor(x)
        return None if val is None else self.layout_of(val)

    def layout_of(self, val: torch.Tensor) -> Layout | None:
        """As `layout`."""
        sizes = {d: sympy.expand(expression(val.shape[d])) for d in range(-val.dim(), 0)}

        def only(wanted: sympy.Expr) -> int | None:
            found = [d for d, size in sizes.items() if size == sympy.expand(wanted)]
            return found[0] if len(found) == 1 else None

        if self.batch is None:
            found = only(self.seq)
            return None if found is None else Layout(found)
        cut = self.seq - self.start - self.stop
        for seq, start, stop in ((self.seq, 0, 0), (cut, self.start, self.stop)):
            token, sequence, row = only(seq), only(self.batch), only(self.batch * seq)
            if token is not None and sequence is not None:
                return Layout(token, sequence, start, stop)
            if row is not None:
                return Layout(row, None, start, stop, (self.batch, seq))
        return None


class _Reach:
    """What lies between the last operations that mix rows and a loss.

    Attributes:
        steps: how each of those nodes is run on rows, in order.
        stops: why it ends, by the node at which it does.
        attentions: those that are computed for the rows' queries alone; it goes on from their queries.
        turned: rotations of queries and keys, taken as rotations of queries alone.
    """

    def __init__(self, edit: Edit, loss: RowLoss, sizes: _Sizes, attentions: Mapping[fx.Node, Attended] = MappingProxyType({}),
                 turned: frozenset[fx.Node] = frozenset()) -> None:
        self.edit, self.sizes, self.steps, self.stops, self.attentions, self.turned = edit, sizes, {}, {}, attentions, turned
        nodes = edit.nodes
        lazy = _lazy(edit)
        inside: dict[fx.Node, Step] = {}
        for node in reversed(nodes[: nodes.index(loss.node)]):
            readers = [user for user in node.users if user in inside and self._of_rows(user, node) or user is loss.node and node is loss.rows]
            if node.op != "call_function" or not readers:
                continue
            why = self._why_not(node, readers, lazy)
            if why is None:
                inside[node] = self._step(node)
            else:
                self.stops[node] = why
        for node in nodes:  # an item of a value that mixes rows, and views of what comes in, are not computed but gathered
            if node in inside:
                moves = node.target is operator.getitem or called(node, *_LAYOUT) or inside[node].how != "call"
                if not moves or any(x in self.steps for x in node.all_input_nodes):
                    self.steps[node] = inside[node]

    def _of_rows(self, user: fx.Node, node: fx.Node) -> bool:
        if user in self.turned:
            return node is not user.args[1]
        return user not in self.attentions or node is self.attentions[user].query

    def read(self, node: fx.Node) -> list[fx.Node]:
        """What a step reads for its rows."""
        return [self.attentions[node].query] if node in self.attentions else node.all_input_nodes

    def _why_not(self, node: fx.Node, readers: list[fx.Node], lazy: set[fx.Node]) -> str | None:
        others = [user for user in node.users if user not in readers and user not in lazy and not (node in self.turned and user.args[1] == 1)]
        if others:
            return f"`{others[0].name}` also reads it"
        if effectful(node) and (len(node.users) > len(readers) or any(user in lazy for user in node.users) or lazy):
            return "it draws random numbers, and what is returned is computed from them too"
        try:
            step = self._step(node)
        except Mixed as mixed:
            return str(mixed)
        return None if self._fits(node, step) else "its sizes do not show its rows"

    def _step(self, node: fx.Node) -> Step:
        if node in self.attentions:
            return attention_step(node, self.attentions[node], self.sizes.layout)
        if node.target is operator.getitem:
            layout = self.sizes.layout(node)
            if layout is None:
                raise Mixed("it reads an item that holds no rows")
            return Step(layout)
        return step_of(node, self.sizes.layout, OP_RULES)

    def _fits(self, node: fx.Node, step: Step) -> bool:
        if isinstance(step.layout, Layout):
            return self.sizes.layout(node) == step.layout
        read = {user.args[1] for user in node.users}
        return all(i < len(step.layout) and self.sizes.layout_of(meta.value(node)[i]) == step.layout[i] for i in read)


def _lazy(edit: Edit) -> set[fx.Node]:
    """The nodes that only outputs read which are computed when the caller reads them."""
    outputs, facts = edit.outputs, {fact.index for fact in edit.facts if isinstance(fact, Lazy)}
    eager = {x for i, x in enumerate(outputs) if isinstance(x, fx.Node) and i not in facts}
    found: set[fx.Node] = set()
    for node in reversed(edit.nodes):
        if node.op == "call_function" and node.users and node not in eager and not effectful(node):
            if all(user in found or user.op == "output" for user in node.users):
                found.add(node)
    return found


def _compact(edit: Edit, node: fx.Node, multiple: int) -> None:
    name = LOSSES[node.target][0]
    rows = node.args[0] if node.args else node.kwargs[name]
    if meta.tensor(rows).dim() < 2:
        raise Stopped(node, "its classes are not the last dimension")
    sizes = _Sizes.of(rows)
    if sizes.fixed:
        raise Stopped(node, "the number of rows is fixed in the program: nothing tells them from other sizes")
    loss = RowLoss.of(node, sizes.layout)
    if loss is None or isinstance(loss, str):
        raise Stopped(node, loss or "its sizes do not show its rows")
    plan = Plan(edit)
    if not plan.cheap(loss.target):
        raise Stopped(node, "its labels are computed by the model")
    reach = _Reach(edit, loss, sizes)
    reach = _further(edit, plan, loss, sizes, reach)
    if not any(called(x, *_PRODUCTS) for x in reach.steps):
        last, why = next(iter(reach.stops.items()), (rows, "the loss reads what mixes rows"))
        raise Stopped(last, f"no product of matrices lies between it and the loss: {why}")
    first = plan.lift([loss.target])
    if sizes.batch is None:
        size: tuple[Any, Any] = 1, edit.call(aten.sym_size.int, (loss.target, 0), like=loss.target, before=first)
    else:
        size = tuple(_size(edit, plan, wanted, first, node) for wanted in (sizes.batch, sizes.seq))
    space = Space(edit, None, size, [loss.counted(edit, first)], [], False, True, multiple, loss.target, first, reach.steps)
    for each in reach.steps:
        for x in reach.read(each):
            layout = sizes.layout(x)
            if layout is not None and x not in space.made and x not in reach.steps[each].aligned:
                space.made[x] = space.gather(x, layout, each)
        if each in reach.attentions:
            space.made[each] = attend(edit, space, each, reach.attentions[each])
        else:
            space.run(each)
    new = loss.build(edit, space)
    edit.erase(node)
    edit.rewrote(rule_here("rows that count"), new, node)
    ends = [x.name for x in reach.stops]
    edit.note(f"`{new.name}` and {len(reach.steps)} nodes before it, back to {', '.join(f'`{name}`' for name in ends[:3])}, are computed for rows that count")


def _further(edit: Edit, plan: Plan, loss: RowLoss, sizes: _Sizes, reach: _Reach) -> _Reach:
    """The reach through the attentions at which it ends, to the product that their queries come from; the same reach, with the reason said, where
    none can be left out there: an attention of few rows is not worth a node of its own."""
    found: dict[fx.Node, Attended] = {}
    for node in reach.stops:
        each = attended(node, plan)
        if isinstance(each, str):
            edit.missed("queries of rows that count", node, each)
        elif each is not None:
            found[node] = each
    if not found:
        return reach
    turned = {node: both for node, each in found.items() if (both := rotated_together(each)) is not None}
    tried = _Reach(edit, loss, sizes, found, turned=frozenset(turned.values()))
    won = [x for x in tried.steps if called(x, *_PRODUCTS) and x not in reach.steps]
    if not won:
        node = next(iter(found))
        new = [f"`{x.name}`: {why}" for x, why in tried.stops.items() if x not in reach.stops or x is node]
        why = next((line for line in new if "also reads it" in line), next(iter(new), "no product lies before them"))
        edit.missed("queries of rows that count", node, f"the product that its queries come from is needed for all rows ({why})")
        return reach
    if not turned:
        return tried
    for both in dict.fromkeys(turned.values()):
        apart(edit, both)
    return _Reach(edit, loss, sizes, {node: attended(node, plan) for node in found})  # what they read is made anew


def _size(edit: Edit, plan: Plan, wanted: sympy.Expr, before: fx.Node, loss: fx.Node) -> fx.Node:
    """A size, read of an input that has it."""
    found = next(((x, d) for x in plan.inputs for d, size in enumerate(meta.tensor(x).shape) if expression(size) == wanted), None)
    if found is None:
        raise Stopped(loss, f"the size {wanted} of the batch is no size of an input")
    return edit.call(aten.sym_size.int, found, like=found[0], before=before)
