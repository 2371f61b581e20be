"""`fxopt view`: the graph before and after every pass, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fxopt.cli.programs import EXACT, each_captured, model_argument, options


def add(commands: Any) -> None:
    """The command's arguments."""
    command = commands.add_parser("view", help="write one HTML file that shows the graph before and after every pass",
                                  description="Write one self-contained HTML file: the graph before and after every pass, side by side. It opens offline. "
                                              "Of a model that is captured in parts, one file for each part.")
    model_argument(command)
    options(command, EXACT)
    command.add_argument("-o", "--output", default="graph.html", metavar="FILE", help="default: graph.html")
    command.add_argument("--predict", choices=("ends", "each", "none"), default="ends", help="memory and saved values of a step, see `fxopt explain`")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.view import data, page

    lines = []
    for name, model, call, program in each_captured(arguments):
        output = Path(arguments.output)
        if name:  # a page for each part, named as the part
            output = output.with_name(f"{output.stem}.{name.split()[0]}{output.suffix}")
        size = page.write(data.data(program, model, call, predict=arguments.predict, errors=arguments.verify), str(output))
        lines.append(f"{output}: {f'part {name}, ' if name else ''}{len(list(program.history()))} stages, {size / 1e6:.2f} MB\n")
    return "".join(lines)
