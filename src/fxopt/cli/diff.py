"""`fxopt diff`: what differs between two programs."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from pathlib import Path
from typing import Any

from fxopt.cli.models import UsageError
from fxopt.cli.programs import captured, options, stage
from fxopt.errors import DataError

_AT = re.compile(r"(.+?)@([a-z_]\w*(?:@\d+)?)")
ONE = "MODEL, MODEL@PASS (as it is after this pass; MODEL@capture: before all), or a saved dump (.txt or .json)"


def add(commands: Any) -> None:
    """The command's arguments."""
    command = commands.add_parser("diff", help="print what differs between two programs: stages of a model, two models, two pipelines, saved dumps",
                                  description="Print a unified diff of two programs as text. Nothing is printed if they are equal.")
    command.add_argument("a", help=ONE)
    command.add_argument("b", help="the same")
    options(command)
    command.add_argument("--passes-b", metavar="TEXT", help="the passes of B (default: those of A)")
    command.add_argument("--fold", action="store_true", help="print repeated blocks once")
    command.add_argument("--context", type=int, default=2, help="lines around each difference (default: 2)")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.ir.text import diff, text

    made: dict[Any, Any] = {}  # one capture for both sides, where they name the same model and passes
    sides = [_side(arguments, name, passes, made)
             for name, passes in ((arguments.a, arguments.passes), (arguments.b, arguments.passes if arguments.passes_b is None else arguments.passes_b))]
    if not any(isinstance(side, str) for side in sides):
        said = diff(*sides, fold=arguments.fold, context=arguments.context)
    else:
        texts = [side if isinstance(side, str) else text(side, fold=arguments.fold) for side in sides]
        said = "\n".join(difflib.unified_diff(*(each.splitlines() for each in texts), arguments.a, arguments.b, n=arguments.context, lineterm=""))
    return said + "\n" if said else ""


def _side(arguments: argparse.Namespace, name: str, passes: str, made: dict[Any, Any]) -> Any:
    """A program, or the text of a saved dump."""
    if Path(name).is_file():
        return _saved(Path(name))
    found = _AT.fullmatch(name)
    model, after = (found[1], found[2]) if found else (name, None)
    if (model, passes) not in made:
        made[model, passes] = captured(arguments, model, passes)[2]
    return made[model, passes] if after is None else stage(made[model, passes], after)


def _saved(file: Path) -> str:
    """The text of a dump that was saved, as text or with --json.

    Raises:
        DataError: the file is no dump.
    """
    try:
        said = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            said = json.loads(said)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"this is no saved dump: {type(error).__name__}: {error}", where=str(file), do="save one with `fxopt dump MODEL > file.txt`, or with --json") from error
    if not isinstance(said, str) or not said.startswith("# "):
        raise UsageError(f"{file} is no saved dump", do="save one with `fxopt dump MODEL > file.txt`, or with --json")
    return said
