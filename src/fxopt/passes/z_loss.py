"""The z-loss of a program: a multiple of the squared log of the normalizer that is added to the cross entropy."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.index import called
from fxopt.passes.labels import fits, never_ignored, read_labels, read_mask
from fxopt.passes.logits import ORDER, Reading, Term, is_number, read_back, selection

aten = torch.ops.aten


@dataclass
class ZLoss:
    """`coefficient` times logsumexp(logits)^2, reduced (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, section 5).

    Attributes:
        total: the sum of it and the loss; whole: its place among the arguments of `total`, where the other argument stays.
        chain: its nodes, nearest to the sum first.
        reduction: "none", "sum", or "mean" over the rows that it is taken of.
        mask: what it is multiplied with, inverted where it says which rows to drop. count: what the sum is divided by.
        chosen: whether it is taken of the rows of the mask only.
        asserts: nodes that say of its sizes what is true of all sizes.
        logits: what the normalizer belongs to. selection: the rows taken of it afterwards.
    """

    total: fx.Node
    whole: int
    coefficient: float = 1.0
    reduction: str = "none"
    squared: bool = False
    chosen: bool = False
    masks: list[tuple[fx.Node, bool]] = field(default_factory=list)
    count: fx.Node | None = None
    chain: list[fx.Node] = field(default_factory=list)
    asserts: list[fx.Node] = field(default_factory=list)
    logits: fx.Node | None = None


def find_z_loss(loss: fx.Node) -> ZLoss | str | None:
    """The z-loss that is added to `loss`, or to a multiple of it; why it cannot be told apart; None where there is none."""
    node, factor, divisors = loss, 1.0, []
    passed: list[fx.Node] = []
    while True:
        for user in node.users:
            for place, alpha in _places(user, node):
                found = _read(ZLoss(user, place, alpha / factor), user.args[place], list(divisors))
                if found is not None:
                    several = next((each for each in (*passed, node) if len(each.users) > 1), None)
                    if several is not None:
                        return f"`{several.name}`, the loss without it, is also read by others"
                    other = user.args[1 - place]
                    if meta.tensor(other).dtype != meta.tensor(user).dtype or not fits(other, user):
                        return f"`{user.name}` changes the dtype or the shape of the loss"
                    return found
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if called(user, aten.mul.Tensor, aten.div.Tensor) and user.args[0] is node and len(user.args) == 2 and not user.kwargs:
            if is_number(user.args[1]):
                factor *= user.args[1] if user.target is aten.mul.Tensor else 1.0 / user.args[1]
            elif called(user, aten.div.Tensor) and isinstance(user.args[1], fx.Node) and user.args[1] is not node:
                divisors.append(user.args[1])
            else:
                return None
        elif not (called(user, aten.add.Tensor) and len(user.args) == 2 and not user.kwargs and user.args[0] is not user.args[1]):
            return None
        passed.append(node)
        node = user


def _places(user: fx.Node, node: fx.Node) -> list[tuple[int, float]]:
    """Where a sum of `node` has its other argument, and what that is multiplied with."""
    if not called(user, aten.add.Tensor) or len(user.args) != 2 or not all(isinstance(x, fx.Node) for x in user.args) or user.args[0] is user.args[1]:
        return []
    alpha = user.kwargs.get("alpha", 1)
    if user.args[0] is node:
        return [(1, float(alpha))]
    return [(0, 1.0)] if alpha == 1 else []


def _read(z: ZLoss, node: fx.Node, divisors: list[fx.Node]) -> ZLoss | None:
    """Fill `z` from its last node; None where it is something else."""
    while True:
        z.chain.append(node)
        x = node.args[0] if node.args else None
        if called(node, aten.logsumexp.default):
            if not z.squared or divisors or [dim % meta.tensor(x).dim() for dim in node.args[1]] != [meta.tensor(x).dim() - 1]:
                return None
            z.logits = x
            return z
        if called(node, aten.mul.Tensor, aten.div.Tensor) and len(node.args) == 2 and is_number(node.args[1]):
            if z.squared:
                return None
            z.coefficient *= node.args[1] if node.target is aten.mul.Tensor else 1.0 / node.args[1]
        elif called(node, aten.sum.default, aten.mean.default) and z.reduction == "none" and not z.squared and not _cast(node):
            z.reduction = "sum" if node.target is aten.sum.default else "mean"
        elif called(node, aten.div.Tensor) and node.args[1] in divisors and not z.squared:
            divisors.remove(node.args[1])
        elif called(node, aten.div.Tensor) and isinstance(node.args[1], fx.Node) and not z.squared and z.reduction == "none" and z.count is None and len(node.args) == 2:
            z.count = node.args[1]
        elif called(node, aten.pow.Tensor_Scalar) and node.args[1] == 2 and not z.squared:
            z.squared = True
        elif called(node, aten.mul.Tensor) and node.args[1] is x and not z.squared:
            z.squared = True
        elif (masked := _masked(node)) is not None and fits(masked[1], masked[0]):
            x, mask, inverted = masked
            z.masks.append((mask, inverted))
            if called(node, aten.index.Tensor):
                z.chosen = True
                z.asserts += _trivial(node)
        elif not called(node, *ORDER, aten.slice.Tensor):
            return None
        node = x


def _trivial(node: fx.Node) -> list[fx.Node]:
    """The assertions that a size of this value is not negative, which a capture puts behind values of unknown sizes."""
    sizes = [size for size in node.users if called(size, aten.sym_size.int)]
    tests = [test for size in sizes for test in size.users if called(test, operator.ge) and test.args[1] == 0]
    return [check for test in tests for check in test.users if called(check, aten._assert_scalar.default)]


def _cast(node: fx.Node) -> bool:
    return node.kwargs.get("dtype") is not None or len(node.args) > 1


def _masked(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(values, mask, whether it says what to drop) of values of which those not kept become zero, or are not chosen."""
    if called(node, aten.mul.Tensor) and len(node.args) == 2 and all(isinstance(x, fx.Node) for x in node.args):
        values = [x for x in node.args if _from_normalizer(x)]
        return (values[0], next(x for x in node.args if x is not values[0]), False) if len(values) == 1 else None
    if called(node, aten.where.ScalarOther) and node.args[2] == 0:
        return node.args[1], node.args[0], False
    if called(node, aten.masked_fill.Scalar) and node.args[2] == 0:
        return node.args[0], node.args[1], True
    if called(node, aten.index.Tensor) and len(node.args[1]) == 1 and isinstance(node.args[1][0], fx.Node) and meta.tensor(node.args[1][0]).dtype == torch.bool:
        return node.args[0], node.args[1][0], False
    return None


