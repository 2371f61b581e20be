"""`fxopt profile`: where the time of a training step goes, node by node."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fxopt.cli.models import INPUTS, MODEL, UsageError, model_and_inputs


def add(commands: Any) -> None:
    """The command's arguments."""
    profile = commands.add_parser("profile", help="time and bytes of each node of a training step",
                                  description="Run training steps on the model and say how long each node of its graphs takes, forward and backward, and which line it comes from.")
    profile.add_argument("model", help=MODEL)
    profile.add_argument("--passes", default="canonicalize | causal | fuse | loss | remat | dead_code", metavar="TEXT")
    profile.add_argument("--batch", type=int, help="samples (default: those of the example)")
    profile.add_argument("--seq", type=int, help="tokens of each (default: those of the example)")
    profile.add_argument("--top", type=int, default=30, help="rows of the table (default 30)")
    profile.add_argument("--repeats", type=int, default=5, help="steps that are timed; the shortest time of each node counts")
    profile.add_argument("--json", metavar="FILE", help="write all rows there")
    profile.add_argument("--folded", metavar="FILE", help="write folded stacks there, for a flame graph")
    profile.add_argument("--inputs", nargs="+", metavar="INPUT", help=INPUTS)
    profile.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.api import optimize

    for name in ("top", "repeats"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} is {getattr(arguments, name)}", do="at least 1")
    model, args, kwargs = model_and_inputs(arguments.model, arguments.inputs)
    opt = optimize(model.train(), arguments.passes, inputs=kwargs if kwargs and not args else args, check=False)
    if arguments.batch is None and arguments.seq is None:
        found = opt.profile(repeats=arguments.repeats)
    else:
        found = opt.profile(opt.sized_call(batch=arguments.batch, length=arguments.seq), repeats=arguments.repeats)
    lines = [found.table(arguments.top)]
    for file, text in ((arguments.json, found.json), (arguments.folded, found.folded)):
        if file is not None:
            Path(file).write_text(text())
            lines.append(f"written: {file}")
    return "\n".join(lines) + "\n"
