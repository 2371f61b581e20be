"""Formulas over the positions of a tensor: what an attention mask says, as a value that can be compared.

Dimensions are counted from the end (-1 is the key of a mask, -2 its query), so that broadcasting needs no work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

@dataclass(frozen=True)
class Affine:
    """The integer `const + sum(factor * i[dim])`."""

    const: int
    terms: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, const: int, factors: Mapping[int, int]) -> Affine:
        return cls(const, tuple(sorted((dim, factor) for dim, factor in factors.items() if factor)))

    def plus(self, other: Affine, times: int = 1) -> Affine:
        factors = dict(self.terms)
        for dim, factor in other.terms:
            factors[dim] = factors.get(dim, 0) + times * factor
        return Affine.of(self.const + times * other.const, factors)

    def at(self, where: Mapping[int, Affine]) -> Affine:
        found = Affine(self.const)
        for dim, factor in self.terms:
            found = found.plus(where.get(dim, Affine(0, ((dim, 1),))), factor)
        return found


@dataclass(frozen=True)
class Distance:
    """The absolute value of an integer expression."""

    value: Affine

    def at(self, where: Mapping[int, Affine]) -> Distance:
        return Distance(self.value.at(where))


@dataclass(frozen=True)
class AtLeastZero:
    """Where `value >= 0`."""

    value: Affine

    def at(self, where: Mapping[int, Affine]) -> Formula:
        return AtLeastZero(self.value.at(where))


@dataclass(frozen=True)
class Data:
    """The element of an input at the given coordinates; as a formula, where it is non-zero."""

    leaf: str
    index: tuple[Affine, ...]

    def at(self, where: Mapping[int, Affine]) -> Data:
        return Data(self.leaf, tuple(part.at(where) for part in self.index))


@dataclass(frozen=True)
class All:
    """Where all parts hold; `All(())` is everywhere."""

    parts: tuple[Formula, ...]

    def at(self, where: Mapping[int, Affine]) -> Formula:
        return All(tuple(part.at(where) for part in self.parts))


@dataclass(frozen=True)
class Not:
    """Where the part does not hold."""

    part: Formula

    def at(self, where: Mapping[int, Affine]) -> Formula:
        return Not(self.part.at(where))


@dataclass(frozen=True)
class Choice:
    """The number `yes` where the formula holds, else `no`."""

    where: Formula
    yes: float
    no: float

    def at(self, where: Mapping[int, Affine]) -> Choice:
        return Choice(self.where.at(where), self.yes, self.no)


Formula = AtLeastZero | Data | All | Not
Value = Affine | Distance | Formula | Choice
EVERYWHERE = All(())


def either(*parts: Formula) -> Formula:
    """Where any part holds."""
    return Not(All(tuple(Not(part) for part in parts)))


def simplify(formula: Formula, sizes: Mapping[int, int | None], nonzero: frozenset[str]) -> Formula:
    """The formula for coordinates within `sizes` (None: any), if all elements of the `nonzero` inputs are non-zero."""
    if isinstance(formula, Data):
        return EVERYWHERE if formula.leaf in nonzero else formula
    if isinstance(formula, AtLeastZero):
        low = high = formula.value.const
        for dim, factor in formula.value.terms:
            size = sizes.get(dim)
            reach = factor * (size - 1) if size is not None else None
            low = None if low is None or (factor < 0 and reach is None) else low + min(0, reach or 0)
            high = None if high is None or (factor > 0 and reach is None) else high + max(0, reach or 0)
        if low is not None and low >= 0:
            return EVERYWHERE
        return Not(EVERYWHERE) if high is not None and high < 0 else formula
    if isinstance(formula, Not):
        part = simplify(formula.part, sizes, nonzero)
        if isinstance(part, Not):
            return part.part
        if isinstance(part, AtLeastZero):
            return simplify(AtLeastZero(Affine(-1).plus(part.value, -1)), sizes, nonzero)
        return Not(part)
    kept: dict[Any, Formula] = {}
    for part in formula.parts:
        part = simplify(part, sizes, nonzero)
        for each in part.parts if isinstance(part, All) else (part,):
            if each == Not(EVERYWHERE):
                return each
            key = each.value.terms if isinstance(each, AtLeastZero) else each
            known = kept.get(key)
            if known is None or (isinstance(each, AtLeastZero) and each.value.const < known.value.const):
                kept[key] = each  # of `x + 3 >= 0` and `x >= 0` the second says both
    parts = tuple(kept.values())
    return parts[0] if len(parts) == 1 else All(parts)


def inputs_of(formula: Formula) -> frozenset[str]:
    """The inputs whose elements the formula asks about."""
    if isinstance(formula, Data):
        return frozenset({formula.leaf})
    if isinstance(formula, Not):
        return inputs_of(formula.part)
    return frozenset().union(*(inputs_of(part) for part in formula.parts)) if isinstance(formula, All) else frozenset()


def said(formula: Formula) -> str:
    """A formula in words."""
    if isinstance(formula, AtLeastZero):
        names = {-1: "k", -2: "q"}
        terms = " ".join(f"{'-' if factor < 0 else '+'} {'' if abs(factor) == 1 else abs(factor)}{names.get(dim, f'i[{dim}]')}" for dim, factor in sorted(formula.value.terms, key=lambda term: -term[1]))
        return f"{terms.removeprefix('+ ')} >= {-formula.value.const}"
    if isinstance(formula, Data):
        return f"{formula.leaf} is not 0"
    if isinstance(formula, Not):
        return f"not ({said(formula.part)})"
    return " and ".join(said(part) for part in formula.parts) or "everything"
