"""The command `fxopt`. Thin: it reads a model and arguments, calls the library, and prints.

Torch is imported inside the commands only, so that `fxopt --help` answers at once. Results go to stdout, errors to
stderr. Exit codes: 0 done, 2 wrong usage, 3 refused (the model cannot be captured, a pass cannot be applied), 4 a check
failed, 5 a check had nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxopt.cli import bisect, data, diff, dump, explain, launch, locate, passes, plan, profile, train, verify, view
from fxopt.cli.models import UsageError
from fxopt.errors import CheckError, FxoptError, UnprovenError

DONE, USAGE, REFUSED, FAILED, UNPROVEN = 0, 2, 3, 4, 5
COMMANDS = (dump, diff, explain, view, locate, plan, profile, data, train, launch, verify, bisect, passes)  # one file each: `add` says its arguments


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(prog="fxopt", description="Capture a PyTorch model as a graph, rewrite it with passes, and look at it.")
    commands = top.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        sys.stdout.write(arguments.run(arguments))
    except UsageError as error:
        return _refuse(error, USAGE)
    except UnprovenError as error:
        return _refuse(error, UNPROVEN)
    except CheckError as error:
        return _refuse(error, FAILED)
    except FxoptError as error:
        return _refuse(error, REFUSED)
    return DONE


def _refuse(error: FxoptError, code: int) -> int:
    print(f"fxopt: {error}", file=sys.stderr)
    return code
