"""What a pass is: a frozen dataclass with a name, typed arguments, facts, a promise, and one method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fxopt.ir.edit import Edit


@dataclass(frozen=True)
class Promise:
    """What a pass may change.

    Attributes:
        values: "exact" (same kernels in the same order up to reassociation that is bitwise equal), "tolerance" (equal in
            exact arithmetic; error against fp64 stays a small factor of the original's), "bounded" (an approximation
            with a stated bound, such as quantization), "same" (only tags; nothing is recomputed).
        gradients: "all" (every parameter that took a gradient still does), or "declared" (the pass freezes some by name).
        bound: for "bounded", the relative error of the replaced values (Frobenius norm), as the pass documents it.
        outputs: "all", or "declared" (parts of what the model returns beside the loss, which the pass documents, have other values).
        of: what `bound` is of: "weights" (what is stored of each; the rest is equal for the stored ones), "dtypes" (products whose operands
            are rounded; in fp64 the program is equal), or "values" (of another kind, which the pass documents).
        random: "same" (the same random operations in the same order, so one seed gives the same numbers), or "declared".
    """

    values: str = "tolerance"
    gradients: str = "all"
    bound: float | None = None
    random: str = "same"
    outputs: str = "all"
    of: str = "values"


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses; their fields are the pass's arguments.

    The first line of a pass's docstring is its label in dumps.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    destroys: ClassVar[frozenset[str]] = frozenset()
    promise: ClassVar[Promise] = Promise()
    must_fire: ClassVar[bool] = False  # True: changing nothing is an error, not a note

    def run(self, edit: Edit) -> None:
        """Rewrite the program through `edit`."""
        raise NotImplementedError

    def text(self) -> str:
        """The text form: the name and the arguments that differ from their defaults; `parse` reads it back."""
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            if default is not dataclasses.MISSING and value == default:
                continue
            shown.append(f"{field.name}={literal(value)}")
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    def __str__(self) -> str:
        return self.text()


def literal(value: Any) -> str:
    """An argument as the pass language writes it."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return value if value.isidentifier() and value not in ("true", "false", "none") else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else repr(value)
