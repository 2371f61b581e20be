"""Logits read backwards from a loss: the casts, scales, caps and views between them and what they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, effectful
from fxopt.ir.index import arguments, called, full_arguments, static

aten = torch.ops.aten

_CROSS_ENTROPY = aten.cross_entropy_loss.default
_NLL = (aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default)
_FLATTENING = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
# Operators after which the same elements stand in the same order.
ORDER = (*_FLATTENING, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.view_as.default, aten.contiguous.default, aten.alias.default)
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
_SAME = (aten.contiguous.default, aten.alias.default)
REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}
# `ignore_index` where the program has none: no label is this.
NEVER = -(1 << 62)


@dataclass(frozen=True)
class Term:
    """A cross entropy in a graph.

    Attributes:
        node: what the loss replaces. logits, target: [..., classes], or [rows, classes], and one class for each row.
        chain: the nodes between `node` and `logits`, nearest to the loss first. shaping: those of them that flatten rows.
        ignore_index, reduction, label_smoothing: as the op takes them.
        gathered: target is [..., 1], as gather takes it, and `node` [..., 1] or [...].
        negative: `node` is minus the loss.
        cut: the dimensions of the rows of which gather may read the first ones only, as many as `target` has.
    """

    node: fx.Node
    logits: fx.Node
    target: fx.Node
    chain: tuple[fx.Node, ...] = ()
    shaping: tuple[fx.Node, ...] = ()
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    gathered: bool = False
    negative: bool = False
    cut: tuple[int, ...] = ()

    @property
    def taken(self) -> tuple[str, ...]:
        """What `cut` leaves of the rows: equal where the same rows of the same logits are read; empty for all."""
        if not self.cut:
            return ()
        x, _, index = self.node.args[:3]
        return tuple(map(str, (*meta.tensor(x).shape[:-1], *meta.tensor(index).shape[:-1])))

    def select(self, edit: Edit, x: fx.Node, before: fx.Node) -> fx.Node:
        """Those rows of x, [..., last], that are read. Where x has fewer than `target`, the op raises, as gather does."""
        for dim in self.cut:
            size = static(meta.tensor(self.target).shape[dim])
            if size is None:
                size = edit.call(aten.sym_size.int, (self.target, dim), like=self.node, before=before)
            x = edit.call(aten.slice.Tensor, (x, dim, 0, size), like=self.node, before=before)
        return x


def read_term(node: fx.Node) -> Term | str | None:
    """The cross entropy that `node` computes, why it is none that the ops compute, or None for another operation."""
    if called(node, aten.gather.default):
        return _gathered(node)
    if called(node, aten.sub.Tensor):
        return _normalized_late(node)
    if not called(node, _CROSS_ENTROPY, *_NLL):
        return None
    given = arguments(node)
    logits, target = given["self"], given["target"]
    if "weight" in given:
        return "the classes are weighted"
    options = (given.get("ignore_index", -100), REDUCTIONS[given.get("reduction", 1)], given.get("label_smoothing", 0.0))
    if not isinstance(options[0], int):
        return "the label that it ignores is a size of the call, not a number"
    term = Term(node, logits, target, (), (), *options)
    if meta.tensor(logits).dim() > 2 and (last := _classes_last(logits)) is not None:
        term = replace(term, logits=last, chain=(logits,))
    if meta.tensor(target).is_floating_point() or meta.tensor(logits).dim() < 2:
        return "the target is not one class for each row of logits"
    if meta.tensor(logits).dim() != 2 and not term.chain:  # on the CPU [4, 1000, 256] would take 5.4 ms as rows, and takes 2.0
        return "the classes are not the last dimension in memory: rows of them would be a copy"
    return term if called(node, _CROSS_ENTROPY) else _normalized(term)


def _normalized(term: Term) -> Term | str:
    """The term whose logits are what log_softmax is taken of."""
    node, chain, shaping = through_views(term.logits)
    chain = [*term.chain, *chain]
    if called(node, aten.log.default) and called(node.args[0], aten.softmax.int):
        chain.append(node)
        node = node.args[0]
    elif not called(node, aten.log_softmax.int):
        return f"the log-probabilities come from `{node.name}` ({_what(node)}), not from a log_softmax"
    if not over_classes(node):
        return f"`{node.name}` is not taken over the classes"
    source = node.args[0]
    if meta.tensor(node).dtype.itemsize < meta.tensor(source).dtype.itemsize:
        return f"`{node.name}` narrows the logits to {meta.tensor(node).dtype}"
    return replace(term, logits=source, chain=(*chain, node), shaping=tuple(shaping))


def _gathered(node: fx.Node) -> Term | str | None:
    x, _, index = node.args[:3]
    if not called(x, aten.log_softmax.int):
        return None
    if (reason := _not_one_a_row(node, index)) is not None:
        return reason
    # Sizes that are not known to be equal: gather needs no more than that the index is not the larger one.
    return _normalized(Term(node, x, index, ignore_index=NEVER, reduction="none", gathered=True, negative=True, cut=_differing(x, index)))


def _normalized_late(node: fx.Node) -> Term | str | None:
    """`gather(logits, target) - logsumexp(logits)`, either way round, [..., 1] or [...]."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(x, fx.Node) for x in node.args):
        return None
    parts = [without_views(x) for x in node.args]
    negative = called(parts[0][0], aten.gather.default)
    (own, *picked), (total, *summed) = parts if negative else reversed(parts)
    if not called(own, aten.gather.default) or not called(total, aten.logsumexp.default) or own.args[0] is not total.args[0]:
        return None
    x, _, index = own.args[:3]
    rows, shape = meta.tensor(x).shape[:-1], meta.tensor(node).shape
    reason = _not_one_a_row(own, index)
    if reason is None and _differing(x, index):
        reason = f"`{index.name}` may select some of the rows"
    if reason is None and [dim % (len(rows) + 1) for dim in total.args[1]] != [len(rows)]:
        reason = f"`{total.name}` is not taken over the classes"
    if reason is None and (len(shape) not in (len(rows), len(rows) + 1) or not all(meta.same_size(a, b) for a, b in zip((*rows, 1), shape))):
        reason = f"`{node.name}` is not one value for each row"
    return reason or Term(node, x, index, (*picked, *summed, own, total), ignore_index=NEVER, reduction="none", gathered=True, negative=negative)


