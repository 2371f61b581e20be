"""`fxopt dump`: a model's graph as text."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from fxopt.cli.models import INPUTS, MODEL, UsageError, model_and_inputs
from fxopt.errors import PassError


def add(commands: Any) -> None:
    """The command's arguments."""
    dump = commands.add_parser("dump", help="print a model's graph after some passes, a difference, or a report",
                               description="Print a model's graph as text that reads like Python.")
    dump.add_argument("model", help=MODEL)
    dump.add_argument("--passes", default="", metavar="TEXT", help="for example 'canonicalize | lora(rank=16) | fuse'")
    dump.add_argument("--after", metavar="PASS", help="print the program as it is after this pass (PASS@2: its second use; 'capture': before all)")
    dump.add_argument("--diff", nargs=2, metavar=("A", "B"), help="print what changes between after pass A and after pass B")
    dump.add_argument("--fold", action="store_true", help="print repeated blocks once")
    dump.add_argument("--report", action="store_true", help="print what each pass did, and where it nearly did, instead of the graph")
    dump.add_argument("--json", action="store_true", help="print graph and report as JSON")
    dump.add_argument("--verify", action="store_true", help="run the graph before and after each pass and compare values and gradients")
    mode = dump.add_mutually_exclusive_group()
    mode.add_argument("--train", dest="train", action="store_true", default=True, help="capture in training mode (the default)")
    mode.add_argument("--eval", dest="train", action="store_false", help="capture in evaluation mode")
    dump.add_argument("--inputs", nargs="+", metavar="INPUT", help=INPUTS)
    dump.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.ir.capture import Call, capture
    from fxopt.ir.program import Sample
    from fxopt.ir.text import diff, report, summary, text
    from fxopt.passes.pipeline import parse, run

    try:
        pipeline = parse(arguments.passes)
    except PassError as error:
        raise UsageError(error.what, where=error.where, do=error.do) from error
    model, args, kwargs = model_and_inputs(arguments.model, arguments.inputs)
    model.train(arguments.train)
    call = Call.of(args, kwargs)
    program = capture(model, call)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    program = run(pipeline, program, verify="values" if arguments.verify else None, sample=Sample(call.tensors, state))
    if arguments.diff:
        a, b = (_stage(program, name) for name in arguments.diff)
        return diff(a, b, fold=arguments.fold) + "\n"
    if arguments.after:
        program = _stage(program, arguments.after)
    if arguments.json:
        return json.dumps({"model": arguments.model, "passes": str(pipeline), "training": program.training, "nodes": len(program.nodes),
                           "facts": sorted(map(str, program.facts)), "records": summary(program), "text": text(program, fold=arguments.fold)}, indent=1) + "\n"
    return report(program) if arguments.report else text(program, fold=arguments.fold)


def _stage(program: Any, name: str) -> Any:
    """The program in `program`'s history right after the pass `name`."""
    wanted, _, count = name.partition("@")
    stages = list(reversed(list(program.history())))
    if wanted == "capture":
        return stages[0]
    found = [stage for stage in stages[1:] if re.split(r"\W", stage.log[-1].text)[0] == wanted]
    index = int(count) - 1 if count.isdigit() else len(found) - 1
    if not 0 <= index < len(found):
        known = ["capture", *(record.text for record in program.log)]
        raise UsageError(f"there is no stage {name!r}", do=f"the stages are: {', '.join(known)}")
    return found[index]
