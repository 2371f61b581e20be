"""`fxopt passes`: the catalog of passes."""

from __future__ import annotations

import argparse
import inspect
from typing import Any


def add(commands: Any) -> None:
    """The command's arguments."""
    passes = commands.add_parser("passes", help="list the passes, their arguments and what they promise")
    passes.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.passes.catalog import PASSES

    lines = []
    for cls in PASSES:
        fields = ", ".join(f"{name}: {field.type}" for name, field in cls.__dataclass_fields__.items() if name in inspect.signature(cls).parameters)
        lines.append(f"{cls.name}({fields})\n    {(cls.__doc__ or '').splitlines()[0]}\n    values: {cls.promise.values}")
    return "\n".join(lines) + "\n"
