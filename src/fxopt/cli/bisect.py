"""`fxopt bisect`: the pass and the rewrite that make a model's program wrong, and a script that shows it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fxopt.cli.models import INPUTS, MODEL, UsageError, model_and_inputs, named
from fxopt.errors import PassError, Untraceable


def add(commands: Any) -> None:
    """The command's arguments."""
    bisect = commands.add_parser("bisect", help="find the pass and the rewrite that make a program wrong",
                                 description="Halve over passes and over rewrites until one is left; write a script that shows what it did.")
    bisect.add_argument("model", help=MODEL)
    bisect.add_argument("--passes", default="canonicalize | causal | fuse | loss | remat | dead_code", metavar="TEXT")
    wrong = bisect.add_mutually_exclusive_group()
    wrong.add_argument("--not-finite", action="store_true", help="wrong is: an output or a gradient is not finite (default: a certificate fails)")
    wrong.add_argument("--predicate", metavar="MODULE:FUNCTION", help="wrong is: FUNCTION(program) is true")
    bisect.add_argument("--runs", type=int, default=2, help="drawn inputs of the certificate (default: 2)")
    bisect.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    bisect.add_argument("-o", "--output", metavar="FILE", help="write the script")
    bisect.add_argument("--inputs", nargs="+", metavar="INPUT", help=INPUTS)
    bisect.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    import torch

    from fxopt.api import optimize
    from fxopt.ir.capture import Call, capture
    from fxopt.ir.program import Sample
    from fxopt.passes.bisect import bisect, not_finite
    from fxopt.passes.pipeline import applied, parse, run

    try:
        passes = parse(arguments.passes)
    except PassError as error:
        raise UsageError(error.what, where=error.where, do=error.do) from error
    torch.manual_seed(arguments.seed)
    model, args, kwargs = model_and_inputs(arguments.model, arguments.inputs)
    call = Call.of(args, kwargs)
    try:
        raw = capture(model.train(), call)
    except Untraceable:  # the model runs in parts
        if arguments.not_finite:
            raise
        opt = optimize(model, passes, inputs=kwargs if kwargs and not args else args, check=False)
        return _written(arguments, opt.bisect(named(arguments.predicate) if arguments.predicate else None))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    program = run(passes, raw, sample=Sample(call.tensors, state))
    predicate = not_finite(call.tensors, state) if arguments.not_finite else named(arguments.predicate) if arguments.predicate else None
    found = bisect(program, applied(program, passes), call.tensors, state, predicate=predicate, runs=arguments.runs, seed=arguments.seed)
    return _written(arguments, found)


def _written(arguments: argparse.Namespace, found: Any) -> str:
    if arguments.output and found.repro is not None:
        Path(arguments.output).write_text(found.repro.text)
    return f"{found}\n"
