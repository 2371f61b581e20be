"""A checkpoint on disk: a folder that is whole or not there, with a manifest that knows every byte of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fxopt.errors import DataError
from fxopt.runtime.files import read_json

MANIFEST = "manifest.json"
VERSION = 1
_TEMPORARY, _OLD = ".new-", ".old-"
_JSON_LIMIT = 1 << 30
_CHUNK = 1 << 22
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16",
          torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint16: "U16",
          torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64"}


class _Hashed:
    """A file that is hashed while it is written, and synced when it is closed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o755, exist_ok=True)
        self.stream = path.open("xb")
        self.sha, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> None:
        self.stream.write(data)
        self.sha.update(data)
        self.size += len(data)

    def close(self) -> dict[str, Any]:
        self.stream.flush()
        os.fchmod(self.stream.fileno(), 0o644)
        os.fsync(self.stream.fileno())
        self.stream.close()
        return {"sha256": self.sha.hexdigest(), "bytes": self.size}


class Writer:
    """Writes the files of one checkpoint, and remembers what they hold.

    Args:
        folder: of the files; a temporary one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[_Hashed]:
        file = _Hashed(self.folder / name)
        try:
            yield file
            self.files[name] = file.close()
        finally:
            file.stream.close()

    def json(self, name: str, value: Any) -> None:
        """A JSON file, strict and of one form: keys in their order."""
        with self._open(name) as file:
            file.write(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1).encode())

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """A safetensors file (https://github.com/huggingface/safetensors, the format's description), written tensor by tensor: no copy
        of all of them is made.

        Raises:
            DataError: a dtype that the format does not have.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for key, tensor in tensors.items():
            if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
                raise DataError(f"A tensor of {tensor.dtype}, {tensor.layout}, cannot be saved.", where=f"{name}: {key}")
            end = start + tensor.numel() * tensor.element_size()
            header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            start = end
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        with self._open(name) as file:
            file.write(struct.pack("<Q", len(head)) + head)
            for tensor in tensors.values():
                if tensor.numel():
                    data = memoryview(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
                    for place in range(0, len(data), _CHUNK):
                        file.write(data[place : place + _CHUNK])

    def adopt(self, name: str) -> None:
        """A file that somebody else put into the folder."""
        path = self.folder / name
        os.chmod(path, 0o644)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        self.files[name] = _measured(path)


def write(path: Path, fill: Callable[[Writer], None], facts: Mapping[str, Any], last_good: Path | None) -> None:
    """Makes the folder `path` so that it is whole or not there, whatever happens meanwhile.

    Files are written into a folder of another name and synced; the manifest last; then the folder takes its name in one step.

    Args:
        fill: writes the files. facts: for the manifest, plain JSON. last_good: the checkpoint to name if this one fails.

    Raises:
        DataError: the system refuses. Nothing of the new checkpoint is left, older ones are untouched.
    """
    new = temporary(path)
    try:
        _remove(new)
        new.mkdir(mode=0o755)
        os.chmod(new, 0o755)
        writer = Writer(new)
        fill(writer)
        with (new / MANIFEST).open("xb") as stream:
            stream.write(_signed({"format": VERSION, **facts, "files": dict(sorted(writer.files.items()))}))
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)
            os.fsync(stream.fileno())
        for folder in {new, *(file.parent for file in map(new.joinpath, writer.files))}:
            os.chmod(folder, 0o755)
            _sync(folder)
        if path.exists():
            discard(path)
        os.rename(new, path)
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            _remove(new)
        raise unwritten(path, error, last_good) from error


def temporary(path: Path) -> Path:
    """Where a checkpoint lies while it is written."""
    return path.with_name(f"{_TEMPORARY}{path.name}")


def unwritten(path: Path, error: OSError, last_good: Path | None) -> DataError:
    """What is to be said when the system refuses."""
    free = _free(path.parent)
    return DataError(f"The checkpoint could not be written: {error.strerror or error}{f' ({free:,} bytes are free)' if free is not None else ''}.", where=str(path),
                     do=f"Free space, or choose another folder. {f'The last good checkpoint is {last_good}, unchanged.' if last_good else 'There is no checkpoint before it.'}")


def discard(path: Path) -> None:
    """Removes a checkpoint: it loses its name first, so that no half of it is ever taken for one."""
    old = path.with_name(f"{_OLD}{path.name}")
    _remove(old)
    os.rename(path, old)
    _remove(old)


def sweep(folder: Path) -> None:
    """Removes what a killed process left behind."""
    for path in folder.glob(".*"):
        if path.name.startswith((_TEMPORARY, _OLD)):
            _remove(path)


def manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, checked against its own sum.

    Raises:
        DataError: it is missing, damaged, or of a later format.
    """
    file = path / MANIFEST
    found = read_json(file)
    if file.read_bytes() != _signed(found):
        raise DataError("The manifest is damaged.", where=str(file))
    if found.get("format") != VERSION:
        raise DataError(f"The checkpoint has format {found.get('format')}, this fxopt reads {VERSION}.", where=str(path), do="Use the release that wrote it.")
    return found


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every byte is as it was written.

    Raises:
        DataError: what is missing, too much or damaged.
    """
    found = manifest(path)
    present = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()} - {MANIFEST}
    if odd := sorted(present ^ set(found["files"])):
        raise DataError(f"{odd[0]} is {'missing' if odd[0] not in present else 'not in the manifest'}.", where=str(path))
    for name, wanted in found["files"].items():
        if (path / name).is_symlink() or _measured(path / name) != wanted:
            raise DataError(f"{name} is damaged: its sha256 is not the manifest's.", where=str(path))
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file.

    Raises:
        DataError: it is not one.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"The tensors cannot be read: {error}.", where=str(path)) from error


def read_state(path: Path) -> Any:
    """A JSON file of a checkpoint."""
    return read_json(path, limit=_JSON_LIMIT)


def _signed(value: Mapping[str, Any]) -> bytes:
    """The manifest's one form, with the sum of everything else at its end."""
    plain = {key: item for key, item in value.items() if key != "sha256"}
    body = json.dumps(plain, ensure_ascii=False, indent=1).encode()
    return json.dumps({**plain, "sha256": hashlib.sha256(body).hexdigest()}, ensure_ascii=False, indent=1).encode()


def _measured(path: Path) -> dict[str, Any]:
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while data := stream.read(_CHUNK):
            sha.update(data)
            size += len(data)
    return {"sha256": sha.hexdigest(), "bytes": size}


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
