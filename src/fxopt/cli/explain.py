"""`fxopt explain`: what each pass did, what it did not and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fxopt.cli.programs import EXACT, by_part, each_captured, model_argument, options


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

    found = [(name, explain(program, model, call, predict=arguments.predict)) for name, model, call, program in each_captured(arguments)]
    if arguments.json:
        body = {name: each.json() for name, each in found}
        return json.dumps(body.get("", {"parts": body}), indent=1, ensure_ascii=False) + "\n"
    return by_part([(name, f"{each}\n") for name, each in found])
