"""Packed documents in a mask: "query and key belong to the same segment", found in a formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.formula import Affine, All, AtLeastZero, Data, Formula, Not, elements_of
from fxopt.ir.index import called, full_arguments
from fxopt.ir.mask_rules import not_zero
from fxopt.ir.masks import Reader, Unknown

aten = torch.ops.aten

QUERY, KEY = Affine(0, ((-2, 1),)), Affine(0, ((-1, 1),))
_SWAPPED = {-2: KEY, -1: QUERY}


@dataclass(frozen=True)
class Segments:
    """Where the integer `query` equals the same one at the key.

    Attributes:
        query: the element of the query: a tensor's name, and an index into it in the mask's coordinates.
    """

    query: Data

    @property
    def key(self) -> Data:
        """The element of the key."""
        return self.query.at(_SWAPPED)


def same_segment(reader: Reader, formula: Formula) -> tuple[Segments | None, Formula]:
    """The segments that a simplified formula asks for, and what else it says within them; (None, formula) if for none.

    What else is said of a sequence that is known to rise by one from token to token within a segment (positions that restart
    in each document, if the documents are found by where they do) is said of the positions.
    """
    parts = formula.parts if isinstance(formula, All) else (formula,)
    gaps = {part.value: part for part in parts if isinstance(part, AtLeastZero)}
    for value, part in gaps.items():
        reverse = gaps.get(Affine(0).plus(value, -1))
        found = _compared(value)
        if found is None or reverse is None:
            continue
        rest = tuple(each for each in parts if each not in (part, reverse))
        rising = counted(reader, found)
        if rising is not None:
            rest = tuple(_by_position(each, rising) for each in rest)
        return found, rest[0] if len(rest) == 1 else All(rest)
    return None, formula


def _compared(value: Affine) -> Segments | None:
    """Segments, if the integer is their difference between query and key."""
    if value.const or value.terms or len(value.elements) != 2:
        return None
    (one, factor), (other, minus) = value.elements
    if (factor, minus) not in ((1, -1), (-1, 1)):
        return None
    query = one if QUERY in one.index else other
    found = Segments(query)
    return found if QUERY in query.index and {query, found.key} == {one, other} else None


def _by_position(part: Formula, rising: Segments) -> Formula:
    """The same formula with `p[q] - p[k]` as `q - k`."""
    if not isinstance(part, AtLeastZero):
        return part
    elements = dict(part.value.elements)
    factor = elements.get(rising.query, 0)
    if not factor or elements.get(rising.key, 0) != -factor:
        return part
    gap = QUERY.plus(KEY, -1).plus(Affine.of(0, {}, {rising.query: 1, rising.key: -1}), -1)
    return AtLeastZero(part.value.plus(gap, factor))


def counted(reader: Reader, segments: Segments) -> Segments | None:
    """The sequence p whose restarts make the segments, as an element at the query: `cumsum(diff(p) != 1)`.

    Segments made so do not change between two tokens only if p rises by one at every token between them: within a segment
    p[q] - p[k] = q - k.
    """
    node = reader.leaves[segments.query.leaf]
    if not called(node, aten.cumsum.default) or meta.tensor(node).dtype not in (torch.int64, torch.int32):
        return None
    given = full_arguments(node)
    try:
        changes = reader.formula(node, _steps(reader, given["self"]))
        elements = elements_of(changes)
        if given["dim"] != -1 or len(elements) != 1:
            return None
        (step,) = elements
        difference = reader.leaves[step.leaf]
        if changes != not_zero(Affine(-1, (), ((step, 1),))) or not called(difference, aten.diff.default) or reader.read(difference) != step:
            return None
        given = full_arguments(difference)
        sequence = reader.read(given["self"])
    except Unknown:
        return None
    before = meta.tensor(given["prepend"])
    if given["n"] != 1 or given["dim"] != -1 or given["append"] is not None or before is None or not meta.same_size(before.shape[-1], 1):
        return None
    if not isinstance(sequence, Data) or meta.tensor(given["self"]).dtype not in (torch.int64, torch.int32) or sequence.index[-1] != KEY:
        return None
    where = {i - len(segments.query.index): part for i, part in enumerate(segments.query.index)}
    return Segments(sequence.at(where))


def _steps(reader: Reader, node: fx.Node) -> Formula:
    """Where the summed 0 or 1 is 1."""
    value = reader.choice(node, node)
    if (value.yes, value.no) == (1, 0):
        return value.where
    if (value.yes, value.no) == (0, 1):
        return Not(value.where)
    raise Unknown(node, f"`{node.name}` sums other numbers than 0 and 1")
