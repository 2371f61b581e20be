"""Rows of a Parquet file, through pyarrow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxopt.data import extras
from fxopt.errors import DataError


class Parquet:
    """A Parquet file. Its columns are in memory as Arrow holds them (rows in a random order would read a whole group of rows each); a
    row becomes Python values when it is asked for.

    Raises:
        DataError: pyarrow is not installed; the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        parquet = extras.load("pyarrow.parquet", "A Parquet file")
        with path.open("rb") as file:  # one that is not there is told of as for every other kind
            try:
                self._table = parquet.read_table(file)
            except (OSError, ValueError) as error:  # pyarrow's errors derive from these
                raise DataError(f"The file is no readable Parquet file: {error}", where=self.name) from error

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._table.slice(index, 1).to_pylist()[0]

    def place(self, index: int) -> str:
        """See `fxopt.data.files.Rows`."""
        return f"{self.name}, row {index + 1}"
