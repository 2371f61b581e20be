"""Formulas of masks against the masks themselves, element by element."""

from __future__ import annotations

import itertools

import torch
import torch.fx as fx
from captured import Captured

from fxopt.ir.formula import AtLeastZero, Data, Not, said, simplify
from fxopt.ir.masks import Reader, Unknown


def truth(formula, index, values) -> bool:
    """Whether a formula holds at coordinates, given the values of its leaves by name."""
    def number(affine) -> int:
        elements = sum(factor * element(each) for each, factor in affine.elements)
        return affine.const + sum(factor * index[dim] for dim, factor in affine.terms) + elements

    def element(data) -> int:
        return values[data.leaf][tuple(map(number, data.index))].item()

    if isinstance(formula, AtLeastZero):
        return number(formula.value) >= 0
    if isinstance(formula, Data):
        return bool(element(formula))
    if isinstance(formula, Not):
        return not truth(formula.part, index, values)
    return all(truth(part, index, values) for part in formula.parts)


def evaluate(node, inputs, constants):
    """What a node computes from inputs by name."""
    if node.op == "placeholder":
        return inputs[node.name]
    if node.op == "get_attr":
        return constants[node.target]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: evaluate(source, inputs, constants))
    return node.target(*args, **kwargs)


def check_formula(captured: Captured, inputs: dict[str, torch.Tensor], dense: torch.Tensor) -> None:
    """Element by element: what was read of the mask [2, 1, 6, 6] is what the program computes, if it can be read."""
    (node,) = captured.calls("scaled_dot_product_attention")
    reader = Reader(captured.program.constants)
    try:
        formula = reader.allowed(node.args[3])
    except Unknown:
        return
    allowed = (dense if dense.dtype == torch.bool else dense == 0).expand(2, 1, 6, 6)
    values = {name: evaluate(leaf, inputs, captured.program.constants) for name, leaf in reader.leaves.items()}
    sizes = {-1: 6, -2: 6, -3: 1, -4: 2}
    for shown in (formula, simplify(formula, {}, frozenset()), simplify(formula, sizes, frozenset())):
        for b, q, k in itertools.product(range(2), range(6), range(6)):
            assert truth(shown, {-4: b, -3: 0, -2: q, -1: k}, values) == bool(allowed[b, 0, q, k]), said(shown)
