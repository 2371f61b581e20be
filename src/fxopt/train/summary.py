"""What a model is made of: parameters, what trains, bytes by category, and what a step is predicted to take."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from fxopt.errors import FxoptError
from fxopt.runtime.stored import StoredWeight


@dataclass(frozen=True)
class Row:
    """A part of a model.

    Attributes:
        path: of the module. kind: its class. parameters, trained: numbers of elements. bytes: of its parameters and buffers.
    """

    path: str
    kind: str
    parameters: int
    trained: int
    bytes: int


def rows(model: nn.Module, depth: int = 2) -> list[Row]:
    """The parts of a model down to a depth, each with all that lies in it; the first row is the whole model. Shared tensors count once in
    each part."""
    found = []
    for path, module in model.named_modules():
        if path.count(".") + bool(path) > depth or isinstance(module, StoredWeight):
            continue
        parameters = list(module.parameters())
        dense = sum(_elements(part) for part in module.modules() if isinstance(part, StoredWeight))
        found.append(Row(path or "(all)", type(module).__name__, sum(p.numel() for p in parameters) + dense, sum(p.numel() for p in parameters if p.requires_grad),
                         sum(t.numel() * t.element_size() for t in (*parameters, *module.buffers()))))
    return found


def _elements(stored: StoredWeight) -> int:
    number = 1
    for size in stored.stored.shape:
        number *= size
    return number


def summary(model: nn.Module, depth: int = 2, *, predict: bool = True, measured: int | None = None) -> str:
    """A table of `rows`, and beneath it, for an optimized model that was called, the predicted bytes of a training step by category.

    Args:
        predict: ask for the prediction. measured: peak bytes of a run, to stand beside the prediction.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, side in (("module", "left"), ("class", "left"), ("parameters", "right"), ("trained", "right"), ("bytes", "right")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for row in rows(model, depth):
        table.add_row(row.path, row.kind, f"{row.parameters:,}", f"{row.trained:,}" if row.trained else "", _size(row.bytes))
    out = io.StringIO()
    Console(file=out, width=120, no_color=True).print(table)
    plan = _plan(model) if predict else None
    text = out.getvalue().rstrip() + (f"\n\n{plan}" if plan is not None else "")
    return text + (f"\nmeasured peak: {_size(measured)}" if measured is not None else "")


def _plan(model: Any) -> Any:
    if not callable(getattr(type(model), "plan", None)) or not callable(getattr(type(model), "prepare", None)):
        return None
    try:
        return model.plan()
    except FxoptError as error:
        return f"no prediction: {error.what}"


def _size(number: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024  # type: ignore[assignment]
    return f"{number:,.2f} GiB"
