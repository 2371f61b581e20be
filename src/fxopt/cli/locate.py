"""`fxopt locate`: the first value of a step on a recorded batch that is not finite."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fxopt.cli.programs import EXACT, captured, model_argument, options
from fxopt.errors import CheckError, DataError


def add(commands: Any) -> None:
    """The command's arguments."""
    command = commands.add_parser("locate", help="replay a step on a recorded batch and name the first value or gradient that is not finite",
                                  description="Replay a step on a recorded batch. Exit code 4 if a value or a gradient is not finite: it is named on stderr.")
    model_argument(command)
    options(command, EXACT)
    command.add_argument("--batch", metavar="FILE", help="the model's keyword arguments as safetensors (default: the example's)")
    command.add_argument("--scale", type=float, default=1.0, help="what the loss is multiplied by for the backward (default: 1)")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fxopt.passes.interpreted import materialize
    from fxopt.runtime.locate import locate

    batch = None
    if arguments.batch:
        try:
            batch = load_file(Path(arguments.batch))
        except (OSError, SafetensorError) as error:
            raise DataError(f"the batch cannot be read: {error}", where=arguments.batch, do="save it with safetensors.torch.save_file") from error
    model, call, program = captured(arguments, batch=batch)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: value for name, value in materialize(program, held).items() if name in program.slots}
    found = locate(program, call.tensors, state, arguments.scale)
    if found is not None:
        raise CheckError(str(found))
    return "every output and every gradient of this step is finite\n"
