"""A mutant: a pass application with one wrong change planted in it, as a pass like any other."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx as fx

from fxopt.errors import CheckError
from fxopt.ir.edit import Edit
from fxopt.kernels.catalog import CATALOG
from fxopt.passes.base import Pass, Promise
from fxopt.passes.pipeline import parse

aten = torch.ops.aten
OPS = {op.name: op for op in CATALOG}
Change = Callable[[Edit, fx.Node], None]
WRONG: list[Callable[..., Any]] = []  # ops that compute something else, see `faulty`


@dataclass(frozen=True)
class Mutant:
    """A wrong change and where it is planted.

    Attributes:
        program: name of a program in `programs.py`.
        before: passes that are applied first, rightly.
        inner: the pass that is sabotaged; "": none, the change is the whole rewrite.
        at: the name of an operation, of which the change hits number `nth`; or "" for the site of rewrite number `nth` of `inner`.
        change: what is done there.
        label: in words.
        kind: "graph", "pass" or "op".
    """

    program: str
    before: str
    inner: str
    at: str
    nth: int
    change: Change
    label: str
    kind: str

    @property
    def name(self) -> str:
        """Unique, for test ids and the table."""
        return f"{self.program}: {self.inner + ': ' if self.inner else ''}{self.label}"

    def planted(self) -> Pass:
        """The sabotaged pass."""
        inner = next(iter(parse(self.inner))) if self.inner else None
        made = Sabotaged(inner, self.at, self.nth, self.change)
        object.__setattr__(made, "promise", inner.promise if inner is not None else Promise())
        return made


@dataclass(frozen=True)
class Sabotaged(Pass):
    """what another pass does, and one wrong change"""

    name: ClassVar[str] = "sabotaged"

    inner: Pass | None
    at: str
    nth: int
    change: Change = field(hash=False)
    needs: int | None = None  # the number of the rewrite that made what is changed; None: the change is a rewrite of its own, behind all others

    def run(self, edit: Edit) -> None:
        """Run the other pass, then change its site number `nth` if there is one."""
        if self.inner is not None:
            self.inner.run(edit)
        if self.inner is not None and len(edit.rewrites) <= (self.nth if not self.at else -1 if self.needs is None else self.needs):
            return  # the site was not rewritten: there is nothing to get wrong
        own = self.inner is None or bool(self.at) and self.needs is None
        if own and edit.spent:
            return
        node = self.site(edit)
        before = [(each.name, each.target, each.args, each.kwargs) for each in edit.graph.nodes]
        self.change(edit, node)
        edit.dead()
        if [(each.name, each.target, each.args, each.kwargs) for each in edit.graph.nodes] == before:
            raise CheckError("the mutant changed nothing")
        if own:
            edit.rewrote("sabotage", node if node in edit.graph.nodes else edit.nodes[-1])

    def text(self) -> str:
        """Not of the language."""
        return f"sabotaged({self.inner or ''})"

    def site(self, edit: Edit) -> fx.Node:
        """The node that is changed."""
        if self.at:
            found = [node for node in edit.nodes if node.op == "call_function" and named(node) == self.at]
            if len(found) <= self.nth:
                raise CheckError(f"there are {len(found)} {self.at}, not {self.nth + 1}")
            return found[self.nth]
        wanted = edit.rewrites[self.nth].node
        node = next(node for node in edit.nodes if node.name == wanted)
        return node.args[0] if node.target is operator.getitem else node


def named(node: fx.Node) -> str:
    """`mul`, `layer_norm`, `fxopt.rope`: the operation that a node calls."""
    if isinstance(node.target, torch._ops.OpOverload):
        space, _, name = node.target._schema.name.partition("::")
        return name if space == "aten" else f"{space}.{name}"
    return getattr(node.target, "__name__", str(node.target))


# -- changes ---------------------------------------------------------------------------------------------------------


def instead(make: Callable[[Edit, fx.Node], fx.Node]) -> Change:
    """Everything that reads the node reads what `make` makes of it."""

    def change(edit: Edit, node: fx.Node) -> None:
        known = set(edit.nodes)
        new = make(edit, node)
        edit.replace(node, new, unless=lambda user: user not in known)

    return change


def calls(target: Any, *more: Any) -> Change:
    """`target(node, *more)` in place of the node."""
    return instead(lambda edit, node: edit.call(target, (node, *more), like=node, before=node.next))


def times(factor: float) -> Change:
    """The value times a number."""
    return calls(aten.mul.Tensor, factor)


def dropped(edit: Edit, node: fx.Node) -> None:
    """The operation is left out: its first argument passes through."""
    edit.replace(node, node.args[0])


def swapped(i: int = 0, j: int = 1) -> Change:
    """Two arguments change places."""

    def change(edit: Edit, node: fx.Node) -> None:
        args = list(node.args)
        args[i], args[j] = args[j], args[i]
        edit.set_args(node, tuple(args))

    return change


def argument(place: int | str, value: Any) -> Change:
    """An argument is another: a value, or a function of (edit, node, what it was)."""

    def change(edit: Edit, node: fx.Node) -> None:
        schema = node.target._schema.arguments
        args = [node.args[i] if i < len(node.args) else node.kwargs.get(each.name, each.default_value) for i, each in enumerate(schema)]
        at = place if isinstance(place, int) else [each.name for each in schema].index(place)
        args[at] = value(edit, node, args[at]) if callable(value) and not isinstance(value, torch._ops.OpOverload) else value
        only = {each.name: args.pop(i) for i, each in reversed(list(enumerate(schema))) if each.kwarg_only}
        edit.set_args(node, tuple(args), only)

    return change


def through(target: Any, *more: Any) -> Callable[[Edit, fx.Node, Any], Any]:
    """For `argument`: `target(what it was, *more)`; of a list, each."""

    def value(edit: Edit, node: fx.Node, was: Any) -> Any:
        def one(each: Any) -> Any:
            return edit.call(target, (each, *more), like=node, before=node)

        return [one(each) for each in was] if isinstance(was, (list, tuple)) else one(was)

    return value


def retargeted(target: Any) -> Change:
    """Another operation on the same arguments."""
    return lambda edit, node: edit.set_target(node, target)


def detached(place: int | str) -> Change:
    """One argument takes no gradient any more."""
    return argument(place, through(aten.detach.default))


def faulty(op: str, candidate: Callable[..., Any]) -> Change:
    """The fused op computes what a wrong variant of it computes (see tests/kernels/faults.py)."""
    made = OPS[op]

    def wrong(*args: Any) -> Any:
        right = made.overload(*args)
        found = tuple(candidate(*args))
        if isinstance(right, torch.Tensor):
            return found[0]
        return (*found, *tuple(right)[len(found):])

    wrong.__name__ = f"wrong_{op}_{len(WRONG)}"
    wrong.__module__ = "mutants.passes"  # where scripts find it
    WRONG.append(wrong)

    def change(edit: Edit, node: fx.Node) -> None:
        if node.target is not made.overload:
            raise CheckError(f"{node.target} is not {op}")
        schema = node.target._schema.arguments
        args = tuple(node.args[i] if i < len(node.args) else each.default_value for i, each in enumerate(schema))
        edit.set_args(node, args)
        edit.set_target(node, wrong)

    return change
