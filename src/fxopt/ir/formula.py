"""Formulas over the positions of a tensor: what an attention mask says, as a value that can be compared.

Dimensions are counted from the end (-1 is the key of a mask, -2 its query), so that broadcasting needs no work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Affine:
    """The integer `const + sum(factor * i[dim]) + sum(factor * element)`, with elements of integer inputs."""

    const: int
    terms: tuple[tuple[int, int], ...] = ()
    elements: tuple[tuple[Data, int], ...] = ()

    @classmethod
    def of(cls, const: int, factors: Mapping[int, int], elements: Mapping[Data, int] = MappingProxyType({})) -> Affine:
        kept = [(element, factor) for element, factor in elements.items() if factor]
        return cls(const, tuple(sorted((dim, factor) for dim, factor in factors.items() if factor)), tuple(sorted(kept, key=repr)))

    @property
    def fixed(self) -> bool:
        """Whether it is a number."""
        return not self.terms and not self.elements

    def plus(self, other: Affine, times: int = 1) -> Affine:
        factors, elements = dict(self.terms), dict(self.elements)
        for dim, factor in other.terms:
            factors[dim] = factors.get(dim, 0) + times * factor
        for element, factor in other.elements:
            elements[element] = elements.get(element, 0) + times * factor
        return Affine.of(self.const + times * other.const, factors, elements)

    def at(self, where: Mapping[int, Affine]) -> Affine:
        found = Affine(self.const)
        for dim, factor in self.terms:
            found = found.plus(where.get(dim, Affine(0, ((dim, 1),))), factor)
        for element, factor in self.elements:
            found = found.plus(Affine(0, (), ((element.at(where), 1),)), factor)
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
    """The element of an input (or of a computed integer tensor) at the given coordinates; as a formula, where it is non-zero."""

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
        low = high = None if formula.value.elements else formula.value.const
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
            key = (each.value.terms, each.value.elements) if isinstance(each, AtLeastZero) else each
            known = kept.get(key)
            if known is None or (isinstance(each, AtLeastZero) and each.value.const < known.value.const):
                kept[key] = each  # of `x + 3 >= 0` and `x >= 0` the second says both
    parts = tuple(kept.values())
    return parts[0] if len(parts) == 1 else All(parts)


def inputs_of(formula: Formula) -> frozenset[str]:
    """The inputs whose elements the formula asks about."""
    return frozenset(element.leaf for element in elements_of(formula)) | flags_of(formula)


def elements_of(formula: Formula) -> frozenset[Data]:
    """The elements whose values the formula computes with."""
    if isinstance(formula, AtLeastZero):
        return frozenset(element for element, _ in formula.value.elements)
    return _over_parts(formula, elements_of)


def flags_of(formula: Formula) -> frozenset[str]:
    """The inputs of which the formula asks whether an element is zero."""
    return frozenset({formula.leaf}) if isinstance(formula, Data) else _over_parts(formula, flags_of)


def _over_parts(formula: Formula, find: Callable[[Formula], frozenset[Any]]) -> frozenset[Any]:
    if isinstance(formula, Not):
        return find(formula.part)
    return frozenset().union(*map(find, formula.parts)) if isinstance(formula, All) else frozenset()


_NAMES = {-1: "k", -2: "q", -3: "head", -4: "row"}


def _shown(value: Affine, const: bool = True) -> str:
    """An index expression in words."""
    named = [(_NAMES.get(dim, f"i[{dim}]"), factor) for dim, factor in sorted(value.terms, reverse=True)]
    named += [(f"{element.leaf}[{', '.join(_shown(part) for part in element.index)}]", factor) for element, factor in value.elements]
    named.sort(key=lambda term: term[1] < 0)
    parts = [f"{'-' if factor < 0 else '+'} {'' if abs(factor) == 1 else abs(factor)}{name}" for name, factor in named]
    if const and (value.const or not parts):
        parts.append(f"{'-' if value.const < 0 else '+'} {abs(value.const)}")
    return " ".join(parts).removeprefix("+ ")


def said(formula: Formula) -> str:
    """A formula in words."""
    if isinstance(formula, AtLeastZero):
        return f"{_shown(formula.value, const=False)} >= {-formula.value.const}"
    if isinstance(formula, Data):
        return f"{formula.leaf} is not 0"
    if isinstance(formula, Not):
        return f"not ({said(formula.part)})"
    return " and ".join(said(part) for part in formula.parts) or "everything"