def _not_one_a_row(gather: fx.Node, index: fx.Node) -> str | None:
    """Why what is gathered is not one class for each row."""
    sizes = meta.tensor(index).shape
    if not over_classes(gather) or len(sizes) < 2 or not meta.same_size(sizes[-1], 1):
        return "the log-probabilities of one class for each row are not what is gathered"
    return None


def _differing(x: fx.Node, index: fx.Node) -> tuple[int, ...]:
    """The dimensions of the rows in which an index is not known to have the size of `x`."""
    sizes = zip(meta.tensor(x).shape[:-1], meta.tensor(index).shape[:-1], strict=True)
    return tuple(dim for dim, (a, b) in enumerate(sizes) if not meta.same_size(a, b))


def over_classes(node: fx.Node) -> bool:
    """Whether a node works along the last dimension."""
    return full_arguments(node)["dim"] == -1


def log_softmax_of(node: fx.Node) -> fx.Node | None:
    """The logits whose log_softmax over the classes `node` is."""
    if called(node, aten.log.default):
        node = node.args[0]
        return node.args[0] if called(node, aten.softmax.int) and over_classes(node) else None
    return node.args[0] if called(node, aten.log_softmax.int) and over_classes(node) else None


def through_views(node: fx.Node) -> tuple[fx.Node, list[fx.Node], list[fx.Node]]:
    """What a value [..., classes] is a view of rows of; the nodes between, nearest to `node` first; those that flatten."""
    chain, classes = [], meta.tensor(node).shape[-1]
    while called(node, *_FLATTENING, *_SAME) and meta.same_size(meta.tensor(node.args[0]).shape[-1], classes):
        chain.append(node)
        node = node.args[0]
    return node, chain, [each for each in chain if called(each, *_FLATTENING)]


def without_views(node: fx.Node) -> list[fx.Node]:
    """The first node before `node` that is no view in the same order, and then those between, nearest to `node` first."""
    between = []
    while called(node, *ORDER):
        between.append(node)
        node = node.args[0]
    return [node, *between]