def _from_normalizer(node: fx.Node) -> bool:
    while called(node, *ORDER, aten.slice.Tensor, aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.index.Tensor, aten.masked_fill.Scalar):
        node = next((x for x in node.args[:2] if isinstance(x, fx.Node) and called(x, aten.logsumexp.default)), node.args[0])
    return called(node, aten.logsumexp.default)


def differs(z: ZLoss, term: Term, reading: Reading) -> str | None:
    """Why this is not the z-loss of the op for `term`: z_loss times the square for each row kept, reduced as the loss is."""
    post = [node for node in z.chain if called(node, aten.slice.Tensor)]
    own = read_back(z.logits)[0][-1]
    place = (*own.function[:4], *selection(post, 0), *own.function[4:])
    if place != reading.function:
        return f"`{z.chain[-1].name}` is of other logits than the loss"
    if z.reduction == "none" and z.count is None and (z.chosen or not fits(z.chain[0], z.total)):
        return "it is not reduced as the loss is"
    labels, every = read_labels(term.target, term.ignore_index), never_ignored(term)
    for mask, inverted in z.masks:
        kept = read_mask(mask, term.ignore_index, inverted)
        if kept is None or not kept.same(labels):
            return f"`{mask.name}` is not known to be the rows with a label"
    if not z.masks and not every:
        return f"rows whose label is {term.ignore_index} count in it, and not in the loss"
    reduction = z.reduction
    if z.count is not None:
        counted = _counted(z.count)
        kept = None if counted is None else read_mask(counted, term.ignore_index)
        if z.reduction != "sum" or kept is None or not kept.same(labels):
            return f"`{z.count.name}` is not known to be the number of rows with a label"
        reduction = "mean"
    elif z.reduction == "mean" and not z.chosen and not every:
        return "its mean is over all rows, that of the loss over those with a label"
    return None if reduction == term.reduction else f"its reduction is {reduction}, that of the loss {term.reduction}"


def _counted(node: fx.Node) -> fx.Node | None:
    """The mask whose sum `node` is, or the greater of it and one."""
    if called(node, aten.clamp.default, aten.clamp_min.default) and node.args[1] == 1 and len(node.args) == 2:
        node = node.args[0]
    if called(node, aten.to.dtype):
        node = node.args[0]
    return node.args[0] if called(node, aten.sum.default) else None
