"""Adapted linears that read one tensor."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.kernels.lora_linear import OP as LORA_LINEAR
from fxopt.passes import linears
from fxopt.passes.base import Pass, Promise

aten = torch.ops.aten


@dataclass(frozen=True)
class Siblings(Pass):
    """adapted linears that read one tensor as one op

    Projections of one tensor (queries, keys and values; gate and up) become one `lora_linear`: the products with the A
    factors are one, x is saved once, and dx is one product or accumulates inside the products instead of being added up
    tensor by tensor. Found by dataflow: the same input value, in the same repeated block. Their names do not matter.
    """

    name: ClassVar[str] = "siblings"
    requires: ClassVar[frozenset[str]] = frozenset({"adapters"})
    # with dropout the seeds of the masks are drawn at once: another order of the random stream
    promise: ClassVar[Promise] = Promise(values="tolerance", random="declared")

    def run(self, edit: Edit) -> None:
        """Join every group of two or more."""
        groups: dict[Hashable, list[fx.Node]] = {}
        for node in edit.nodes:
            if node.target is LORA_LINEAR.forward.overload:
                groups.setdefault(_kind(node), []).append(node)
        for group in groups.values():
            if len(group) > 1 and not edit.spent:
                _join(edit, group)
        edit.dead()


def _kind(node: fx.Node) -> Hashable:
    """What siblings have in common."""
    x, _, formats, _, biases, a, _, _, transposed, dropout, _ = node.args
    where = meta.provenance(node)
    return (linears.uncast(x), meta.tensor(x).dtype, transposed, dropout, bool(biases), meta.tensor(a[0]).dtype, block(where.path), where.checkpoint)


def block(path: str) -> str:
    """The innermost numbered module that a path lies in ("layers.3" of "layers.3.mlp.up"): blocks are cut there."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _join(edit: Edit, group: list[fx.Node]) -> None:
    first = group[0]
    for node in group[1:]:
        _lift(edit, node, first)
    joined: list[Any] = [first.args[0]]
    for position in range(1, 8):  # bases, formats, shapes, biases, lora_a, lora_b, scales: lists
        joined.append([item for node in group for item in node.args[position]])
    transposed, dropout, _ = first.args[8:]
    seeds = None
    if dropout:
        seeds = edit.call(aten.randint.low, (-(1 << 63), (1 << 63) - 1, [len(joined[2])]), {"device": edit.device(first)}, like=first)
    new = edit.call(LORA_LINEAR.forward.overload, (*joined, transposed, dropout, seeds), like=first)
    start = 0
    for node in group:
        count = len(node.args[2])
        for item in list(node.users):
            if item.target is operator.getitem and item.args[1] < count:
                edit.replace(item, edit.item(new, start + item.args[1], like=item), rule=rule_here("siblings") if node is not first else None)
                edit.erase(item)
        start += count
    for node in reversed(group):
        drawn = node.args[10]
        edit.erase(node)
        if drawn is not None and not drawn.users:
            edit.erase(drawn)


def _lift(edit: Edit, node: fx.Node, to: fx.Node) -> None:
    """Move what a sibling reads of the state (casts of weights) in front of the place of the joined op."""
    order = {each: i for i, each in enumerate(edit.graph.nodes)}
    pending, found = [n for n in node.all_input_nodes if n is not node.args[0] and n is not node.args[10]], set()
    while pending:
        each = pending.pop()
        if each not in found and order[each] > order[to]:
            found.add(each)
            pending += each.all_input_nodes
    for each in sorted(found, key=order.__getitem__):
        edit.move_before(each, to)
