"""The command `fxopt`. Thin: it reads a model and arguments, calls the library, and prints.

Torch is imported inside the commands only, so that `fxopt --help` answers at once. Results go to stdout, errors to
stderr. Exit codes: 0 done, 2 wrong usage, 3 refused (the model cannot be captured, a pass cannot be applied), 4 a check
failed.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxopt.errors import CheckError, DataError, FxoptError, PassError

DONE, USAGE, REFUSED, FAILED = 0, 2, 3, 4
BATCH, LENGTH = 2, 16
_INPUT = re.compile(r"(?:(\w+)=)?(\w+)\[([\d, ]*)\](?::(\d+))?")


class UsageError(FxoptError):
    """The command line asks for something that does not exist."""


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(prog="fxopt", description="Capture a PyTorch model as a graph, rewrite it with passes, and look at it.")
    commands = top.add_subparsers(dest="command", required=True)
    dump = commands.add_parser("dump", help="print a model's graph after some passes, a difference, or a report",
                               description="Print a model's graph as text that reads like Python.")
    dump.add_argument("model", help="package.module:factory (returns a model, or a model and its inputs), or a local Hugging Face folder")
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
    dump.add_argument("--inputs", nargs="+", metavar="INPUT", help="for example 'float32[2,8]', 'input_ids=int64[2,16]:1000' (random below 1000)")
    dump.set_defaults(run=_dump)
    plan = commands.add_parser("plan", help="predict the memory and the time of a training step",
                               description="Predict peak memory, bytes by category and time of a training step, before it is run.")
    plan.add_argument("model", help="as for dump")
    plan.add_argument("--passes", default="canonicalize | causal | fuse | loss | remat | dead_code", metavar="TEXT")
    plan.add_argument("--batch", type=int, help="samples (default: those of the example)")
    plan.add_argument("--seq", type=int, help="tokens of each (default: those of the example)")
    plan.add_argument("--optimizer", default=None, help="whose state counts: adamw (the default), adamw_8bit, momentum, sgd or none")
    plan.add_argument("--fit", choices=("batch", "seq"), help="find the largest that --memory holds")
    plan.add_argument("--memory", metavar="SIZE", help="for --fit, such as 6GiB")
    plan.add_argument("--measure", action="store_true", help="run the step too, and print what was measured beside what was predicted")
    plan.add_argument("--inputs", nargs="+", metavar="INPUT", help="as for dump")
    plan.set_defaults(run=_plan)
    passes = commands.add_parser("passes", help="list the passes, their arguments and what they promise")
    passes.set_defaults(run=_passes)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        sys.stdout.write(arguments.run(arguments))
    except UsageError as error:
        return _refuse(error, USAGE)
    except CheckError as error:
        return _refuse(error, FAILED)
    except FxoptError as error:
        return _refuse(error, REFUSED)
    return DONE


def _refuse(error: FxoptError, code: int) -> int:
    print(f"fxopt: {error}", file=sys.stderr)
    return code


# -- commands --------------------------------------------------------------------------------------------------------


def _dump(arguments: argparse.Namespace) -> str:
    from fxopt.ir.capture import Call, capture
    from fxopt.ir.program import Sample
    from fxopt.ir.text import diff, report, summary, text
    from fxopt.passes.pipeline import parse, run

    try:
        pipeline = parse(arguments.passes)
    except PassError as error:
        raise UsageError(error.what, where=error.where, do=error.do) from error
    model, args, kwargs = _model(arguments.model, arguments.inputs)
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


def _plan(arguments: argparse.Namespace) -> str:
    from fxopt.api import optimize
    from fxopt.passes.language import bytes_of
    from fxopt.runtime.loop import model_loss
    from fxopt.runtime.sizes import measure

    if bool(arguments.fit) != bool(arguments.memory):
        raise UsageError("--fit and --memory belong together", do="write for example --fit batch --memory 6GiB")
    if arguments.fit and getattr(arguments, arguments.fit) is not None:
        raise UsageError(f"--fit {arguments.fit} looks for what --{arguments.fit} gives", do="leave out one of the two")
    limit = bytes_of(arguments.memory) if arguments.memory else None
    model, args, kwargs = _model(arguments.model, arguments.inputs)
    opt = optimize(model.train(), arguments.passes, inputs=kwargs if kwargs and not args else args, check=False)
    lines = []
    if limit is not None:
        vary = "length" if arguments.fit == "seq" else "batch"
        number, plan, call = opt.largest_call(limit, vary, batch=arguments.batch, length=arguments.seq, optimizer=arguments.optimizer)
        lines.append(f"the largest {arguments.fit} within {arguments.memory}: {number}")
    else:
        call = opt.sized_call(batch=arguments.batch, length=arguments.seq)
        plan = opt.plan(batch=arguments.batch, length=arguments.seq, optimizer=arguments.optimizer)
    lines.append(str(plan))
    if arguments.measure:
        given, named = call.rebuild(call.tensors)
        trained = [p for p in opt.parameters() if p.requires_grad]
        lines.append(measure(lambda: model_loss(opt, named if not given else given), plan, trained).beside(plan))
    return "\n".join(lines) + "\n"


def _passes(arguments: argparse.Namespace) -> str:
    from fxopt.passes.catalog import PASSES

    lines = []
    for cls in PASSES:
        fields = ", ".join(f"{name}: {field.type}" for name, field in cls.__dataclass_fields__.items() if name in inspect.signature(cls).parameters)
        lines.append(f"{cls.name}({fields})\n    {(cls.__doc__ or '').splitlines()[0]}\n    values: {cls.promise.values}")
    return "\n".join(lines) + "\n"


# -- models and inputs -----------------------------------------------------------------------------------------------


def _model(name: str, inputs: Sequence[str] | None) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model that `name` says, and the arguments to capture it with."""
    if (Path(name) / "config.json").is_file():
        model, example = _from_folder(Path(name), example=inputs is None)
    else:
        model, example = _from_factory(name)
    if inputs is not None:
        return model, *_parsed(inputs)
    if example is None:
        raise UsageError(f"{name} gives no inputs", do="return (model, inputs) from the factory, or pass --inputs")
    if isinstance(example, dict):
        return model, (), example
    return model, tuple(example) if isinstance(example, (tuple, list)) else (example,), {}