def _classes_last(node: fx.Node) -> fx.Node | None:
    """What a node that moves the last dimension to place 1 moves it from."""
    dims = meta.tensor(node).dim()
    if called(node, aten.permute.default):
        moved = [dim % dims for dim in node.args[1]] == [0, dims - 1, *range(1, dims - 1)]
    else:
        moved = called(node, aten.transpose.int) and dims == 3 and {dim % dims for dim in node.args[1:]} == {1, 2}
    return node.args[0] if moved else None


def _what(node: fx.Node) -> Any:
    return node.target if node.op == "call_function" else node.op


@dataclass(frozen=True)
class Reading:
    """How logits come from an earlier value: softcap * tanh(scale * x / softcap), 0.0 for no cap, then views.

    Attributes:
        source: the earlier value. chain: the nodes from the loss to it, nearest to the loss first.
        shaping: those of them that select or flatten rows. bias: [classes] or [1, classes], added to the source first, or None.
    """

    source: fx.Node
    chain: tuple[fx.Node, ...]
    scale: float = 1.0
    softcap: float = 0.0
    shaping: tuple[fx.Node, ...] = ()
    bias: fx.Node | None = None

    def rows(self, edit: Edit, x: fx.Node, last: int, like: fx.Node, before: fx.Node) -> fx.Node:
        """What was done to the rows of the source, done to those of x, [..., last]."""
        for node in reversed(self.shaping):
            if called(node, aten.slice.Tensor, aten.flatten.using_ints):
                x = edit.call(node.target, (x, *node.args[1:]), like=like, before=before)
            else:
                x = edit.call(aten.reshape.default, (x, [*node.args[1][:-1], last]), like=like, before=before)
        return x

    @property
    def place(self) -> tuple[Any, ...]:
        """The source and the rows of it that are left: equal for values whose rows are the same, in the same order."""
        return self.source, self.bias, *selection(self.shaping, 1)

    @property
    def function(self) -> tuple[Any, ...]:
        """Equal for equal logits of the same rows."""
        return self.scale, self.softcap, *self.place


def selection(nodes: Sequence[fx.Node], last: int) -> tuple[Any, ...]:
    """The slices among these nodes, each with the sizes that it cuts from but the `last` ones: what is the same sequence
    of slices of one value, with any views between them, selects the same rows in the same order."""
    found = []
    for node in nodes:
        if called(node, aten.slice.Tensor):
            sizes = meta.tensor(node.args[0]).shape
            bounds = (str(meta.value(bound)) if isinstance(bound, fx.Node) else bound for bound in node.args[2:])
            found.append((node.args[1] % len(sizes), *map(str, sizes[: len(sizes) - last]), *bounds))
    return tuple(found)


def read_back(logits: fx.Node, chain: tuple[fx.Node, ...] = (), shaping: tuple[fx.Node, ...] = (), detached: bool = False) -> tuple[list[Reading], str]:
    """Every value before these logits that they can be read from, the logits first, and why there is no other.

    Args:
        chain, shaping: what is between the logits and the loss, as in `Reading`.
        detached: whether values are read alone, and no gradient: then a detach changes nothing.
    """
    readings = [Reading(logits, chain, shaping=shaping)]
    classes = meta.tensor(logits).shape[-1]
    after = 1.0  # factors seen so far, on the loss's side of a tanh
    while True:
        last = readings[-1]
        node, softcap, shaping = last.source, last.softcap, last.shaping
        x, bias = node.args[0] if node.args else None, None
        if called(node, aten.to.dtype):
            old, new = meta.tensor(x).dtype, meta.tensor(node).dtype
            if old.itemsize > new.itemsize:
                return readings, f"`{node.name}` narrows the logits to {new}"
            if new == torch.float64 != old:
                return readings, f"`{node.name}` widens the logits to {new}"
        elif called(node, *_FLATTENING):
            if not meta.same_size(meta.tensor(x).shape[-1], classes):
                return readings, f"`{node.name}` mixes rows and classes"
            shaping = (*shaping, node)
        elif called(node, aten.slice.Tensor):
            if node.args[1] in (-1, meta.tensor(node).dim() - 1):
                return readings, f"`{node.name}` selects some of the classes"
            shaping = (*shaping, node)
        elif called(node, aten.mul.Tensor, aten.div.Tensor) and is_number(node.args[1]) and len(node.args) == 2 and not node.kwargs:
            after *= node.args[1] if node.target is aten.mul.Tensor else 1.0 / node.args[1]
        elif called(node, aten.tanh.default):
            if softcap or after <= 0:
                return readings, f"`{node.name}` is a second tanh, or the cap is not positive"
            softcap, after = after, 1.0
        elif last.bias is None and called(node, aten.add.Tensor) and (added := _added(node)) is not None:
            x, bias = added
            if not called(x, aten.linear.default) or len(x.args) > 2:
                return readings, f"`{node.name}` adds to what is not a linear head without bias"
        elif not called(node, *_SAME) and not (detached and called(node, aten.detach.default)):
            return readings, f"the logits come from `{node.name}` ({_what(node)}), not from a linear head"
        scale = after * softcap if softcap else after
        readings.append(Reading(x, (*last.chain, node), scale, softcap, shaping, bias))


