"""`fxopt plan`: what a training step will take."""

from __future__ import annotations

import argparse
from typing import Any

from fxopt.cli.models import INPUTS, MODEL, UsageError, model_and_inputs


def add(commands: Any) -> None:
    """The command's arguments."""
    plan = commands.add_parser("plan", help="predict the memory and the time of a training step",
                               description="Predict peak memory, bytes by category and time of a training step, before it is run.")
    plan.add_argument("model", help=MODEL)
    plan.add_argument("--passes", default="canonicalize | causal | fuse | loss | remat | dead_code", metavar="TEXT")
    plan.add_argument("--batch", type=int, help="samples (default: those of the example)")
    plan.add_argument("--seq", type=int, help="tokens of each (default: those of the example)")
    plan.add_argument("--optimizer", default=None, help="whose state counts: adamw (the default), adamw_8bit, momentum, sgd or none")
    plan.add_argument("--fit", choices=("batch", "seq"), help="find the largest that --memory holds")
    plan.add_argument("--memory", metavar="SIZE", help="for --fit, such as 6GiB")
    plan.add_argument("--measure", action="store_true", help="run the step too, and print what was measured beside what was predicted")
    plan.add_argument("--inputs", nargs="+", metavar="INPUT", help=INPUTS)
    plan.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.api import optimize
    from fxopt.passes.language import bytes_of
    from fxopt.train.batch import model_loss
    from fxopt.runtime.sizes import measure

    if bool(arguments.fit) != bool(arguments.memory):
        raise UsageError("--fit and --memory belong together", do="write for example --fit batch --memory 6GiB")
    if arguments.fit and getattr(arguments, arguments.fit) is not None:
        raise UsageError(f"--fit {arguments.fit} looks for what --{arguments.fit} gives", do="leave out one of the two")
    limit = bytes_of(arguments.memory) if arguments.memory else None
    model, args, kwargs = model_and_inputs(arguments.model, arguments.inputs)
    opt = optimize(model.train(), arguments.passes, inputs=kwargs if kwargs and not args else args, check=False)
    lines = []
    if limit is not None:
        vary = "length" if arguments.fit == "seq" else "batch"
        number, plan, call = opt.largest_call(limit, vary, batch=arguments.batch, length=arguments.seq, optimizer=arguments.optimizer)
        lines.append(f"the largest {arguments.fit} within {arguments.memory}: {number}")
    elif opt.parts and (arguments.batch, arguments.seq, arguments.measure) == (None, None, False):
        return f"{opt.plan(optimizer=arguments.optimizer)}\n"
    else:
        call = opt.sized_call(batch=arguments.batch, length=arguments.seq)
        plan = opt.plan(batch=arguments.batch, length=arguments.seq, optimizer=arguments.optimizer)
    lines.append(str(plan))
    if arguments.measure:
        given, named = call.rebuild(call.tensors)
        trained = [p for p in opt.parameters() if p.requires_grad]
        lines.append(measure(lambda: model_loss(opt, named if not given else given), plan, trained).beside(plan))
    return "\n".join(lines) + "\n"
