"""Attention masks read as formulas over positions, by abstract interpretation of the nodes that compute them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.formula import EVERYWHERE, Affine, All, AtLeastZero, Choice, Data, Distance, Formula, Not, Value, either, simplify
from fxopt.ir.index import full_arguments

aten = torch.ops.aten


class Unknown(Exception):
    """The node at which reading a mask ends, and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class Reader:
    """Reads nodes as values; remembers what it has read.

    Args:
        constants: values of the constants that `get_attr` nodes may name.
    """

    def __init__(self, constants: Mapping[str, Any]) -> None:
        self.constants = constants
        self.known: dict[fx.Node, Value] = {}

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
            value = self._read(node)
            flat = {i - val.dim(): Affine(0) for i, size in enumerate(val.shape) if meta.same_size(size, 1)}
            self.known[node] = value.at(flat)
        return self.known[node]

    def _read(self, node: fx.Node) -> Value:
        val = meta.tensor(node)
        if node.op == "placeholder":
            return Data(node.name, tuple(Affine(0, ((i - val.dim(), 1),)) for i in range(val.dim())))
        if node.op == "get_attr":
            known = self.constants.get(node.target)
            if isinstance(known, torch.Tensor) and known.numel() == 1:
                return self.number(known.dtype, known.item())
            raise Unknown(node, f"the mask depends on the values of `{node.target}`")
        rule = _RULES.get(node.target)
        if rule is None:
            raise Unknown(node, f"`{node.name}` ({node.target}) is not a function of positions that this pass knows")
        return rule(self, node, full_arguments(node))

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
        raise Unknown(node, f"`{node.name}` computes with the values of {found.leaf}" if isinstance(found, Data) else f"`{node.name}` counts positions of a mask")

    def formula(self, node: fx.Node, value: Any) -> Formula:
        """An operand as a formula: where it is non-zero."""
        found = self.operand(node, value) if isinstance(value, (fx.Node, bool, int, float)) else value
        if isinstance(found, Distance):
            found = found.value
        if isinstance(found, Affine):
            if found.terms:
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
        if isinstance(found, Affine) and not found.terms:
            return Choice(EVERYWHERE, found.const, found.const)
        if isinstance(found, (Affine, Distance)) or (isinstance(found, Data) and meta.tensor(value).dtype != torch.bool):
            raise Unknown(node, f"`{node.name}` computes a mask from values, not from whether they are zero")
        return Choice(found, 1.0, 0.0)


def _shift(dim: int, by: int) -> Mapping[int, Affine]:
    """Coordinates after inserting (by -1) or removing (by +1) dimension `dim`."""
    return {i: Affine(0, ((i + by, 1),)) for i in range(dim - 16, dim + 1 if by < 0 else dim)}