def _added(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(logits, bias) of a sum of logits with one number per class, [classes] or [1, ..., classes]."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(x, fx.Node) for x in node.args):
        return None
    for x, bias in (node.args, reversed(node.args)):
        val, logits = meta.tensor(bias), meta.tensor(x)
        alone = val.dim() and all(meta.same_size(size, 1) for size in val.shape[:-1]) and meta.same_size(val.shape[-1], meta.tensor(node).shape[-1])
        if alone and val.dtype == logits.dtype and meta.same_shape(logits, meta.tensor(node)):
            return x, bias
    return None


def is_number(value: Any) -> bool:
    """Whether an argument is a number other than zero."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


@dataclass(frozen=True)
class Head:
    """The linear layer that logits come from.

    Attributes:
        linear: the node of the product. hidden, weight [classes, width], bias [classes] or [1, classes]: its inputs.
        reading: what is between the product and the loss; its chain ends with `linear`.
    """

    linear: fx.Node
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    reading: Reading


def read_head(readings: Sequence[Reading], stop: str) -> Head | str:
    """The head before the last of these readings, or why there is none."""
    reading = readings[-1]
    node = reading.source
    if called(node, aten.linear.default):
        hidden, weight, bias = (*node.args, None)[:3]
    elif called(node, aten.matmul.default, aten.mm.default) and called(node.args[1], *_TRANSPOSES) and meta.tensor(node.args[1]).dim() == 2:
        hidden, weight, bias = node.args[0], node.args[1].args[0], None
    else:
        return stop
    return Head(node, hidden, weight, bias if reading.bias is None else reading.bias, replace(reading, chain=(*reading.chain, node)))


def cheapest(term: Term, readings: Sequence[Reading]) -> Reading:
    """The reading to take the loss of: the earliest value up to which nobody else reads what the op need not keep."""
    best = readings[0]
    for reading in readings[1:]:
        node = reading.chain[-1]
        view = called(node, *_FLATTENING, aten.slice.Tensor, *_SAME)
        if reading.bias is not None or (not view and (len(node.users) > 1 or _mark(node) != _mark(term.node))):
            break
        best = best if view else reading
    return best


def _mark(node: fx.Node) -> int | None:
    return meta.provenance(node).checkpoint


def outputs_of(edit: Edit, chain: Sequence[fx.Node], losses: Sequence[fx.Node]) -> list[int] | str:
    """Which outputs read these nodes by another way than through `losses`; or why the nodes must be computed: the first of
    the losses depends on them by another way."""
    inside = {*chain, *losses}
    seen: dict[fx.Node, fx.Node] = {}
    waiting = [(user, user) for node in chain for user in node.users if user not in inside]
    after_loss = after(losses[0])
    while waiting:
        node, first = waiting.pop()
        if node.op == "output" or node in seen or node in inside:
            continue
        seen[node] = first
        if effectful(node):
            return f"the logits are also read by `{node.name}`, which must run"
        if node in after_loss:
            return f"the logits also reach the loss through `{first.name}`"
        waiting += [(user, first) for user in node.users]
    found = []
    for index, value in enumerate(edit.outputs):
        if isinstance(value, fx.Node) and (value in seen or value in chain):
            found.append(index)
    return found


def after(node: fx.Node) -> set[fx.Node]:
    """All that depends on a node."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found