def _from_factory(name: str) -> tuple[Any, Any]:
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(f"{name!r} names no model", do="write package.module:factory, or a folder that holds a config.json")
    sys.path.insert(0, os.getcwd())  # a console script does not look there by itself
    try:
        factory = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"there is no module {error.name!r}", where=name, do="run the command where Python can import it") from error
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise UsageError(f"{module} has no {attribute!r}", where=name)
        factory = getattr(factory, part)
    made = factory()
    return made if isinstance(made, tuple) and len(made) == 2 else (made, None)


def _from_folder(folder: Path, example: bool) -> tuple[Any, dict[str, Any] | None]:
    """A model from a Hugging Face folder: with its weights if there are any, else with random ones."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise DataError(f"transformers has no class {names[0]!r}" if names else "the config names no architecture", where=str(folder / "config.json"))
    if hasattr(config, "use_cache"):
        config.use_cache = False
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    model = cls.from_pretrained(folder, config=config, local_files_only=True) if weights else cls(config)
    return model, _example(model, config, torch) if example else None


def _example(model: Any, config: Any, torch: Any) -> dict[str, Any]:
    """Inputs that fit a config: token ids below its vocabulary, or an image of its size."""
    taken = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    text_config = config.get_text_config()
    found: dict[str, Any] = {}
    if "pixel_values" in taken and hasattr(config, "image_size"):
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size, config.image_size)
        found["pixel_values"] = torch.randn(BATCH, getattr(config, "num_channels", 3), *size, generator=generator)
    elif "input_ids" in taken and hasattr(text_config, "vocab_size"):
        found["input_ids"] = torch.randint(0, text_config.vocab_size, (BATCH, LENGTH), generator=generator)
        if "attention_mask" in taken:
            found["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.int64)
        if "decoder_input_ids" in taken and "labels" not in taken:
            found["decoder_input_ids"] = found["input_ids"]
    if not found:
        raise UsageError(f"no inputs are known for {type(model).__name__}", do="pass --inputs")
    if "labels" in taken:
        classes = "Classification" in type(model).__name__ and "Token" not in type(model).__name__
        found["labels"] = torch.zeros(BATCH, dtype=torch.int64) if classes else found.get("input_ids", torch.zeros(BATCH, dtype=torch.int64)).clone()
    return found


def _parsed(inputs: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments from `--inputs`: `[name=]dtype[sizes][:below]`."""
    import torch

    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    for item in inputs:
        found = _INPUT.fullmatch(item)
        dtype = getattr(torch, found[2], None) if found else None
        if found is None or not isinstance(dtype, torch.dtype):
            raise UsageError(f"{item!r} is no input", do="write dtype[sizes], name=dtype[sizes], or name=int64[sizes]:below")
        shape = tuple(int(size) for size in found[3].split(",") if size.strip())
        if dtype.is_floating_point:
            value = torch.randn(shape, generator=generator).to(dtype)
        elif found[4] is not None:
            value = torch.randint(0, int(found[4]), shape, generator=generator, dtype=dtype)
        else:
            value = torch.ones(shape, dtype=dtype)
        if found[1]:
            kwargs[found[1]] = value
        else:
            args.append(value)
    return tuple(args), kwargs
