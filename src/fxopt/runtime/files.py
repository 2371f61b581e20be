"""Files that are whole or absent: writing that survives a crash, reading JSON that is bounded."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from fxopt.errors import DataError

JSON_LIMIT = 8 * 2**20
"""Largest JSON file that is read, in bytes (an adapter configuration with 50,000 full module paths is 4 MiB)."""


def replace_file(path: str | Path, data: bytes) -> None:
    """Puts `data` at `path` so that a reader, or a crash, sees the old file or the new one and never a part.

    The bytes go to `<path>.tmp`, are synced to the disk, and take the name in one step; the folder is synced after
    it. The file mode is 0644. A `.tmp` that a killed process left behind is overwritten by the next call. One
    writer at a time per path.

    Raises:
        DataError: the disk is full, the folder is read-only, or any other refusal by the system. The old file
            is untouched.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"The file could not be written ({len(data):,} bytes): {error.strerror or error}.",
            where=str(path),
            do="Free space or choose a folder that can be written. The file that was there before is unchanged.",
        ) from error


def read_json(path: str | Path, *, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Reads one JSON object, strictly: at most `limit` bytes, no key twice, no NaN or infinity.

    Raises:
        DataError: the file is missing, too large, not UTF-8, not JSON, nested too deeply, or not an object.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise DataError(f"The file could not be read: {error.strerror or error}.", where=str(path)) from error
    if len(raw) > limit:
        raise DataError(f"The file is larger than {limit:,} bytes.", where=str(path), do="Is it the right file?")
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"The file is not strict JSON: {error}.", where=str(path)) from error
    if not isinstance(value, dict):
        raise DataError(f"The file holds a JSON {type(value).__name__}, not an object.", where=str(path))
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value
