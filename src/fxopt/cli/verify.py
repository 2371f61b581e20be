"""`fxopt verify`: certify what the passes do to a model, or check a certificate again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fxopt.cli.models import INPUTS, MODEL, UsageError, model_and_inputs
from fxopt.errors import CheckError, PassError, UnprovenError


def add(commands: Any) -> None:
    """The command's arguments."""
    verify = commands.add_parser("verify", help="test every pass application on drawn and adversarial inputs, and write a certificate",
                                 description="Randomized testing of every pass application against fp64. Given a certificate, everything in it is computed anew.")
    verify.add_argument("model", help=f"{MODEL}; or a certificate (a .json file)")
    verify.add_argument("--passes", default="canonicalize | causal | fuse | loss | remat | dead_code", metavar="TEXT")
    verify.add_argument("--runs", type=int, default=2, help="drawn inputs, beside the example and the adversarial ones (default: 2)")
    verify.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    verify.add_argument("-o", "--output", metavar="FILE", help="write the certificate as JSON")
    mode = verify.add_mutually_exclusive_group()
    mode.add_argument("--train", dest="train", action="store_true", default=True, help="capture in training mode (the default)")
    mode.add_argument("--eval", dest="train", action="store_false", help="capture in evaluation mode")
    verify.add_argument("--inputs", nargs="+", metavar="INPUT", help=INPUTS)
    verify.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.passes.certificate import Certificate

    recorded = None
    if arguments.model.endswith(".json") and Path(arguments.model).is_file():
        recorded = Certificate.read(Path(arguments.model).read_text(), arguments.model)
        arguments.model, arguments.passes, arguments.train = recorded.model, recorded.passes, recorded.training
        arguments.runs, arguments.seed = recorded.runs, recorded.seed
        arguments.inputs = list(recorded.inputs) if recorded.inputs is not None else None
    made = certified(arguments)
    if arguments.output:
        Path(arguments.output).write_text(made.json())
    if recorded is not None:
        found = recorded.differences(made)
        if found:
            raise CheckError("the certificate is not confirmed: " + "; ".join(found), where=recorded.model,
                             do="where only a version differs, certify the model again with this one")
    if made.failures:
        raise CheckError(f"the certificate fails\n{made}", do="find the site with `fxopt bisect`")
    if not made.holds:
        raise UnprovenError(f"the certificate is unproven: of some stage nothing was compared\n{made}", do="give inputs that the model runs on in every case, or more runs")
    return f"{made}\n" + ("confirmed: hashes, facts and verdicts are those of the certificate\n" if recorded is not None else "")


def certified(arguments: argparse.Namespace) -> Any:
    """The certificate of the model, passes and numbers that a command was given."""
    import torch

    from fxopt.api import optimize
    from fxopt.passes.pipeline import parse

    try:
        passes = parse(arguments.passes)
    except PassError as error:
        raise UsageError(error.what, where=error.where, do=error.do) from error
    torch.manual_seed(arguments.seed)  # a factory's random weights are part of what is recorded
    model, args, kwargs = model_and_inputs(arguments.model, arguments.inputs)
    model.train(arguments.train)
    original = {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    opt = optimize(model, passes, inputs=kwargs if kwargs and not args else args, check=False)
    return opt.verify(runs=arguments.runs, seed=arguments.seed, original=original, name=arguments.model, named_inputs=arguments.inputs)
