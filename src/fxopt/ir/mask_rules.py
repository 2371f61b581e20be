"""What each operator does to the values that a `masks.Reader` reads, by operator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.formula import EVERYWHERE, Affine, All, AtLeastZero, Choice, Data, Distance, Formula, Not, Value, either, simplify

if TYPE_CHECKING:
    from fxopt.ir.masks import Reader

aten = torch.ops.aten


class Unknown(Exception):
    """The node at which reading a mask ends, and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


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
        if isinstance(value, Data) and not meta.tensor(x).dtype.is_floating_point and not reader.flag(x, value) or isinstance(value, Affine):
            if dtype.itemsize < meta.tensor(x).dtype.itemsize and (dtype.itemsize < 4 or isinstance(value, Data) or value.elements):
                raise Unknown(node, f"`{node.name}` ({dtype}) may not hold its values")
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
    return not_zero(gap)


def not_zero(value: Affine) -> Formula:
    """Where an integer expression is not 0."""
    return simplify(Not(All((AtLeastZero(value), AtLeastZero(Affine(0).plus(value, -1))))), {}, frozenset())


def _sum(times: int) -> Callable[..., Value]:
    def rule(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
        if given.get("alpha", 1) != 1:
            raise Unknown(node, f"`{node.name}` scales what it adds")
        if not meta.tensor(node).dtype.is_floating_point:
            return _exact(node, reader.integer(node, given["self"]).plus(reader.integer(node, given["other"]), times))
        a, b = reader.choice(node, given["self"]), reader.choice(node, given["other"])
        lowest = torch.finfo(meta.tensor(node).dtype).min
        if times == 1 and a.yes == b.yes == 0 and max(a.no, b.no) <= lowest:
            return Choice(All((a.where, b.where)), 0.0, max(a.no, b.no))
        return _mapped(node, a, b, lambda x, y: x + times * y)
    return rule


def _exact(node: fx.Node, value: Affine) -> Affine:
    """What integers of few bits compute with unknown numbers may wrap around. (So may 64 bits, for numbers near 2^63: no ids are.)"""
    if value.elements and meta.tensor(node).dtype.itemsize < 4:
        raise Unknown(node, f"`{node.name}` ({meta.tensor(node).dtype}) may wrap around")
    return value


def _distance(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    return Distance(reader.integer(node, given["self"]))


def _product(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    if meta.tensor(node).dtype == torch.bool:
        return All((reader.formula(node, given["self"]), reader.formula(node, given["other"])))
    a, b = reader.operand(node, given["self"]), reader.operand(node, given["other"])
    if isinstance(a, Affine) and isinstance(b, Affine):
        if not a.fixed and not b.fixed:
            raise Unknown(node, f"`{node.name}` multiplies positions")
        factor, expression = (a.const, b) if a.fixed else (b.const, a)
        return _exact(node, Affine(0).plus(expression, factor))
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
    if not x.fixed:
        raise Unknown(node, f"`{node.name}` sums positions or values")
    return Affine.of(x.const, {given["dim"]: x.const})


def _diff(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    """Differences of a progression whose first one, against `prepend`, is like the others."""
    x, dim = reader.integer(node, given["self"]), given["dim"]
    step = Affine(dict(x.terms).get(dim, 0))
    if given["n"] != 1 or given["append"] is not None or x.elements:
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


RULES: dict[Any, Callable[[Reader, fx.Node, dict[str, Any]], Value]] = {
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
