"""Tensors in pieces, on processes and on disk: each rank writes its own, and any number of ranks reads what it needs of all.

Beside what every checkpoint has, `pieces-<rank>.safetensors` holds a rank's elements, each tensor in one dimension, and
`pieces-<rank>.json` from which element to which. Where the state has such a tensor, it says `{"$piece": [name, shape]}`. What belongs to a
piece but is not cut like it (the scales of averages of 8 bits) has no shape there, and only the same number of ranks can read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxopt.errors import DataError
from fxopt.train import folder as folders
from fxopt.train.folder import Writer
from fxopt.train.plain import Mark

if TYPE_CHECKING:
    from fxopt.train.strategies import Strategy

NAME = "pieces-{}"


@dataclass(frozen=True, eq=False)
class Piece:
    """A rank's elements of a tensor: those from `start` to before `stop`.

    Attributes:
        tensor: [stop - start]. shape: of the whole; None: this rank's alone, of any shape.
    """

    tensor: Tensor
    start: int = 0
    stop: int = 0
    shape: torch.Size | None = None


@dataclass(frozen=True, eq=False)
class Spread:
    """A tensor in the files of several ranks.

    Attributes:
        sources: (file, from, to) in the order of the elements, without gaps; without a shape, one of each rank.
    """

    name: str
    shape: tuple[int, ...] | None
    sources: tuple[tuple[Path, int, int], ...]

    def read(self, start: int, stop: int) -> Tensor:
        """The elements from `start` to before `stop`, in one dimension. Nothing else is read.

        Raises:
            DataError: a file is damaged.
        """
        parts = [self._read(path, slice(max(first, start) - first, min(last, stop) - first)) for path, first, last in self.sources if max(first, start) < min(last, stop)]
        if not parts:  # no element of it: the dtype is that of the rest
            return self._read(self.sources[0][0], slice(0, 0))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _read(self, path: Path, which: slice) -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice(self.name)[which] if which != slice(None) else file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise DataError(f"The tensors cannot be read: {error}.", where=f"{path}: {self.name}") from error

    def whole(self) -> Tensor:
        """All of it, in its shape."""
        if self.shape is None:
            return self.of(0, 1)
        return self.read(0, math.prod(self.shape)).reshape(self.shape)

    def of(self, rank: int, world: int) -> Tensor:
        """What is a rank's alone.

        Raises:
            DataError: there were more ranks or fewer.
        """
        if len(self.sources) != world:
            raise DataError(f"{self.name} was laid out for {len(self.sources)} processes, this run has {world}.", where="the checkpoint",
                            do="Resume with as many processes, or train with averages of 32 bits.")
        return self._read(self.sources[rank][0], slice(None))


def taken_out(value: Any, where: str, pieces: dict[str, Piece]) -> Any:
    """The same state with marks in place of pieces, which go into `pieces` under names that begin with `where`."""
    if isinstance(value, Piece):
        pieces[where] = value
        return Mark(where, None if value.shape is None else tuple(value.shape))
    if isinstance(value, Mapping):
        return {key: taken_out(item, f"{where}/{key}", pieces) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(taken_out(item, f"{where}/{i}", pieces) for i, item in enumerate(value))
    return value


def write(writer: Writer, rank: int, pieces: Mapping[str, Piece]) -> None:
    """Write a rank's pieces."""
    writer.json(f"{NAME.format(rank)}.json", {name: [piece.start, piece.stop] for name, piece in pieces.items()})
    writer.tensors(f"{NAME.format(rank)}.safetensors", {name: piece.tensor for name, piece in pieces.items()})


def index(path: Path, files: Mapping[str, Any]) -> dict[str, list[tuple[Path, int, int]]]:
    """Where the pieces of a checkpoint lie."""
    found: dict[str, list[tuple[Path, int, int]]] = {}
    for rank in range(sum(name.startswith("pieces-") and name.endswith(".json") for name in files)):
        for name, (start, stop) in folders.read_state(path / f"{NAME.format(rank)}.json").items():
            found.setdefault(name, []).append((path / f"{NAME.format(rank)}.safetensors", start, stop))
    return found


def filled_in(value: Any, known: Mapping[str, list[tuple[Path, int, int]]]) -> Any:
    """The same state with tensors in files in place of marks.

    Raises:
        DataError: pieces are missing.
    """
    if isinstance(value, Mark):
        if value.shape is None:
            return Spread(value.name, None, tuple(known.get(value.name, ())))
        sources = sorted((source for source in known.get(value.name, ()) if source[1] < source[2]), key=lambda source: source[1])
        ends = [0, *(stop for _, _, stop in sources)]
        if ends[-1] != math.prod(value.shape) or any(start != end for (_, start, _), end in zip(sources, ends)):
            raise DataError(f"Pieces of {value.name} are missing.", where="the checkpoint", do="Take the checkpoint before it.")
        return Spread(value.name, value.shape, tuple(sources))
    if isinstance(value, Mapping):
        return {key: filled_in(item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(filled_in(item, known) for item in value)
    return value


def wholes(value: Any) -> Any:
    """The same state with whole tensors in place of those in files."""
    if isinstance(value, Spread):
        return value.whole()
    if isinstance(value, Mapping):
        return {key: wholes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(wholes(item) for item in value)
    return value


def write_together(strategy: Strategy, path: Path, fill: Callable[[Writer], None], pieces: Mapping[str, Piece], facts: Mapping[str, Any], last_good: Path | None) -> None:
    """Make a checkpoint to which every rank gives its pieces; see `folder.write`. On all ranks.

    Rank 0 makes the folder under its temporary name; when all ranks have written and synced their files it writes the manifest, which
    knows the sums of all of them, and gives the folder its name. If a rank fails, the others hear of it where they wait; what lies in
    the temporary folder then is swept away at the next start.

    Args:
        fill: writes rank 0's other files.

    Raises:
        DataError: this rank could not write. ProcessError: another one.
    """

    def fill_all(writer: Writer) -> None:
        strategy.barrier()  # the folder is there
        fill(writer)
        write(writer, 0, pieces)
        for files in strategy.share(writer.files)[1:]:
            writer.files |= files

    if not strategy.rank:
        folders.write(path, fill_all, facts, last_good)
    else:
        strategy.barrier()
        writer = Writer(folders.temporary(path))
        try:
            write(writer, strategy.rank, pieces)
        except OSError as error:
            raise folders.unwritten(path, error, last_good) from error
        strategy.share(writer.files)
    strategy.barrier()
