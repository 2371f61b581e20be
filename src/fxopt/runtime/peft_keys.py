"""The tensor names of PEFT's files: which tensor is which part of which adapter.

    base_model.model.<module>.lora_A.weight, .lora_B.weight            a linear layer or a convolution
    base_model.model.<module>.lora_embedding_A, .lora_embedding_B      an embedding
    base_model.model.<module>.lora_magnitude_vector                    DoRA's magnitudes
    base_model.model.<module>[.base_layer ...].lora_A.weight           a parameter of the module: of several that are adapted, in the
                                                                       order of their registration, the last has no `.base_layer`
    base_model.model.<module>.base_layer.weight                        an adapted embedding's or head's own weight
    base_model.model.<module>.<name>                                   state of a module that is trained whole
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxopt.errors import DataError
from fxopt.runtime.module_pattern import LENGTH_LIMIT

PREFIX = "base_model.model."
_WRAPPER = ".base_layer"
_PARTS = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
    ".lora_magnitude_vector": ("magnitude", None),
    ".lora_magnitude_vector.weight": ("magnitude", None),  # as some releases wrote it
    ".base_layer.weight": ("base weight", None),
    ".base_layer.bias": ("base bias", None),
}


@dataclass
class Found:
    """The tensors of one adapter in a file, by part: "a", "b", "magnitude", "base weight", "base bias".

    Attributes:
        path: of the module. depth: how often it is wrapped, for adapters of parameters.
    """

    path: str
    depth: int = 0
    embedding: bool = False
    parts: dict[str, Tensor] = field(default_factory=dict)


def sort(tensors: Mapping[str, Tensor], where: str) -> tuple[list[Found], dict[str, Tensor]]:
    """(adapters by path, other state by name in the base model) of the tensors of a file.

    Raises:
        DataError: a name without the prefix, of no module or too long; an adapter without one of its factors.
    """
    found: dict[tuple[str, int], Found] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if not key.startswith(PREFIX) or len(key) > 2 * LENGTH_LIMIT:
            raise DataError(f"The tensor {key!r:.200} is no part of a LoRA adapter.", where=where)
        suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
        if suffix is None:
            if ".lora_" in name:
                raise DataError(f"The tensor {key!r:.200} is a part of an adapter that is not read.", where=where,
                                do="Adapters of linear layers, embeddings, convolutions and parameters are read, without biases of their own.")
            rest[name] = tensor
            continue
        part, embedding = _PARTS[suffix]
        path, depth = name.removesuffix(suffix), 0
        while path.endswith(_WRAPPER):
            path, depth = path.removesuffix(_WRAPPER), depth + 1
        if not path or len(path) > LENGTH_LIMIT:
            raise DataError(f"The tensor {key!r:.200} belongs to no module.", where=where)
        item = found.setdefault((path, depth), Found(path, depth))
        item.embedding = item.embedding or bool(embedding)
        item.parts[part] = tensor
    for item in found.values():
        missing = {"a", "b"} - item.parts.keys()
        if missing:
            raise DataError(f"The adapter has only {', '.join(sorted(item.parts))}, not both factors.", where=f"{where}: {item.path}")
    return sorted(found.values(), key=lambda item: (item.path, item.depth)), rest


def names(path: str, kind: str, depth: int = 0) -> dict[str, str]:
    """The tensor names of an adapter's parts."""
    letters = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    place = PREFIX + path + depth * _WRAPPER
    return {"a": f"{place}.{letters[0]}", "b": f"{place}.{letters[1]}", "magnitude": f"{place}.lora_magnitude_vector"}


def depths(parameters: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """How often the module is wrapped around each adapted (path, parameter), given in the order of registration."""
    by_path: dict[str, list[str]] = {}
    for path, leaf in parameters:
        by_path.setdefault(path, []).append(leaf)
    return {(path, leaf): len(leaves) - 1 - place for path, leaves in by_path.items() for place, leaf in enumerate(leaves)}


def stacked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's two matrices of a stack's factors a [experts, r, in], b [experts, out, r]: [experts * r, in], [out, r * experts]."""
    return a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)


def unstacked(a: Tensor, b: Tensor, experts: int, where: str) -> tuple[Tensor, Tensor]:
    """The inverse of `stacked`.

    Raises:
        DataError: the matrices are not factors for so many experts.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0] or a.shape[0] % experts:
        raise DataError(f"The factors {list(a.shape)} and {list(b.shape)} are not those of {experts} experts.", where=where)
    rank = a.shape[0] // experts
    return a.reshape(experts, rank, a.shape[1]), b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)


def owned(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU with storage of its own (parameters may be views of one flat buffer)."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def topmost(names: Sequence[str], where: str, modules: Iterable[str] | None) -> list[str]:
    """The modules whose state these names are, without those that lie in another one of them.

    Raises:
        DataError: PEFT, which matches the ends of paths, would take another module too.
    """
    owners = {name.rpartition(".")[0] for name in names}
    found = sorted(path for path in owners if not any(path.startswith(other + ".") for other in owners))
    if "" in found:
        raise DataError("A parameter of the whole model is trained, which PEFT's files cannot hold.", where=where)
    for path in modules or ():
        inside = any(path == other or path.startswith(other + ".") for other in found)
        if not inside and path.endswith(tuple(found)):
            raise DataError(f"PEFT would take {path} for {next(other for other in found if path.endswith(other))}, which is trained whole.", where=where)
    return found
