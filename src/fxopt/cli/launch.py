"""`fxopt launch`: a command on several processes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fxopt.cli.models import UsageError


def add(commands: Any) -> None:
    """The command's arguments."""
    launch = commands.add_parser("launch", help="run a command on several processes that train together",
                                 description="Run a command on several processes, under the environment variables of torchrun. Ends all of them when one fails, with its exit code. "
                                             "On several machines: the same command on each, with --nodes, --node-rank and --master.")
    launch.add_argument("--processes", type=int, metavar="N", help="on this machine; default: one for each GPU")
    launch.add_argument("--nodes", type=int, default=1, metavar="N", help="machines")
    launch.add_argument("--node-rank", type=int, default=0, metavar="I", help="which of them this is, from 0")
    launch.add_argument("--master", metavar="HOST:PORT", help="a free port of machine 0, where all processes meet")
    launch.add_argument("command_line", nargs=argparse.REMAINDER, metavar="COMMAND", help="a program with its arguments; a .py file runs under this Python")
    launch.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.train.launcher import launch

    command = arguments.command_line[1:] if arguments.command_line[:1] == ["--"] else arguments.command_line
    if not command:
        raise UsageError("there is no command", where="launch", do="fxopt launch --processes 2 train.py")
    if code := launch(command, arguments.processes, arguments.nodes, arguments.node_rank, arguments.master):
        sys.exit(code)
    return ""
