"""Programs that a command line names: a model, captured, after some passes."""

from __future__ import annotations

import argparse
import re
from typing import Any

from fxopt.cli.models import INPUTS, MODEL, UsageError, model_and_inputs
from fxopt.errors import PassError

EXACT = "canonicalize | causal | fuse | loss | remat | dead_code"


def options(command: argparse.ArgumentParser, passes: str = "") -> None:
    """Arguments that say which passes, in which mode, on which inputs."""
    command.add_argument("--passes", default=passes, metavar="TEXT", help="for example 'canonicalize | lora(rank=16) | fuse'")
    command.add_argument("--verify", action="store_true", help="run the graph before and after each pass and compare values and gradients")
    mode = command.add_mutually_exclusive_group()
    mode.add_argument("--train", dest="train", action="store_true", default=True, help="capture in training mode (the default)")
    mode.add_argument("--eval", dest="train", action="store_false", help="capture in evaluation mode")
    command.add_argument("--inputs", nargs="+", metavar="INPUT", help=INPUTS)


def model_argument(command: argparse.ArgumentParser) -> None:
    """The argument that says which model."""
    command.add_argument("model", help=MODEL)


def captured(arguments: argparse.Namespace, name: str | None = None, passes: str | None = None, batch: dict[str, Any] | None = None) -> tuple[Any, Any, Any]:
    """The model, the call and the program after all passes that the arguments say.

    Args:
        name, passes: instead of those of the arguments. batch: keyword arguments to capture with, instead of an example's.
    """
    from fxopt.ir.capture import Call, capture
    from fxopt.ir.program import Sample
    from fxopt.passes.pipeline import parse, run

    try:
        pipeline = parse(arguments.passes if passes is None else passes)
    except PassError as error:
        raise UsageError(error.what, where=error.where, do=error.do) from error
    model, args, kwargs = model_and_inputs(arguments.model if name is None else name, arguments.inputs if batch is None else [])
    kwargs = kwargs if batch is None else batch
    model.train(arguments.train)
    call = Call.of(args, kwargs)
    program = capture(model, call)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return model, call, run(pipeline, program, verify="values" if arguments.verify else None, sample=Sample(call.tensors, state))


def each_captured(arguments: argparse.Namespace) -> list[tuple[str, Any, Any, Any]]:
    """`captured`, with "" as name. Of a model whose code as a whole cannot be traced: name, model, call and program of each of its parts
    (parts with equal programs once)."""
    from fxopt import in_parts
    from fxopt.api import optimize
    from fxopt.errors import Untraceable

    try:
        return [("", *captured(arguments))]
    except Untraceable:
        model, args, kwargs = model_and_inputs(arguments.model, arguments.inputs)
        opt = optimize(model.train(arguments.train), arguments.passes, inputs=kwargs if kwargs and not args else args, check=False,
                       verify="values" if arguments.verify else None)
        return [(one.name, one.model, one.call, one.lowered.program) for one in in_parts.asked(opt.dispatcher.parts)]


def by_part(said: list[tuple[str, str]]) -> str:
    """Texts of parts, each under its part's name; of a whole, the text."""
    return "\n".join(f"part {name}:\n{text}" if name else text for name, text in said)


def stage(program: Any, name: str) -> Any:
    """The program in `program`'s history right after the pass `name` (`name@2`: its second use; `capture`: before all)."""
    wanted, _, count = name.partition("@")
    stages = list(reversed(list(program.history())))
    if wanted == "capture":
        return stages[0]
    found = [each for each in stages[1:] if re.split(r"\W", each.log[-1].text)[0] == wanted]
    index = int(count) - 1 if count.isdigit() else len(found) - 1
    if not 0 <= index < len(found):
        known = ["capture", *(record.text for record in program.log)]
        raise UsageError(f"there is no stage {name!r}", do=f"the stages are: {', '.join(known)}")
    return found[index]
