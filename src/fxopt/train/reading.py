"""Checkpoints of other trainers: what can be taken over from a Lightning `.ckpt` and a Hugging Face `checkpoint-N`. Reading runs no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import DataError
from fxopt.runtime.files import read_json
from fxopt.train.folder import read_tensors


@dataclass
class Taken:
    """What was read; `print` it.

    Attributes:
        weights: by name. optimizers: their state dicts. step, epoch: where the run stood; None if it does not say. taken, left: what was
            taken over and what was not, with the reason.
    """

    weights: dict[str, Tensor]
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    step: int | None = None
    epoch: int | None = None
    taken: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([*(f"taken: {line}" for line in self.taken), *(f"left:  {line}" for line in self.left)])

    def into(self, model: nn.Module, prefix: str = "") -> Taken:
        """Load the weights into a model.

        Args:
            prefix: what their names begin with and the model's do not, such as `model.`.

        Raises:
            DataError: names or shapes do not fit.
        """
        state = {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}
        try:
            result = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise DataError(f"The weights do not fit: {str(error).splitlines()[-1].strip()}", where=type(model).__name__, do="Build the model that the checkpoint was written from.") from error
        tied = {id(parameter): name for name, parameter in model.named_parameters()}
        missing = [name for name in result.missing_keys if name in tied.values()]
        if missing or result.unexpected_keys or not state:
            odd = missing[:3] or list(result.unexpected_keys)[:3] or list(self.weights)[:3]
            raise DataError(f"The checkpoint {'lacks' if missing else 'has other names:'} {', '.join(odd)}.", where=type(model).__name__, do="Give the `prefix` of its names, or build the model it was written from.")
        return self


def read_lightning(path: str | Path) -> Taken:
    """A Lightning `.ckpt`: weights, optimizer states, step and epoch. Loops, callbacks and hyperparameters are Lightning's own.

    Raises:
        DataError: it is not one, or holds objects that only running code could make.
    """
    found = _loaded(Path(path))
    if not isinstance(found, Mapping) or "state_dict" not in found:
        raise DataError("The file is no Lightning checkpoint: it has no `state_dict`.", where=str(path))
    weights = {name: value for name, value in found["state_dict"].items() if isinstance(value, Tensor)}
    taken = Taken(weights, list(found.get("optimizer_states", ())), found.get("global_step"), found.get("epoch"))
    taken.taken = [f"{len(weights)} tensors of state_dict", *([f"{len(taken.optimizers)} optimizer states"] if taken.optimizers else []),
                   *([f"step {taken.step}, epoch {taken.epoch}"] if taken.step is not None else [])]
    reasons = {"lr_schedulers": "schedules are functions of the step here", "loops": "the position in the data is Lightning's own", "callbacks": "their state is Lightning's own",
               "hyper_parameters": "build the model with them yourself"}
    taken.left = [f"{name}: {reasons.get(name, 'unknown to fxopt')}" for name in found if name not in ("state_dict", "optimizer_states", "global_step", "epoch", "pytorch-lightning_version") and found[name]]
    taken.left.append("random states: the file has none, so a resumed run is not the interrupted one")
    return taken


def read_huggingface(folder: str | Path) -> Taken:
    """A `checkpoint-N` folder of the Hugging Face Trainer: weights (also of an adapter), optimizer state, step and epoch.

    Raises:
        DataError: it is not one, or holds objects that only running code could make.
    """
    folder = Path(folder)
    state = read_json(folder / "trainer_state.json", limit=1 << 28)
    weights, sources = _weights(folder)
    taken = Taken(weights, [], int(state.get("global_step", 0)), int(state.get("epoch") or 0))
    taken.taken = [f"{len(weights)} tensors of {', '.join(sources)}", f"step {taken.step}, epoch {taken.epoch} of trainer_state.json"]
    if (folder / "optimizer.pt").exists():
        taken.optimizers = [_loaded(folder / "optimizer.pt")]
        taken.taken.append("the optimizer state of optimizer.pt")
    reasons = {"scheduler.pt": "schedules are functions of the step here", "training_args.bin": "a pickle of arguments: never read", "scaler.pt": "a loss scaler begins anew"}
    for file in sorted(folder.iterdir()):
        if file.name in reasons or file.name.startswith("rng_state"):
            taken.left.append(f"{file.name}: {reasons.get(file.name, 'random states of another loop and data order')}")
    return taken


def _weights(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).exists():
            return read_tensors(folder / name), [name]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index, limit=1 << 28).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise DataError("The index names files outside of the folder.", where=str(index))
        return {key: value for name in names for key, value in read_tensors(folder / name).items()}, names
    if (folder / "pytorch_model.bin").exists():
        return dict(_loaded(folder / "pytorch_model.bin")), ["pytorch_model.bin"]
    raise DataError("There are no weights in the folder.", where=str(folder), do="model.safetensors, adapter_model.safetensors or pytorch_model.bin are read.")


def _loaded(path: Path) -> Any:
    """A file of torch's, with tensors and plain values alone."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is damaged or would run code
        raise DataError(f"The file cannot be read without running code, or is damaged: {str(error).splitlines()[0]}", where=str(path),
                        do="Save its weights as safetensors with the program that wrote it.") from error
