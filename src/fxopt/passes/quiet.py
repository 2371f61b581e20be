"""A program with dropout turned off, for comparisons of programs that draw different random numbers."""

from __future__ import annotations

import torch

from fxopt.ir.edit import Edit, random
from fxopt.ir.program import Program
from fxopt.torch_private import OpOverload

aten = torch.ops.aten
_PROBABILITIES = ("p", "dropout_p", "dropout")


def quiet(program: Program) -> Program | None:
    """The program with every probability of a zero at 0; None if it draws other random numbers that reach a value."""
    edit = Edit(program, "quiet")
    for node in edit.nodes:
        target = node.target
        if node.op != "call_function" or not isinstance(target, OpOverload):
            continue
        places = [i for i, argument in enumerate(target._schema.arguments) if argument.name in _PROBABILITIES and isinstance(_given(node, i, argument), float)]
        if places:
            args = [*node.args, *(argument.default_value for argument in target._schema.arguments[len(node.args) : places[0] + 1])]
            args[places[0]] = 0.0
            name = target._schema.arguments[places[0]].name
            edit.set_args(node, tuple(args), {key: value for key, value in node.kwargs.items() if key != name})
    if any(random(node) and any(not _seeds(user) for user in node.users) for node in edit.nodes if node.op == "call_function"):
        return None
    return edit.finish("quiet")


def _given(node: torch.fx.Node, place: int, argument: torch.Argument) -> object:
    return node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, argument.default_value)


def _seeds(node: torch.fx.Node) -> bool:
    """Whether the node reads drawn numbers as the seeds of a dropout that is off."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "fxopt" and any(a.name == "seeds" for a in node.target._schema.arguments)
