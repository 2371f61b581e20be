"""What a program reads of the logits besides its loss and the op computes too: log-probabilities, entropy, accuracy."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.index import Flow, called, full_arguments
from fxopt.passes.labels import Labels, ignored_label, ignores_a_class, never_ignored, only_kept_rows, read_labels
from fxopt.passes.logits import ORDER, Reading, Term, log_softmax_of, over_classes, read_back, read_term, selection

aten = torch.ops.aten

LOG_PROB, ENTROPY, CORRECT = range(3)


@dataclass(frozen=True)
class Statistic:
    """A value for each row of logits.

    Attributes:
        node: where the program computes it. place: of the statistic among those of the op. negative: whether `node` is minus it.
        function: of the logits that it is taken of; for `CORRECT` only which rows of which value (see `Reading`).
        labels: what it is taken at; None for the entropy. taken: as in `Term`, of the rows of `function`.
    """

    node: fx.Node
    place: int
    negative: bool
    function: tuple[Any, ...]
    labels: fx.Node | None = None
    taken: tuple[str, ...] = ()


def read_statistic(node: fx.Node) -> Statistic | None:
    """The statistic that `node` computes of some logits."""
    if called(node, aten.eq.Tensor):
        return _correct(node)
    if called(node, aten.sum.dim_IntList):
        return _entropy(node)
    term = read_term(node)
    if not isinstance(term, Term) or term.reduction != "none" or term.label_smoothing:
        return None
    function = read_back(term.logits, shaping=term.shaping, detached=True)[0][-1].function
    return Statistic(node, LOG_PROB, not term.negative, function, term.target, term.taken)


def _correct(node: fx.Node) -> Statistic | None:
    for x, labels in (node.args, reversed(node.args)):
        nodes: list[fx.Node] = []
        while called(x, *ORDER, aten.slice.Tensor, aten.detach.default):
            nodes.append(x)
            x = x.args[0]
        if called(x, operator.getitem) and x.args[1] == 1 and called(x.args[0], aten.max.dim):
            x = x.args[0]
        elif not called(x, aten.argmax.default):
            continue
        if not over_classes(x) or not isinstance(labels, fx.Node) or not meta.same_shape(meta.tensor(labels), meta.tensor(node)):
            continue
        x = x.args[0]
        while called(x, aten.log_softmax.int, aten.softmax.int) and over_classes(x):
            x = x.args[0]
        reading = read_back(x, detached=True)[0][-1]
        if reading.scale > 0:
            return Statistic(node, CORRECT, False, (*reading.place[:2], *selection(nodes, 0), *reading.place[2:]), labels)
    return None


def _entropy(node: fx.Node) -> Statistic | None:
    """`sum(p * log p)`, and with a minus at any place of it."""
    (x, *_), negative = node.args, True
    given = full_arguments(node)
    if given["dim"] != [-1] or given["keepdim"] or given["dtype"] is not None:
        return None
    if called(x, aten.neg.default):
        x, negative = x.args[0], not negative
    if not called(x, aten.mul.Tensor) or not all(isinstance(part, fx.Node) for part in x.args):
        return None
    parts = list(x.args)
    for i, part in enumerate(parts):
        if called(part, aten.neg.default):
            parts[i], negative = part.args[0], not negative
    for p, log_p in (parts, reversed(parts)):
        spread, same = log_softmax_of(log_p), _softmax_of(p)
        if spread is None or same is None:
            continue
        found = [read_back(each, detached=True)[0][-1].function for each in (spread, same)]
        if found[0] == found[1]:
            return Statistic(node, ENTROPY, negative, found[0])
    return None


def _softmax_of(node: fx.Node) -> fx.Node | None:
    if called(node, aten.exp.default):
        return log_softmax_of(node.args[0])
    return node.args[0] if called(node, aten.softmax.int) and over_classes(node) else None


def why_not(edit: Edit, flow: Flow, found: Statistic, term: Term) -> str | None:
    """Why the op's statistic is not what the program computes, for logits that are the same."""
    ignored = ignored_label(term)
    labels = read_labels(term.target, ignored)
    # Where the loss has a label for each row, gather cannot take fewer rows at as many labels.
    if term.cut and found.taken != term.taken:
        return "the loss may be of fewer rows"
    if found.labels is None:
        differs = not never_ignored(term)
    else:
        mine = read_labels(found.labels, ignored)
        if not mine.same(labels):
            return "it is taken at other labels"
        # Log-probabilities at an ignored label raise an error in the program, unless they are zero there as in the op.
        differs = mine.filled != labels.filled or ignores_a_class(term)
    if differs and not only_kept_rows(found.node, term):
        return "it is also taken of rows without a label"
    if found.place != CORRECT and edit.source.grad and found.node in flow.grad and _differentiated(found.node):
        return "a gradient may flow through it, and the op's statistics have none"
    return None


def _differentiated(node: fx.Node) -> bool:
    """Whether a gradient can come back to `node` from an output."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return True
            floating = any(val.is_floating_point() for val in meta.tensors(user))
            if user not in seen and floating and not called(user, aten.detach.default):
                seen.add(user)
                waiting.append(user)
    return False


def find_statistics(edit: Edit, flow: Flow, term: Term, reading: Reading) -> list[Statistic]:
    """What reads the logits of this loss and is a statistic of the op; what is not quite one is reported."""
    found, seen = [], {term.node}
    waiting = list(reading.chain)
    while waiting:
        for user in waiting.pop().users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            waiting.append(user)
            each = read_statistic(user) if user not in reading.chain else None
            if each is None or each.function != (reading.place if each.place == CORRECT else reading.function):
                continue
            reason = why_not(edit, flow, each, term)
            if reason is None and reading.scale <= 0 and each.place == CORRECT:
                reason = "the logits are multiplied by a negative number"
            if reason is None and _witness(each, term) is None:
                reason = "no labels have its shape"
            if reason is None:
                found.append(each)
            else:
                edit.missed("statistics", user, reason)
    return found


def _witness(found: Statistic, term: Term) -> fx.Node | None:
    """A node of the labels with the shape of the statistic."""
    ignored = ignored_label(term)
    chains: Sequence[Labels] = [read_labels(labels, ignored) for labels in (found.labels, term.target) if labels is not None]
    return next((node for labels in chains for node in labels.nodes if meta.same_shape(meta.tensor(node), meta.tensor(found.node))), None)


def put(edit: Edit, found: Statistic, term: Term, call: fx.Node, place: int, rule: str) -> None:
    """Result `place` of the op's call in place of what the program computed."""
    node = found.node
    new = edit.call(operator.getitem, (call, place), like=node)
    if meta.tensor(new).dtype != meta.tensor(node).dtype:
        new = edit.call(aten.to.dtype, (new, meta.tensor(node).dtype), like=node)
    if found.negative:
        new = edit.call(aten.neg.default, (new,), like=node)
    if not meta.same_shape(meta.tensor(new), meta.tensor(node)):
        new = edit.call(aten.view_as.default, (new, _witness(found, term)), like=node)
    edit.replace(node, new, rule=rule)
