"""The labels of a loss read backwards, and masks that say which rows have one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import effectful
from fxopt.ir.index import arguments, called, static
from fxopt.passes.logits import NEVER, ORDER, Term, is_number, selection

aten = torch.ops.aten

# What a comparison with a number says of a label: whether it is kept, or whether it is ignored.
_KEPT = {aten.ne.Scalar: 0, aten.ge.Scalar: 0, aten.gt.Scalar: -1}
_DROPPED = {aten.eq.Scalar: 0, aten.lt.Scalar: 0, aten.le.Scalar: -1}
_EQUAL = (aten.ne.Scalar, aten.eq.Scalar)


@dataclass(frozen=True)
class Labels:
    """Where labels come from.

    Attributes:
        source: the first value. selection: the slices of it that are left, as in `logits.selection`.
        filled: whether labels that are ignored were replaced by a class.
        nodes: those between, nearest to the loss first, with the labels and the source.
    """

    source: fx.Node
    selection: tuple[Any, ...]
    filled: bool
    nodes: tuple[fx.Node, ...]

    def same(self, other: Labels) -> bool:
        """Whether both are the same labels in the same order, but for those that are ignored."""
        return self.source is other.source and self.selection == other.selection


def ignored_label(term: Term) -> int:
    """The label that `term` ignores; where it ignores none, the one that programs replace before they gather."""
    return -100 if term.ignore_index == NEVER else term.ignore_index


def read_labels(node: fx.Node, ignored: int) -> Labels:
    """The labels that `node` holds, of which `ignored` is none."""
    nodes, filled = [node], False
    while True:
        if called(node, *ORDER, aten.slice.Tensor) or _widened(node):
            node = node.args[0]
        elif (inner := _filled(node, ignored)) is not None:
            node, filled = inner, True
        else:
            return Labels(node, selection(nodes, 0), filled, tuple(nodes))
        nodes.append(node)


def _filled(node: fx.Node, ignored: int) -> fx.Node | None:
    """The labels of which `node` is a copy with a class in place of those ignored."""
    if called(node, aten.clamp.default, aten.clamp_min.default):
        bounds = arguments(node)
        return node.args[0] if ignored < 0 and set(bounds) == {"self", "min"} and bounds["min"] == 0 else None
    if called(node, aten.masked_fill.Scalar):
        (x, mask, value), inverted = node.args[:3], True
    elif called(node, aten.where.ScalarOther):
        (mask, x, value), inverted = node.args[:3], False
    elif called(node, aten.where.ScalarSelf):
        (mask, value, x), inverted = node.args[:3], True
    else:
        return None
    if not isinstance(x, fx.Node) or not isinstance(value, int) or value < 0 or value == ignored:
        return None
    kept = read_mask(mask, ignored, inverted)
    return x if kept is not None and kept.same(read_labels(x, ignored)) else None


def _widened(node: fx.Node) -> bool:
    return called(node, aten.to.dtype) and meta.tensor(node).dtype == torch.int64 and not meta.tensor(node.args[0]).is_floating_point()


def read_mask(mask: fx.Node, ignored: int, inverted: bool = False) -> Labels | None:
    """The labels of which `mask` says that they are not `ignored` (with `inverted`: that they are), or None."""
    node, nodes = mask, []
    while True:
        if called(node, *ORDER, aten.slice.Tensor):
            nodes.append(node)
        elif called(node, aten.logical_not.default, aten.bitwise_not.default):
            inverted = not inverted
        elif not called(node, aten.to.dtype):
            break
        node = node.args[0]
    bound = (_DROPPED if inverted else _KEPT).get(node.target) if node.op == "call_function" else None
    if bound is None:
        return None
    exact = called(node, *_EQUAL)
    if node.args[1] != (ignored if exact else bound) or (not exact and ignored >= 0):
        return None
    labels = read_labels(node.args[0], ignored)
    if labels.filled:
        return None
    return Labels(labels.source, (*selection(nodes, 0), *labels.selection), False, (*nodes, *labels.nodes))


def fits(part: fx.Node, whole: fx.Node) -> bool:
    """Whether two values of the same rows have one shape. Of one dimension they do: their number may be written in two ways."""
    a, b = meta.tensor(part), meta.tensor(whole)
    return a.dim() == b.dim() and (a.dim() < 2 or meta.same_shape(a, b))


def without_fill(term: Term) -> Term:
    """The same loss of rows that have a label, where it is gathered at filled labels and nothing reads the other rows."""
    ignored = ignored_label(term)
    rows, labels = meta.tensor(term.target).shape[:-1], read_labels(term.target, ignored)
    if not term.gathered or not labels.filled or not only_kept_rows(term.node, term):
        return term
    for node in reversed(labels.nodes):
        val, before = meta.tensor(node), read_labels(node, ignored)
        shaped = val.dim() == len(rows) and all(meta.same_size(a, b) for a, b in zip(val.shape, rows))
        if shaped and val.dtype == torch.int64 and not before.filled and before.same(labels):
            return replace(term, target=node, ignore_index=ignored)
    return term


def never_ignored(term: Term) -> bool:
    """Whether every row of the loss counts."""
    return term.ignore_index == NEVER or read_labels(term.target, term.ignore_index).filled


def ignores_a_class(term: Term) -> bool:
    """Whether a row can be ignored although its label is one of the classes."""
    classes = static(meta.tensor(term.logits).shape[-1])
    return not never_ignored(term) and term.ignore_index >= 0 and (classes is None or term.ignore_index < classes)


def only_kept_rows(node: fx.Node, term: Term) -> bool:
    """Whether all that reads `node`, a value for each row, multiplies the rows without a label by zero or drops them."""
    ignored = ignored_label(term)
    labels = read_labels(term.target, ignored)
    waiting = [node]
    while waiting:
        value = waiting.pop()
        for user in value.users:
            if called(user, *ORDER, aten.to.dtype, aten.detach.default, aten.neg.default) or _scaled(user):
                waiting.append(user)
                continue
            mask, inverted = _mask_of(user, value)
            kept = None if mask is None else read_mask(mask, ignored, inverted)
            if kept is None or not kept.same(labels) or not fits(mask, value):
                return False
    return True


def _scaled(node: fx.Node) -> bool:
    return called(node, aten.mul.Tensor, aten.div.Tensor) and len(node.args) == 2 and is_number(node.args[1])


def _mask_of(user: fx.Node, value: fx.Node) -> tuple[fx.Node | None, bool]:
    """The mask by which `user` chooses rows of `value`, and whether it says which to drop."""
    if effectful(user) or user.op == "output":
        return None, False
    if called(user, aten.mul.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default) and len(user.args) == 2:
        others = [x for x in user.args if x is not value]
        return (others[0], False) if len(others) == 1 and isinstance(others[0], fx.Node) else (None, False)
    if called(user, aten.where.self, aten.where.ScalarOther) and user.args[1] is value and user.args[2] is not value:
        return user.args[0], False
    if called(user, aten.masked_fill.Scalar) and user.args[0] is value:
        return user.args[1], True
    if called(user, aten.index.Tensor) and user.args[0] is value and len(user.args[1]) == 1 and user.args[1][0] is not value:
        mask = user.args[1][0]
        return (mask, False) if meta.tensor(mask) is not None and meta.tensor(mask).dtype == torch.bool else (None, False)
    return None, False
