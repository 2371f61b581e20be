"""GGUF files: metadata and tensors, read where they lie, and their names in a Hugging Face model.

The file is mapped, not copied: a quantized tensor is its raw blocks (uint8) in the formats of `fxopt.kernels.formats`, a dense one
a view of the file. Nothing in a file is trusted: every count, offset and size is checked against the file before it is used, and
what does not fit is a DataError. (A file that is cut short while it is mapped is beyond any check.)

The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import DataError
from fxopt.kernels.formats import named
from fxopt.kernels.formats.gguf import LAYOUTS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_DIMENSIONS = 4
DEEPEST_ARRAY = 4
# Names of tensor types by number, for messages; only those below can be read.
KINDS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_DENSE = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_BLOCKS = {layout.number: layout for layout in LAYOUTS}
# Metadata types by number: what struct and NumPy call them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: in the file. kind: the number of its type. shape: of the dense tensor, rows first (the file counts columns first).
        start: its first byte in the file. size: in bytes; None where the type is not one of ours.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    size: int | None

    @property
    def format(self) -> str | None:
        """The name of its weight format, "dense" included; None: it cannot be read."""
        return "dense" if self.kind in _DENSE else _BLOCKS[self.kind].name if self.kind in _BLOCKS else None


class File:
    """An open GGUF file.

    Attributes:
        path: of the file. version: of the layout.
        metadata: key to number, bool, string, list of strings (or of lists), or NumPy array of numbers.
        tensors: name to entry, in the order of the file.

    Raises:
        DataError: it cannot be opened, or is not a sound GGUF file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            # Private: what a caller writes into a tensor stays in memory.
            self._bytes = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise DataError(f"the file cannot be mapped: {error}", where=str(self.path), do="check the path and its permissions") from error
        header = _Header(self._bytes.numpy(), self.path)
        self.version, self.metadata, self.tensors = header.read()

    def tensor(self, name: str) -> tuple[str, tuple[Tensor, ...], tuple[int, ...]]:
        """(format name, parts, shape) of a tensor; the parts are views of the file.

        Raises:
            DataError: there is no such tensor, or its type is not one that fxopt reads.
        """
        entry = self.tensors.get(name)
        if entry is None:
            raise DataError(f"there is no tensor {name!r}", where=str(self.path), do=f"it has {len(self.tensors)}: " + ", ".join(list(self.tensors)[:4]))
        if entry.format is None or entry.size is None:
            kind, ours = KINDS.get(entry.kind, f"type {entry.kind}"), ", ".join(KINDS[number] for number in (*_DENSE, *_BLOCKS))
            raise DataError(f"{name} is stored as {kind}, which is not read", where=str(self.path), do=f"quantize the model to one of {ours}")
        raw = self._bytes[entry.start : entry.start + entry.size]
        if entry.kind in _DENSE:
            return "dense", (raw.view(_DENSE[entry.kind]).view(entry.shape),), entry.shape
        return entry.format, (raw.view(named(entry.format).parts[0].shape(entry.shape)),), entry.shape


class _Header:
    """The part of a file before the tensors' data, read front to back."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def fail(self, what: str, do: str = "the file is damaged: fetch or convert it again") -> NoReturn:
        raise DataError(what, where=f"{self.path}, byte {self.at}", do=do)

    def bytes(self, count: int, what: str) -> np.ndarray:
        """The next bytes, as a view."""
        if count > len(self.data) - self.at:
            self.fail(f"the file ends inside {what}: {count} bytes wanted, {len(self.data) - self.at} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code), what))[0]

    def count(self, least: int, what: str) -> int:
        """A count of things that take at least so many bytes each."""
        count = self.number("Q", f"the number of {what}")
        if count * least > len(self.data) - self.at:
            self.fail(f"{count} {what} do not fit into the {len(self.data) - self.at} bytes left")
        return count

    def text(self, what: str) -> str:
        raw = self.bytes(self.count(1, f"bytes of {what}"), what).tobytes()
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason}")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            self.fail(f"{what} has a value of the unknown type {kind}")
        if depth == DEEPEST_ARRAY:
            self.fail(f"{what} is an array in an array, more than {DEEPEST_ARRAY} deep")
        inner = self.number("I", what)
        if inner in _NUMBERS:
            dtype = np.dtype("<" + _NUMBERS[inner])
            raw = self.bytes(self.count(dtype.itemsize, f"elements of {what}") * dtype.itemsize, what)
            return raw.view(dtype) if raw.size else np.empty(0, dtype)
        # Any other element takes 8 bytes at least (a length), an array 12.
        return [self.value(inner, what, depth + 1) for _ in range(self.count(12 if inner == _ARRAY else 8, f"elements of {what}"))]

    def read(self) -> tuple[int, dict[str, Any], dict[str, Entry]]:
        if self.bytes(4, "the header").tobytes() != MAGIC:
            self.fail("this is not a GGUF file", "give the path of a .gguf file")
        version = self.number("I", "the header")
        if version not in VERSIONS:
            found = f"version {version}" if version & 0xFFFF else "a file of big-endian numbers"
            self.fail(f"GGUF {found} is not read", "convert the model again with a present llama.cpp")
        tensors, pairs = self.count(24, "tensors"), self.count(13, "metadata keys")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.text("a metadata key")
            if key in metadata:
                self.fail(f"the metadata key {key!r} is there twice")
            metadata[key] = self.value(self.number("I", key), key)
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r}, not a power of two of at least 8")
        infos = [self.info() for _ in range(tensors)]
        start = -(-self.at // alignment) * alignment
        return version, metadata, self.entries(infos, start, alignment)

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, offset) of a tensor, as the file says."""
        name = self.text("a tensor's name")
        dimensions = self.number("I", name)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            self.fail(f"{name!r} has {dimensions} dimensions, not 1 to {MOST_DIMENSIONS}")
        sizes = struct.unpack(f"<{dimensions}Q", self.bytes(8 * dimensions, name))
        return name, tuple(reversed(sizes)), self.number("I", name), self.number("Q", name)

    def entries(self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for name, shape, kind, offset in infos:
            if name in entries:
                self.fail(f"the tensor {name!r} is there twice")
            size = self.size(name, shape, kind)
            if offset % alignment:
                self.fail(f"{name!r} starts at {offset}, not a multiple of {alignment}")
            if start + offset + (size or 0) > max(start, len(self.data)):
                self.fail(f"{name!r} (bytes {start + offset} to {start + offset + (size or 0)}) lies outside the file of {len(self.data)} bytes")
            entries[name] = Entry(name, kind, shape, start + offset, size)
        before = None
        for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.size or 0)):
            if before is not None and entry.start < before.start + (before.size or 0):
                self.fail(f"{before.name!r} and {entry.name!r} overlap")
            before = entry
        return entries

    def size(self, name: str, shape: tuple[int, ...], kind: int) -> int | None:
        """Bytes of a tensor; None for a type that is not ours."""
        count = math.prod(shape)
        if count >= 1 << 63:
            self.fail(f"{name!r} has the impossible shape {shape}")
        if kind in _DENSE:
            return count * _DENSE[kind].itemsize
        if kind not in _BLOCKS:
            return None
        layout = _BLOCKS[kind]
        why = named(layout.name).fits(shape)
        if why is not None:
            self.fail(f"{name!r} is stored as {KINDS[kind]}, but its {why}")
        return count // layout.weights * layout.bytes


