"""A GGUF file as the weights of a live model: linear weights stay the file's raw blocks, everything else becomes dense."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn

from fxopt.errors import DataError
from fxopt.ir.facts import Stored
from fxopt.kernels.formats import named
from fxopt.runtime import adapted
from fxopt.runtime.gguf import File, hf_name, state_of
from fxopt.runtime.install import store_weight

_SHOWN = 4
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # a file without a head of its own means the embedding


@dataclass
class _Place:
    """Every place in the model that holds one parameter (several where weights are tied)."""

    parameter: nn.Parameter
    names: list[str]
    owners: list[tuple[nn.Module, str]]

    @property
    def linear(self) -> bool:
        return len(self.owners) == 1 and isinstance(self.owners[0][0], nn.Linear) and self.owners[0][1] == "weight"


def load_gguf(model: nn.Module, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a model the weights of a GGUF file. Quantized linear weights stay quantized: the base of a QLoRA run, or of inference.

    The weight of an `nn.Linear` that the file stores in blocks (Q4_0, Q4_1, Q8_0, Q4_K, Q6_K) becomes the file's own bytes, mapped,
    not copied (q and k of some architectures are copied: their rows are put into the order of Hugging Face), frozen, and
    dequantized where it is used. Norms, biases and embeddings become dense parameters; so do tied heads, which stay tied. At no
    time is there more than one dense copy of one such weight.

    Args:
        model: built from the file's configuration, best on the meta device (`with torch.device("meta"): ...`). All of its parameters
            are replaced, and buffers on the meta device computed.
        dtype: of dense parameters, and what stored weights stand for; None: that of the model's parameters.

    Returns:
        model. It must not be optimized or adapted yet.

    Raises:
        DataError: the file is damaged or of an unknown architecture; its tensors are not exactly the model's parameters in name and
            shape (nothing is changed then); a buffer on the meta device cannot be computed.
    """
    if adapted.installed(model) is not None:
        raise DataError("the model has adapted or stored weights already", where=type(model).__name__, do="load the file into a new model")
    file = File(path)
    where = str(file.path)
    places = _places(model)
    of = _match(file, places, where)
    _check_tied(file, of, where)
    left = set(map(id, places.values()))
    for name, format, parts, shape in state_of(file):
        for place in of[name]:
            if id(place) in left:  # a second name of a tied weight
                left.discard(id(place))
                _put(model, place, format, parts, shape, dtype)
    _compute_buffers(model)
    return model


def _places(model: nn.Module) -> dict[str, _Place]:
    """Every parameter's place by each of its names."""
    found: dict[int, _Place] = {}
    places: dict[str, _Place] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                place = found.setdefault(id(parameter), _Place(parameter, [], []))
                place.names.append(f"{path}.{leaf}".lstrip("."))
                place.owners.append((module, leaf))
                places[place.names[-1]] = place
    return places


def _match(file: File, places: Mapping[str, _Place], where: str) -> dict[str, list[_Place]]:
    """For each of the file's parameters, the places that it fills: one, or two if it is the embedding and the head.

    Raises:
        DataError: a parameter without a tensor, a tensor without a parameter, or another shape.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise DataError(f"general.architecture is {architecture!r}, not a name", where=where, do="give the file of a model")
    entries = {name: entry for entry in file.tensors.values() if (name := hf_name(entry.name, architecture)) is not None}
    of = {name: [places[name]] for name in entries if name in places}
    if _HEAD not in entries and _HEAD in places and _EMBEDDING in of and places[_HEAD] is not places[_EMBEDDING]:
        of[_EMBEDDING].append(places[_HEAD])
    filled = {id(place) for found in of.values() for place in found}
    extra, missing = [n for n in entries if n not in places], [n for n, place in places.items() if id(place) not in filled]
    if extra or missing:
        raise DataError(f"the file's tensors are not the model's parameters: {len(extra)} of {len(entries)} are not in the model ({_some(extra)}), "
                        f"{len(missing)} of the model's are not in the file ({_some(missing)})", where=where,
                        do="build the model, with its head, from the file's own configuration")
    for name, found in of.items():
        for place in found:
            if tuple(place.parameter.shape) != entries[name].shape:
                raise DataError(f"{place.names[0]} is {tuple(place.parameter.shape)} in the model, {entries[name].shape} in the file", where=where,
                                do="build the model from the file's own configuration")
    return of


def _check_tied(file: File, of: Mapping[str, list[_Place]], where: str) -> None:
    """Raise where the model ties two weights that the file holds both, unless they are equal."""
    first: dict[int, str] = {}
    for name, found in of.items():
        for place in found:
            other = first.setdefault(id(place), name)
            if other != name and not _equal(file, other, name):
                raise DataError(f"the model ties {name} to {other}, and the file has two different tensors for them", where=where,
                                do="build the model with tie_word_embeddings=False")


def _equal(file: File, *names: str) -> bool:
    architecture = file.metadata["general.architecture"]
    (one, a, _), (two, b, _) = (file.tensor(next(t for t in file.tensors if hf_name(t, architecture) == name)) for name in names)
    return one == two and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _put(model: nn.Module, place: _Place, format: str, parts: tuple[torch.Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    old = place.parameter
    device = torch.device("cpu") if old.device.type == "meta" else old.device
    dtype = dtype or old.dtype
    if place.linear and format != "dense":
        store_weight(model, Stored(place.names[0], named(format).parts[0].name, format, shape, dtype), [part.to(device) for part in parts])
        return
    value = named(format).dequantize(parts, shape, dtype).to(device)
    if format == "dense" and value.dtype == parts[0].dtype and device.type == "cpu":
        value = value.clone()  # not the mapped file itself
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for module, leaf in place.owners:
        module._parameters[leaf] = new


def _compute_buffers(model: nn.Module) -> None:
    """Give buffers on the meta device their values: what the model's own `_init_weights` (of transformers) computes.

    Raises:
        DataError: it has none, or that leaves a buffer as it was.
    """
    found = [(f"{path}.{name}".lstrip("."), module, name) for path, module in model.named_modules()
             for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
    for _, module, name in found:
        meta = module._buffers[name]
        module._buffers[name] = torch.full(meta.shape, _unset(meta.dtype), dtype=meta.dtype)
    init = getattr(model, "_init_weights", None)
    if callable(init):
        with torch.no_grad():
            for module in {id(module): module for _, module, _ in found}.values():
                init(module)
    left = [path for path, module, name in found if torch.equal(kept := module._buffers[name], torch.full_like(kept, _unset(kept.dtype)))
            or kept.is_floating_point() and kept.isnan().any()]
    if left:
        raise DataError(f"{len(left)} buffers are on the meta device, and nothing says how to compute them: {_some(left)}", where=type(model).__name__,
                        do="build the model on the CPU, or give it these buffers on the CPU first")


def _unset(dtype: torch.dtype) -> float | int | bool:
    """A value that no buffer is computed to be."""
    return torch.nan if dtype.is_floating_point else False if dtype == torch.bool else torch.iinfo(dtype).min


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") or "none"