def _unsqueeze(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    return reader.read(given["self"]).at(_shift(given["dim"], -1))


def _select(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    if not isinstance(given["index"], int) or given["index"] < 0:
        raise Unknown(node, f"`{node.name}` selects a position that is not known")
    return reader.read(given["self"]).at({given["dim"]: Affine(given["index"])}).at(_shift(given["dim"], 1))


def _slice(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    start, step = given["start"] or 0, given["step"]
    if not isinstance(start, int) or start < 0:
        raise Unknown(node, f"`{node.name}` starts at a position that is not known")
    return reader.read(given["self"]).at({given["dim"]: Affine(start, ((given["dim"], step),))})


def _permute(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    dims = [dim % len(node.args[1]) for dim in node.args[1]]
    return reader.read(given["self"]).at({source - len(dims): Affine(0, ((place - len(dims), 1),)) for place, source in enumerate(dims)})


def _transpose(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    a, b = given["dim0"], given["dim1"]
    return reader.read(given["self"]).at({a: Affine(0, ((b, 1),)), b: Affine(0, ((a, 1),))})


def _same(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    return reader.read(given["self"])


def _view(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    """A view that only adds or drops dimensions of size 1."""
    was, now = ([(i - val.dim(), size) for i, size in enumerate(val.shape) if not meta.same_size(size, 1)]
                for val in (meta.tensor(given["self"]), meta.tensor(node)))
    if len(was) != len(now) or not all(meta.same_size(a, b) for (_, a), (_, b) in zip(was, now)):
        raise Unknown(node, f"`{node.name}` mixes dimensions of a mask")
    return reader.read(given["self"]).at({a: Affine(0, ((b, 1),)) for (a, _), (b, _) in zip(was, now)})


def _arange(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    start, step = given.get("start", 0), given.get("step", 1)
    if not isinstance(start, int) or not isinstance(step, int) or meta.tensor(node).dtype.is_floating_point:
        raise Unknown(node, f"`{node.name}` counts from a position that is not known")
    return Affine.of(start, {-1: step})


def _full(number: Any) -> Callable[..., Value]:
    def rule(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
        value = given["fill_value"] if number is None else number
        if isinstance(value, fx.Node):
            raise Unknown(node, f"`{node.name}` is filled with a number that is not known")
        return reader.number(meta.tensor(node).dtype, value)
    return rule


def _cast(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    x, dtype = given["self"], meta.tensor(node).dtype
    if dtype == torch.bool:
        return reader.formula(node, x)
    if not dtype.is_floating_point:
        value = reader.read(x)
        if isinstance(value, Affine) or not meta.tensor(x).dtype.is_floating_point and isinstance(value, Data):
            return value
        chosen = reader.choice(node, x)
        return Affine(int(chosen.yes)) if chosen.where == EVERYWHERE else chosen
    chosen = reader.choice(node, x)
    yes, no = (torch.tensor(number, dtype=torch.float64).to(dtype).item() for number in (chosen.yes, chosen.no))
    return Choice(chosen.where, yes, no)


def _compare(test: Callable[[Reader, fx.Node, Affine], Formula]) -> Callable[..., Value]:
    def rule(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
        a, b = reader.operand(node, given["self"]), reader.operand(node, given["other"])
        if isinstance(a, Data) and b == Affine(0) and test in (_equal, _unequal):
            return a if test is _unequal else Not(a)
        if isinstance(a, Distance) and isinstance(b, Affine) and test in (_at_most, _below):  # |gap| <= b: both gaps are
            return All(tuple(test(reader, node, gap.plus(b, -1)) for gap in (a.value, Affine(0).plus(a.value, -1))))
        return test(reader, node, reader.integer(node, given["self"]).plus(reader.integer(node, given["other"]), -1))
    return rule


def _at_least(reader: Reader, node: fx.Node, gap: Affine) -> Formula:
    return AtLeastZero(gap)


def _above(reader: Reader, node: fx.Node, gap: Affine) -> Formula:
    return AtLeastZero(Affine(-1).plus(gap))


def _at_most(reader: Reader, node: fx.Node, gap: Affine) -> Formula:
    return AtLeastZero(Affine(0).plus(gap, -1))


def _below(reader: Reader, node: fx.Node, gap: Affine) -> Formula:
    return AtLeastZero(Affine(-1).plus(gap, -1))


def _equal(reader: Reader, node: fx.Node, gap: Affine) -> Formula:
    return All((AtLeastZero(gap), AtLeastZero(Affine(0).plus(gap, -1))))


def _unequal(reader: Reader, node: fx.Node, gap: Affine) -> Formula:
    return simplify(Not(_equal(reader, node, gap)), {}, frozenset())


def _sum(times: int) -> Callable[..., Value]:
    def rule(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
        if given.get("alpha", 1) != 1:
            raise Unknown(node, f"`{node.name}` scales what it adds")
        if not meta.tensor(node).dtype.is_floating_point:
            return reader.integer(node, given["self"]).plus(reader.integer(node, given["other"]), times)
        a, b = reader.choice(node, given["self"]), reader.choice(node, given["other"])
        lowest = torch.finfo(meta.tensor(node).dtype).min
        if times == 1 and a.yes == b.yes == 0 and max(a.no, b.no) <= lowest:
            return Choice(All((a.where, b.where)), 0.0, max(a.no, b.no))
        return _mapped(node, a, b, lambda x, y: x + times * y)
    return rule


def _distance(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    return Distance(reader.integer(node, given["self"]))


def _product(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    if meta.tensor(node).dtype == torch.bool:
        return All((reader.formula(node, given["self"]), reader.formula(node, given["other"])))
    a, b = reader.operand(node, given["self"]), reader.operand(node, given["other"])
    if isinstance(a, Affine) and isinstance(b, Affine):
        if a.terms and b.terms:
            raise Unknown(node, f"`{node.name}` multiplies positions")
        factor, expression = (b.const, a) if a.terms else (a.const, b)
        return Affine(0).plus(expression, factor)
    return _mapped(node, reader.choice(node, given["self"]), reader.choice(node, given["other"]), operator.mul)


def _reversed_difference(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    return _mapped(node, reader.choice(node, given["other"]), reader.choice(node, given["self"]), operator.sub)


def _mapped(node: fx.Node, a: Choice, b: Choice, combine: Callable[[float, float], float]) -> Choice:
    """Two numbers and a formula from two such values, one of which is the same number everywhere."""
    if b.where == EVERYWHERE:
        return Choice(a.where, combine(a.yes, b.yes), combine(a.no, b.yes))
    if a.where == EVERYWHERE:
        return Choice(b.where, combine(a.yes, b.yes), combine(a.yes, b.no))
    raise Unknown(node, f"`{node.name}` combines two masks as numbers")


def _and(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    if meta.tensor(node).dtype != torch.bool:
        raise Unknown(node, f"`{node.name}` combines bits of integers")
    return All((reader.formula(node, given["self"]), reader.formula(node, given["other"])))


def _or(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    if meta.tensor(node).dtype != torch.bool:
        raise Unknown(node, f"`{node.name}` combines bits of integers")
    return either(reader.formula(node, given["self"]), reader.formula(node, given["other"]))


def _not(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    if meta.tensor(node).dtype != torch.bool:
        raise Unknown(node, f"`{node.name}` inverts bits of integers")
    return Not(reader.formula(node, given["self"]))


def _where(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    return _chosen(reader, node, reader.formula(node, given["condition"]), given["self"], given["other"])


def _filled(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    return _chosen(reader, node, reader.formula(node, given["mask"]), given["value"], given["self"])


def _chosen(reader: Reader, node: fx.Node, where: Formula, yes: Any, no: Any) -> Value:
    if meta.tensor(node).dtype == torch.bool:
        return either(All((where, reader.formula(node, yes))), All((Not(where), reader.formula(node, no))))
    a, b = reader.choice(node, yes), reader.choice(node, no)
    numbers = sorted({*((a.yes,) if a.where == EVERYWHERE else (a.yes, a.no)), *((b.yes,) if b.where == EVERYWHERE else (b.yes, b.no))})
    if len(numbers) > 2:
        raise Unknown(node, f"`{node.name}` takes more than two values")
    low, high = numbers[0], numbers[-1]
    is_high = [each.where if each.yes == high and each.no != high else EVERYWHERE if each.yes == high else
               Not(each.where) if each.no == high and each.where != EVERYWHERE else Not(EVERYWHERE) for each in (a, b)]
    return Choice(either(All((where, is_high[0])), All((Not(where), is_high[1]))), high, low)


def _triangle(sign: int) -> Callable[..., Value]:
    def rule(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
        # tril keeps k <= q + diagonal, triu keeps k >= q + diagonal
        kept = AtLeastZero(Affine.of(sign * given["diagonal"], {-2: sign, -1: -sign}))
        if meta.tensor(node).dtype == torch.bool:
            return All((reader.formula(node, given["self"]), kept))
        x = reader.choice(node, given["self"])
        if x.where != EVERYWHERE and x.no != 0:
            raise Unknown(node, f"`{node.name}` takes more than two values")
        return Choice(All((x.where, kept)), x.yes, 0.0)
    return rule


def _cumsum(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    x = reader.integer(node, given["self"])
    if x.terms:
        raise Unknown(node, f"`{node.name}` sums positions")
    return Affine.of(x.const, {given["dim"]: x.const})


def _diff(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    """Differences of a progression whose first one, against `prepend`, is like the others."""
    x, dim = reader.integer(node, given["self"]), given["dim"]
    step = Affine(dict(x.terms).get(dim, 0))
    if given["n"] != 1 or given["append"] is not None:
        raise Unknown(node, f"`{node.name}` is a difference of another kind")
    if given["prepend"] is not None:
        gap = x.at({dim: Affine(0)}).plus(reader.integer(node, given["prepend"]).at({dim: Affine(0)}), -1)
        if gap != step or not meta.same_size(meta.tensor(given["prepend"]).shape[dim], 1):
            raise Unknown(node, f"`{node.name}` starts unevenly")
    return step


def _index(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    x, chosen = given["self"], given["indices"]
    rank = meta.tensor(x).dim()
    if len(chosen) != rank or not all(isinstance(part, fx.Node) for part in chosen):
        raise Unknown(node, f"`{node.name}` indexes some of the dimensions")
    index = {i - rank: reader.integer(node, part) for i, part in enumerate(chosen)}
    if any(simplify(AtLeastZero(part), {}, frozenset()) != EVERYWHERE for part in index.values()):
        raise Unknown(node, f"`{node.name}` may index from the end")
    return reader.read(x).at(index)


_RULES: dict[Any, Callable[[Reader, fx.Node, dict[str, Any]], Value]] = {
    aten.unsqueeze.default: _unsqueeze, aten.select.int: _select, aten.slice.Tensor: _slice, aten.permute.default: _permute,
    aten.transpose.int: _transpose, aten.view.default: _view, aten.reshape.default: _view, aten.squeeze.dim: _view, aten.squeeze.default: _view,
    **{op: _same for op in (aten.expand.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
                            aten.lift_fresh_copy.default, aten.expand_as.default)},
    **{op: _arange for op in (aten.arange.default, aten.arange.start, aten.arange.start_step)},
    **{op: _full(1) for op in (aten.ones.default, aten.new_ones.default, aten.ones_like.default)},
    **{op: _full(0) for op in (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)},
    **{op: _full(None) for op in (aten.full.default, aten.new_full.default, aten.full_like.default)},
    aten.to.dtype: _cast, aten._to_copy.default: _cast,
    aten.ge.Tensor: _compare(_at_least), aten.ge.Scalar: _compare(_at_least), aten.gt.Tensor: _compare(_above), aten.gt.Scalar: _compare(_above),
    aten.le.Tensor: _compare(_at_most), aten.le.Scalar: _compare(_at_most), aten.lt.Tensor: _compare(_below), aten.lt.Scalar: _compare(_below),
    aten.eq.Tensor: _compare(_equal), aten.eq.Scalar: _compare(_equal), aten.ne.Tensor: _compare(_unequal), aten.ne.Scalar: _compare(_unequal),
    aten.add.Tensor: _sum(1), aten.sub.Tensor: _sum(-1), aten.mul.Tensor: _product, aten.rsub.Scalar: _reversed_difference,
    aten.bitwise_and.Tensor: _and, aten.logical_and.default: _and, aten.bitwise_or.Tensor: _or, aten.logical_or.default: _or,
    aten.bitwise_not.default: _not, aten.logical_not.default: _not,
    **{op: _where for op in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)},
    aten.masked_fill.Scalar: _filled, aten.masked_fill.Tensor: _filled,
    aten.abs.default: _distance, aten.tril.default: _triangle(1), aten.triu.default: _triangle(-1), aten.cumsum.default: _cumsum, aten.diff.default: _diff, aten.index.Tensor: _index,
}