# -- names ------------------------------------------------------------------------------------------------------------

# Models that are decoders of attention and a gated MLP, and whether the file holds the rows of q and k in pairs.
ARCHITECTURES = {"llama": True, "granite": True, "smollm3": True, "qwen2": False, "qwen3": False, "phi3": False}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_FUSED = {"ffn_up": "mlp.gate_up_proj"}  # where there is no ffn_gate of its own
# Tables that follow from the configuration.
_DERIVED = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd")


def hf_name(name: str, architecture: str) -> str | None:
    """The parameter of a Hugging Face model that a tensor is; None: it is none of its parameters, but follows from its configuration.

    Raises:
        DataError: an architecture or a tensor that is not known.
    """
    if architecture not in ARCHITECTURES:
        raise DataError(f"the names of {architecture!r} models are not known", where=name, do=f"known: {', '.join(ARCHITECTURES)}")
    if _DERIVED.fullmatch(name):
        return None
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found:
        layer, what, kind = found.groups()
        table = _WHOLE if layer is None else _LAYER | (_FUSED if architecture == "phi3" else {})
        if what in table:
            return f"model.layers.{int(layer)}.{table[what]}.{kind}" if layer is not None else f"{table[what]}.{kind}"
    raise DataError(f"{name!r} is no tensor of a {architecture} model", where=name, do="experts and other kinds of layers are not read from GGUF")


def unpaired(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k as Hugging Face orders them: the file has the two halves of each head interleaved. Raw blocks or values."""
    return rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def state_of(file: File) -> Iterator[tuple[str, str, tuple[Tensor, ...], tuple[int, ...]]]:
    """Every parameter as (Hugging Face name, format name, parts, shape), in the order of the file.

    Parts are views of the file, but for q and k where their rows are permuted (exact: blocks lie within rows). A head that is tied
    to the embedding is not there, as in the file.

    Raises:
        DataError: an architecture, a tensor or a type that is not known; two tensors for one parameter; wrong numbers of heads.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise DataError(f"general.architecture is {architecture!r}, not a name", where=str(file.path), do="give the file of a model")
    seen: set[str] = set()
    for name in file.tensors:
        hf = hf_name(name, architecture)
        if hf is None:
            continue
        if hf in seen:
            raise DataError(f"two tensors are {hf}", where=f"{file.path}: {name}", do="the file is damaged: convert it again")
        seen.add(hf)
        format, parts, shape = file.tensor(name)
        kind = re.fullmatch(r"blk\.(\d+)\.attn_([qk])\.\w+", name)
        if kind and ARCHITECTURES[architecture]:
            heads = _heads(file, architecture, int(kind[1]), kind[2])
            if shape[0] % (2 * heads):
                raise DataError(f"{shape[0]} rows are not {heads} heads of pairs", where=f"{file.path}: {name}", do="the file is damaged: convert it again")
            parts = tuple(unpaired(part, heads) for part in parts)
        yield hf, format, parts, shape


def _heads(file: File, architecture: str, layer: int, kind: str) -> int:
    """How many heads q or k of a layer has."""
    key = f"{architecture}.attention.head_count"
    value = file.metadata.get(f"{key}_kv", file.metadata.get(key)) if kind == "k" else file.metadata.get(key)
    if isinstance(value, np.ndarray) and layer < value.size:
        value = value[layer].item()
    if type(value) is not int or value < 1:
        raise DataError(f"{key} is {value!r}, not a number of heads", where=str(file.path), do="the file is damaged: convert it again")
    return value
