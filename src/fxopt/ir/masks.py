"""Attention masks read as formulas over positions, by abstract interpretation of the nodes that compute them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.formula import EVERYWHERE, Affine, All, AtLeastZero, Choice, Data, Distance, Formula, Not, Value, either
from fxopt.ir.index import full_arguments
from fxopt.ir.mask_rules import RULES, Unknown

__all__ = ["Reader", "Unknown"]


class Reader:
    """Reads nodes as values; remembers what it has read.

    Args:
        constants: values of the constants that `get_attr` nodes may name.
        written: nodes that some node writes into: their value is another one later.

    Attributes:
        leaves: the nodes behind `Data`, by name: inputs, and integer tensors that are no function of positions.
    """

    def __init__(self, constants: Mapping[str, Any], written: Set[fx.Node] = frozenset()) -> None:
        self.constants, self.written = constants, written
        self.known: dict[fx.Node, Value] = {}
        self.leaves: dict[str, fx.Node] = {}

    def allowed(self, node: fx.Node) -> Formula:
        """Where attention may look, from a boolean mask or from one that is added to the scores.

        Raises:
            Unknown: at the first node that is no function of positions and inputs.
        """
        value = self.read(node)
        if not isinstance(value, Choice):
            return self.formula(node, value)
        lowest = torch.finfo(meta.tensor(node).dtype).min  # what is added to a score to remove it for certain
        if value.yes == 0 and value.no <= lowest:
            return value.where
        if value.no == 0 and value.yes <= lowest:
            return Not(value.where)
        raise Unknown(node, f"`{node.name}` adds {value.yes} or {value.no} to the scores, which is no mask for certain")

    def read(self, node: fx.Node) -> Value:
        """What a node computes.

        Raises:
            Unknown: as `allowed`.
        """
        if node not in self.known:
            val = meta.tensor(node)
            if val is None:
                raise Unknown(node, f"`{node.name}` is no tensor")
            if node in self.written:
                raise Unknown(node, f"`{node.name}` is written in place")
            try:
                value = self._read(node)
            except Unknown:
                if val.dtype == torch.bool or val.dtype.is_floating_point or val.dtype.is_complex:
                    raise
                value = self.data(node)
            flat = {i - val.dim(): Affine(0) for i, size in enumerate(val.shape) if meta.same_size(size, 1)}
            self.known[node] = value.at(flat)
        return self.known[node]

    def _read(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return self.data(node)
        if node.op == "get_attr":
            known = self.constants.get(node.target)
            if isinstance(known, torch.Tensor) and known.numel() == 1:
                return self.number(known.dtype, known.item())
            raise Unknown(node, f"the mask depends on the values of `{node.target}`")
        rule = RULES.get(node.target)
        if rule is None:
            raise Unknown(node, f"`{node.name}` ({node.target}) is not a function of positions that this pass knows")
        return rule(self, node, full_arguments(node))

    def data(self, node: fx.Node) -> Data:
        """The elements of a node whose values are not known."""
        self.leaves[node.name] = node
        rank = meta.tensor(node).dim()
        return Data(node.name, tuple(Affine(0, ((i - rank, 1),)) for i in range(rank)))

    def flag(self, node: Any, value: Data) -> bool:
        """Whether what `node` holds is only if the element is non-zero, not the element."""
        return meta.tensor(node).dtype == torch.bool and meta.tensor(self.leaves[value.leaf]).dtype != torch.bool

    def number(self, dtype: torch.dtype, value: Any) -> Value:
        """The same number everywhere."""
        if dtype == torch.bool:
            return EVERYWHERE if value else Not(EVERYWHERE)
        return Choice(EVERYWHERE, float(value), float(value)) if dtype.is_floating_point else Affine(int(value))

    def operand(self, node: fx.Node, value: Any) -> Value:
        """An argument: a node or a number."""
        if isinstance(value, fx.Node):
            return self.read(value)
        if isinstance(value, (bool, int, float)):
            kind = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float64
            return self.number(kind, value)
        raise Unknown(node, f"`{node.name}` has an argument that is no number")

    def integer(self, node: fx.Node, value: Any) -> Affine:
        """An operand as an index expression."""
        found = self.operand(node, value)
        if found in (EVERYWHERE, Not(EVERYWHERE)):
            return Affine(int(found == EVERYWHERE))
        if isinstance(found, Affine):
            return found
        if isinstance(found, Data):
            if self.flag(value, found) or meta.tensor(value).dtype.is_floating_point:
                raise Unknown(node, f"`{node.name}` computes with the values of {found.leaf}")
            return Affine(0, (), ((found, 1),))
        raise Unknown(node, f"`{node.name}` counts positions of a mask")

    def formula(self, node: fx.Node, value: Any) -> Formula:
        """An operand as a formula: where it is non-zero."""
        found = self.operand(node, value) if isinstance(value, (fx.Node, bool, int, float)) else value
        if isinstance(found, Distance):
            found = found.value
        if isinstance(found, Affine):
            if not found.fixed:
                return Not(All((AtLeastZero(found), AtLeastZero(Affine(0).plus(found, -1)))))
            return EVERYWHERE if found.const else Not(EVERYWHERE)
        if isinstance(found, Choice):
            parts = (found.where if found.yes else None, Not(found.where) if found.no else None)
            return either(*(part for part in parts if part is not None))
        return found

    def choice(self, node: fx.Node, value: Any) -> Choice:
        """An operand as two numbers and a formula that chooses."""
        found = self.operand(node, value)
        if isinstance(found, Choice):
            return found
        if isinstance(found, Affine) and found.fixed:
            return Choice(EVERYWHERE, found.const, found.const)
        if isinstance(found, (Affine, Distance)) or (isinstance(found, Data) and meta.tensor(value).dtype != torch.bool):
            raise Unknown(node, f"`{node.name}` computes a mask from values, not from whether they are zero")
        return Choice(found, 1.0, 0.0)
