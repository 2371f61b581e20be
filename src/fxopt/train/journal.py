"""Where the numbers of a run are written: JSON lines and CSV always, others behind one small protocol."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fxopt.errors import DataError
from fxopt.runtime.memory import peak_bytes
from fxopt.train.callbacks import State

METRICS, TABLE, TIMES = "metrics.jsonl", "metrics.csv", "times.jsonl"


class Logger(Protocol):
    """Somebody who wants the numbers of a run."""

    def log_metrics(self, row: Mapping[str, float], step: int) -> None:
        """A row: of a step or of an evaluation; `step` steps are finished."""

    def log_hparams(self, values: Mapping[str, Any]) -> None:
        """The run's settings, once, before anything else."""

    def log_artifact(self, path: Path) -> None:
        """A file or folder that the run made."""

    def finish(self) -> None:
        """The run is over, one way or the other."""


class _Lines:
    """A text file that grows by lines and can be cut back to where a checkpoint saw it."""

    def __init__(self, path: Path, first: str = "") -> None:
        self.path, self.first = path, first
        self.stream: Any = None

    def open(self, size: int | None) -> None:
        """Begin at a size in bytes: what is behind it was written after the checkpoint. None: begin anew.

        Raises:
            DataError: the file is shorter.
        """
        held = self.path.stat().st_size if self.path.exists() else 0
        if size is not None and held < size:
            raise DataError(f"The log has {held:,} bytes; the checkpoint was written when it had {size:,}.", where=str(self.path), do="Put the file back, or resume in another folder.")
        self.stream = self.path.open("r+b" if self.path.exists() else "w+b")
        self.stream.truncate(size or 0)
        self.stream.seek(size or 0)
        if not size and self.first:
            self.write(self.first)

    def write(self, text: str) -> None:
        self.stream.write(text.encode())

    def size(self) -> int:
        """Bytes so far, all of them on disk."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        return self.stream.tell()

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()


class Journal:
    """Gives every row to the run's loggers; with a folder, to its files first.

    `metrics.jsonl` and `metrics.csv` (a line for each value) hold what a resumed run repeats byte by byte; what the clock says is in
    `times.jsonl`.

    Args:
        folder: None: no files. loggers: others.
    """

    def __init__(self, folder: Path | None, loggers: Iterable[Logger] = ()) -> None:
        self.loggers = list(loggers)
        self.files = {} if folder is None else {METRICS: _Lines(folder / METRICS), TABLE: _Lines(folder / TABLE, "step,epoch,name,value\n"), TIMES: _Lines(folder / TIMES)}

    def start(self, settings: Mapping[str, Any], sizes: Mapping[str, int] | None) -> None:
        """Open the files: anew, or where a checkpoint saw them."""
        for name, file in self.files.items():
            file.open(None if sizes is None else sizes.get(name, 0))
        for logger in self.loggers:
            logger.log_hparams(settings)

    def row(self, state: State, row: Mapping[str, float]) -> None:
        """Write one row."""
        if self.files:
            head = {"step": state.step, "epoch": state.epoch}
            self.files[METRICS].write(json.dumps({**head, **{name: written(value) for name, value in row.items()}}) + "\n")
            table = io.StringIO()
            csv.writer(table, lineterminator="\n").writerows((state.step, state.epoch, name, repr(value)) for name, value in row.items())
            self.files[TABLE].write(table.getvalue())
            if "grad_norm" in row and state.history:
                self.files[TIMES].write(json.dumps({"step": state.step, "seconds": round(state.history[-1].seconds, 6), "peak_bytes": peak_bytes()}) + "\n")
        for logger in self.loggers:
            logger.log_metrics(row, state.step)

    def sizes(self) -> dict[str, int]:
        """How long each file is now; what is counted is on disk."""
        return {name: file.size() for name, file in self.files.items()}

    def flush(self) -> None:
        """Hand the rows to the system."""
        for file in self.files.values():
            if file.stream is not None:
                file.stream.flush()

    def artifact(self, path: Path) -> None:
        """Tell the loggers of a file."""
        for logger in self.loggers:
            logger.log_artifact(path)

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()

    def finish(self) -> None:
        """Tell the loggers that the run is over."""
        for logger in self.loggers:
            logger.finish()


def written(value: float) -> float | str:
    """A number as strict JSON can hold it: what is not finite is a string."""
    return value if math.isfinite(value) else repr(value)


def rows(folder: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """The rows of a run's log; numbers that are not finite are numbers again. A last line that is not whole is left out.

    Raises:
        DataError: there is no log.
    """
    try:
        lines = (folder / name).read_text().split("\n")[:-1]
    except OSError as error:
        raise DataError(f"The log cannot be read: {error.strerror or error}.", where=str(folder / name)) from error
    return [{key: float(value) if isinstance(value, str) else value for key, value in json.loads(line).items()} for line in lines]
