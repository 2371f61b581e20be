"""Models and inputs that a command line names."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxopt.errors import DataError, FxoptError

BATCH, LENGTH = 2, 16
_INPUT = re.compile(r"(?:(\w+)=)?(\w+)\[([\d, ]*)\](?::(\d+))?")
MODEL = "package.module:factory (returns a model, or a model and its inputs), or a local Hugging Face folder"
INPUTS = "for example 'float32[2,8]', 'input_ids=int64[2,16]:1000' (random below 1000)"


class UsageError(FxoptError):
    """The command line asks for something that does not exist."""


def model_and_inputs(name: str, inputs: Sequence[str] | None) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
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
    if ":" not in name:
        raise UsageError(f"{name!r} names no model", do="write package.module:factory, or a folder that holds a config.json")
    factory = named(name)
    if not callable(factory):
        raise UsageError(f"{name} is a {type(factory).__name__}", do="name a function that gives the model")
    try:
        made = factory()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(f"{name} raises {type(error).__name__}: {error}", where=f"{last.filename}:{last.lineno}: {last.line}", do="call it by itself and look") from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not hasattr(model, "named_parameters"):
        given = f"a tuple of {len(made)}" if isinstance(made, tuple) and len(made) != 2 else f"{type(model).__name__} as the model"
        raise UsageError(f"{name} gives {given}", do="return an nn.Module, or (model, inputs)")
    return model, example


def named(name: str) -> Any:
    """What `package.module:attribute` names."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(f"{name!r} names nothing", do="write package.module:name")
    sys.path.insert(0, os.getcwd())  # a console script does not look there by itself
    try:
        factory = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"there is no module {error.name!r}", where=name, do="run the command where Python can import it") from error
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise UsageError(f"{module} has no {attribute!r}", where=name)
        factory = getattr(factory, part)
    return factory


def _from_folder(folder: Path, example: bool) -> tuple[Any, dict[str, Any] | None]:
    """A model from a Hugging Face folder: with its weights if there are any, else with random ones."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"transformers cannot read the config: {str(error).splitlines()[0]}", where=str(folder / "config.json")) from error
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
