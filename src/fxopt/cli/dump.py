"""`fxopt dump`: a model's graph as text."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fxopt.cli.programs import by_part, each_captured, model_argument, options, stage


def add(commands: Any) -> None:
    """The command's arguments."""
    dump = commands.add_parser("dump", help="print a model's graph after some passes, a whole step, a difference, or a report",
                               description="Print a model's graph as text that reads like Python.")
    model_argument(dump)
    options(dump)
    dump.add_argument("--after", metavar="PASS", help="print the program as it is after this pass (PASS@2: its second use; 'capture': before all)")
    dump.add_argument("--diff", nargs=2, metavar=("A", "B"), help="print what changes between after pass A and after pass B")
    dump.add_argument("--fold", action="store_true", help="print repeated blocks once")
    dump.add_argument("--step", action="store_true", help="print the whole training step: forward and backward of each region, what is saved between them, bytes")
    dump.add_argument("--report", action="store_true", help="print what each pass did, and where it nearly did, instead of the graph")
    dump.add_argument("--json", action="store_true", help="print graph and report as JSON")
    dump.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    found = [(name, _said(arguments, model, call, program)) for name, model, call, program in each_captured(arguments)]
    if arguments.json and found[0][0]:
        return json.dumps({"model": arguments.model, "parts": {name: json.loads(text) for name, text in found}}, indent=1) + "\n"
    return by_part(found)


def _said(arguments: argparse.Namespace, model: Any, call: Any, program: Any) -> str:
    from fxopt.ir.text import diff, report, summary, text
    from fxopt.runtime.step_text import step_text

    if arguments.diff:
        a, b = (stage(program, name) for name in arguments.diff)
        return diff(a, b, fold=arguments.fold) + "\n"
    passes = " | ".join(record.text for record in program.log)
    if arguments.after:
        program = stage(program, arguments.after)
    if arguments.step:
        return step_text(program, model, tuple(tuple(t.shape) for t in call.tensors))
    if arguments.json:
        return json.dumps({"model": arguments.model, "passes": passes, "training": program.training, "nodes": len(program.nodes),
                           "facts": sorted(map(str, program.facts)), "records": summary(program), "text": text(program, fold=arguments.fold)}, indent=1) + "\n"
    return report(program) if arguments.report else text(program, fold=arguments.fold)
