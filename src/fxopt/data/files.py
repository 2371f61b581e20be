"""Rows of files, by number: JSON lines and plain text are indexed and read row by row, the rest is read as a whole.

A row is a mapping from column names to plain values; `place` says where it stands, for messages.
"""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fxopt.data.parquet import Parquet
from fxopt.errors import DataError

Row = Mapping[str, Any]
_LARGEST_FIELD = 2**31 - 1  # of a CSV file; Python's own limit of 128 KiB is below the length of real documents


class Rows(Protocol):
    """Rows with numbers from 0."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def place(self, index: int) -> str:
        """Where a row stands: file and line, or the number of the row."""


class Lines:
    """The non-empty lines of a UTF-8 file. Only where they begin is kept (16 bytes a line); a row is read when it is asked for.

    The file is opened for each row, so that processes that load data share no position in it.

    Raises:
        DataError: the file cannot be read; a line is not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._starts, self._numbers = array("q"), array("q")
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                skipped = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0  # a byte order mark
                if line[skipped:].strip():
                    self._starts.append(start + skipped)
                    self._numbers.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        """See `Rows`."""
        return f"{self.name}, line {self._numbers[index]}"

    def line(self, index: int) -> str:
        """A line without its end."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            data = file.readline()
        try:
            return data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"The line is not UTF-8: byte {error.start + 1} is {data[error.start]:#04x}.", where=self.place(index), do="Save the file as UTF-8.") from error


class Text(Lines):
    """A plain text file: each line that is not empty is a row {"text"}."""

    def __getitem__(self, index: int) -> Row:
        return {"text": self.line(index)}


class JsonLines(Lines):
    """A file with one JSON object a line."""

    def __getitem__(self, index: int) -> Row:
        return _object(self.line(index), self.place(index))


class Listed:
    """Rows that are in memory: of a list, of a data set with a length and items (Hugging Face's), of a file without an index.

    Args:
        places: where each row stands; None: rows have numbers alone.
    """

    def __init__(self, rows: Any, name: str, places: Sequence[str] | None = None) -> None:
        self.rows, self.name, self.places = rows, name, places

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = self.rows[index]
        if not isinstance(row, Mapping):
            raise DataError(f"The row is a {type(row).__name__}, not a mapping of columns to values.", where=self.place(index))
        return row

    def place(self, index: int) -> str:
        """See `Rows`."""
        return f"{self.name}, {self.places[index] if self.places is not None else f'row {index + 1}'}"


def open_rows(source: Any) -> Rows:
    """The rows of a file (by its suffix: .jsonl, .json, .csv, .tsv, .parquet, .txt), a list of mappings, or a Hugging Face data set.

    Raises:
        DataError: no such file, an unknown suffix, a file that is not what its suffix says, or no rows in it.
    """
    if isinstance(source, (str, Path)):
        rows = _file(Path(source))
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, Mapping):
        rows = Listed(source, f"the {type(source).__name__}")
    else:
        do = "Choose one of its splits." if isinstance(source, Mapping) else "Give a file, a list of mappings, or a data set with a length."
        raise DataError(f"A {type(source).__name__} has no rows that can be read by number.", where="the data", do=do)
    if not len(rows):
        raise DataError("There are no rows.", where=rows.name)
    return rows


def _file(path: Path) -> Rows:
    readers = {".jsonl": JsonLines, ".ndjson": JsonLines, ".txt": Text, ".text": Text, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": Parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.suffix or 'A file without a suffix'} is no known kind of data.", where=str(path), do=f"Known are {', '.join(readers)}.")
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"The file cannot be read: {error.strerror or error}.", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"The file is not UTF-8: byte {error.start + 1}.", where=str(path), do="Save the file as UTF-8.") from error


def _json(path: Path) -> Rows:
    """A JSON array; a file that begins with an object is read as JSON lines, which often carry this suffix."""
    with path.open("rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"{":
        rows = JsonLines(path)
        try:
            rows[0]
        except DataError as error:
            raise DataError("The file is neither a JSON array nor one JSON object a line.", where=rows.place(0), do="Write the rows as one array: [{…}, {…}].") from error
        return rows
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"The file is no JSON: {error.msg}.", where=f"{path}, line {error.lineno}, column {error.colno}") from error
    if not isinstance(found, list):
        raise DataError(f"The file holds a {type(found).__name__}, not an array of rows.", where=str(path))
    return Listed(found, str(path))


def _csv(path: Path) -> Rows:
    """A table with a header. Fields in quotes may hold line ends."""
    rows, places = [], []
    csv.field_size_limit(_LARGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header) or "" in header:
                raise DataError(f"The columns are named {', '.join(map(repr, header))}: each needs a name of its own.", where=f"{path}, line 1")
            line = reader.line_num + 1
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise DataError(f"The row has {len(fields)} fields, the header {len(header)}.", where=f"{path}, line {line}", do="Put fields with commas or line ends into quotes.")
                if fields:
                    rows.append(dict(zip(header, fields, strict=True)))
                    places.append(f"line {line}")
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"The row is no CSV: {error}.", where=f"{path}, line {reader.line_num}") from error
    return Listed(rows, str(path), places)


def _object(text: str, where: str) -> Row:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "it is nested too deeply"
        raise DataError(f"The line is no JSON: {what}.", where=where) from error
    if not isinstance(found, dict):
        raise DataError(f"The line holds a {type(found).__name__}, not an object.", where=where)
    return found
