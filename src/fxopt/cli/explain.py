"""`fxopt explain`: what each pass did, what it did not and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fxopt.cli.programs import EXACT, captured, model_argument, options


def add(commands: Any) -> None:
    """The command's arguments."""
    command = commands.add_parser("explain", help="say what each pass did, what it did not and why, what that is worth, and how to change it",
                                  description="Explain a pipeline on a model: what each pass did, what it did not and why, with source lines.")
    model_argument(command)
    options(command, EXACT)
    command.add_argument("--predict", choices=("ends", "each", "none"), default="ends",
                         help="memory and time of a step before and after the pipeline (the default), after each pass, or not at all")
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.explain import explain

    model, call, program = captured(arguments)
    found = explain(program, model, call, predict=arguments.predict)
    return (json.dumps(found.json(), indent=1, ensure_ascii=False) if arguments.json else str(found)) + "\n"
