"""What a weight format is: the tensors that it stores, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.errors import CheckError, DataError

Shape = Sequence[int]
# In a file, an entry whose suffix starts so belongs to the module that owns the weight.
SIBLING = "../"
_DAMAGED = "the file is damaged, or the weight has another shape: save it again"


@dataclass(frozen=True)
class Part:
    """One tensor of a stored weight.

    Args:
        name: what it is called in graphs and error messages.
        dtype: of the stored tensor; None: any floating point dtype.
        shape: the tensor's shape, from that of the dense weight.
    """

    name: str
    dtype: torch.dtype | None
    shape: Callable[[Shape], tuple[int, ...]]


@dataclass(frozen=True)
class Format:
    """How a weight of `shape` is stored as one tensor per part, and what it is worth then.

    Args:
        name: its name in graphs and pipelines.
        parts: the stored tensors, in the order of `base` everywhere.
        quantize: dense weight to parts; None: only read from files.
        reference: (base, shape, dtype) to the dense weight, in plain PyTorch: the oracle. It takes any floating point dtype
            of the parts and computes in fp64 if dtype is.
        dequantize: same arguments; the ATen body that runs. It returns no tensor that shares memory with a part (except
            "dense", "bf16" and "fp16" in their own dtype: the weight itself).
        bits: bits per weight, scales included (what does not grow with the weight is left out; "dense": as fp32).
        error: relative error (Frobenius norm) of the stored values of a Gaussian weight, measured on [2048, 2048]; NaN where
            nothing here quantizes to it.
        fits: why a shape cannot be stored so, or None.
        save: (base, shape, dtype) to the entries of a safetensors file, by suffix of the weight's key ("" is the key itself,
            "../SCB" an entry SCB of the module that owns the weight). dtype: of the weight before it was quantized.
        load: entries by suffix and shape, back to the parts; DataError where they do not fit.
        suffixes: of the entries that `load` looks at.
        claims: whether entries of a file are this format's, by their names and dtypes alone; None: a file does not say so.
    """

    name: str
    parts: tuple[Part, ...]
    quantize: Callable[[Tensor], tuple[Tensor, ...]] | None
    reference: Callable[[Sequence[Tensor], Shape, torch.dtype], Tensor]
    dequantize: Callable[[Sequence[Tensor], Shape, torch.dtype], Tensor]
    bits: Callable[[Shape], float]
    error: float
    fits: Callable[[Shape], str | None]
    save: Callable[[Sequence[Tensor], Shape, torch.dtype], dict[str, Tensor]]
    load: Callable[[Mapping[str, Tensor], Shape], tuple[Tensor, ...]]
    suffixes: tuple[str, ...] = ("",)
    claims: Callable[[Mapping[str, Tensor]], bool] | None = None

    def check(self, base: Sequence[Tensor], shape: Shape) -> None:
        """Raise unless base holds this format's parts for a weight of this shape.

        Raises:
            CheckError: another number of tensors, a wrong dtype. RuntimeError: a wrong size (a guard, where sizes are symbols).
        """
        if len(base) != len(self.parts):
            names = ", ".join(part.name for part in self.parts)
            raise CheckError(f"{self.name} stores {len(self.parts)} tensors ({names}), not {len(base)}")
        for part, tensor in zip(self.parts, base, strict=True):
            if tensor.dtype != part.dtype and not (part.dtype is None and tensor.is_floating_point()):
                raise CheckError(f"{part.name} of a {self.name} weight is {tensor.dtype}, not {part.dtype or 'floating point'}")
            wanted = part.shape(shape)
            torch._check(
                tensor.dim() == len(wanted) and all(a == b for a, b in zip(tensor.shape, wanted, strict=True)),
                lambda part=part, tensor=tensor, wanted=wanted: (
                    f"{part.name} of a {self.name} weight of shape {tuple(shape)} is {tuple(tensor.shape)}, not {tuple(wanted)}"
                ),
            )

    def entries(self, key: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's entries for the weight `key`, by suffix."""
        return {suffix: entries[name] for suffix in self.suffixes if (name := entry(key, suffix)) in entries}

    def write(self, key: str, base: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
        """The entries of a safetensors file for the weight that a dense file holds under `key`."""
        return {entry(key, suffix): tensor for suffix, tensor in self.save(base, shape, dtype).items()}

    def read(self, key: str, entries: Mapping[str, Tensor], shape: Shape) -> tuple[Tensor, ...]:
        """The parts of the weight `key`, from a file's entries.

        Raises:
            DataError: an entry is missing or is not what the format stores for a weight of this shape.
        """
        try:
            parts = self.load(self.entries(key, entries), shape)
            self.check(parts, shape)
        except DataError as error:
            raise DataError(error.what, where=key, do=error.do or _DAMAGED) from error
        except (CheckError, RuntimeError) as error:
            what = error.what if isinstance(error, CheckError) else str(error)
            raise DataError(what, where=key, do=_DAMAGED) from error
        return parts


def entry(key: str, suffix: str) -> str:
    """The key of a file's entry for the weight `key`.

    A sibling of "layer.weight" is "layer.NAME"; of a weight with another name (a module may own several) "layer.other.NAME".
    """
    if suffix.startswith(SIBLING):
        return f"{key.removesuffix('weight').removesuffix('.')}.{suffix.removeprefix(SIBLING)}".removeprefix(".")
    return key + suffix


def take(entries: Mapping[str, Tensor], suffix: str, dtype: torch.dtype, shape: Shape | None = None) -> Tensor:
    """An entry of this dtype and shape.

    Raises:
        DataError: it is missing, or is another.
    """
    tensor = entries.get(suffix)
    if tensor is None:
        raise DataError(f"the entry {suffix or 'of the weight itself'} is missing", do="the file is incomplete, or in another format")
    if tensor.dtype != dtype or (shape is not None and tuple(tensor.shape) != tuple(shape)):
        wanted = f"{dtype}" if shape is None else f"{dtype} {tuple(shape)}"
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise DataError(f"the entry {suffix or 'of the weight itself'} is {found}, not {wanted}", do=_DAMAGED)
    return tensor


def count(shape: Shape) -> int:
    """Number of elements."""
    return math.prod(shape)


def anything(shape: Shape) -> None:
    """`fits` of a format that stores every shape."""
    return None
