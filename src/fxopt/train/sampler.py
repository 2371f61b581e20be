"""Samplers: the batches of an epoch as a pure function of the seed and the epoch, dealt out to the ranks.

A sampler has no hidden state: `(seed, epoch, cursor, rank, world)` is all there is, so a position in the data is five numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from fxopt.errors import DataError
from fxopt.train.randomness import mixed

Batches = list[list[int]]
"""Indices of samples, batch by batch."""


class Order(Protocol):
    """Which samples make the batches of an epoch."""

    def batches(self, seed: int, epoch: int) -> Batches:
        """All of them, over all ranks."""


def generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch."""
    return torch.Generator().manual_seed(mixed(seed, epoch))


def cut(order: Sequence[int], size: int, drop_last: bool = False) -> Batches:
    """Pieces of `size`, the last one shorter or left out."""
    found = [list(order[start : start + size]) for start in range(0, len(order), size)]
    return found[:-1] if drop_last and found and len(found[-1]) < size else found


def _sized(number: int, batch_size: int) -> None:
    if batch_size < 1 or number < 0:
        raise DataError(f"{number} samples in batches of {batch_size}", where="a sampler", do="batches hold at least one sample")


@dataclass(frozen=True)
class Plain:
    """Samples one after the other, shuffled or not.

    Args:
        number: of samples. batch_size: samples of a batch over one rank. shuffle: in another order in each epoch.
        drop_last: leave out what does not fill a batch (otherwise every sample is seen exactly once).
    """

    number: int
    batch_size: int
    shuffle: bool = True
    drop_last: bool = False

    def __post_init__(self) -> None:
        _sized(self.number, self.batch_size)

    def batches(self, seed: int, epoch: int) -> Batches:
        """See `Order`."""
        order = torch.randperm(self.number, generator=generator(seed, epoch)).tolist() if self.shuffle else range(self.number)
        return cut(order, self.batch_size, self.drop_last)


@dataclass(frozen=True)
class Bucketed:
    """Samples of similar length together, so that little of a batch is padding: shuffled, cut into pools, each pool sorted by length and
    cut into batches, whose order is shuffled.

    Args:
        lengths: of each sample. batch_size: samples of a batch. pool: batches that are sorted together; more of them pad less and
            shuffle less.
    """

    lengths: Sequence[int] = field(repr=False)
    batch_size: int
    pool: int = 50

    def __post_init__(self) -> None:
        _sized(len(self.lengths), self.batch_size)

    def batches(self, seed: int, epoch: int) -> Batches:
        """See `Order`."""
        random = generator(seed, epoch)
        order = torch.randperm(len(self.lengths), generator=random).tolist()
        found = [batch for pool in cut(order, self.batch_size * self.pool) for batch in cut(sorted(pool, key=lambda i: -self.lengths[i]), self.batch_size)]
        return [found[i] for i in torch.randperm(len(found), generator=random).tolist()]


@dataclass(frozen=True)
class Packed:
    """As many samples in a batch as fill `tokens`: the longest sample first into the first batch with room (first-fit decreasing), within
    shuffled pools. For a collate function that puts them into one row, or a model with the `pack` pass.

    Args:
        lengths: of each sample, none above `tokens`. tokens: that a batch holds at most. pool: samples that are packed together.
    """

    lengths: Sequence[int] = field(repr=False)
    tokens: int
    pool: int = 1024

    def __post_init__(self) -> None:
        _sized(len(self.lengths), self.tokens)
        long = next((i for i, length in enumerate(self.lengths) if length > self.tokens), None)
        if long is not None:
            raise DataError(f"Sample {long} has {self.lengths[long]} tokens, a batch holds {self.tokens}.", where="Packed", do="Cut long samples, or raise `tokens`.")

    def batches(self, seed: int, epoch: int) -> Batches:
        """See `Order`."""
        random = generator(seed, epoch)
        found: Batches = []
        for pool in cut(torch.randperm(len(self.lengths), generator=random).tolist(), self.pool):
            rooms: list[int] = []
            packs: Batches = []
            for sample in sorted(pool, key=lambda i: -self.lengths[i]):
                place = next((i for i, room in enumerate(rooms) if room >= self.lengths[sample]), None)
                if place is None:
                    place = len(packs)
                    packs.append([])
                    rooms.append(self.tokens)
                packs[place].append(sample)
                rooms[place] -= self.lengths[sample]
            found += packs
        return [found[i] for i in torch.randperm(len(found), generator=random).tolist()]


@dataclass(frozen=True)
class Weighted:
    """Samples drawn with replacement, each as often as its weight says: the one order in which a sample may come twice.

    Args:
        weights: of each sample, 0 or more. batch_size: samples of a batch. number: drawn in an epoch; None: as many as there are.
    """

    weights: Sequence[float] = field(repr=False)
    batch_size: int
    number: int | None = None

    def __post_init__(self) -> None:
        _sized(len(self.weights), self.batch_size)
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights) or not sum(self.weights) > 0:
            raise DataError("The weights of samples must be finite, 0 or more, and not all 0.", where="Weighted")

    def batches(self, seed: int, epoch: int) -> Batches:
        """See `Order`."""
        drawn = torch.multinomial(torch.tensor(self.weights, dtype=torch.float64), len(self.weights) if self.number is None else self.number, True, generator=generator(seed, epoch))
        return cut(drawn.tolist(), self.batch_size)


@dataclass(frozen=True)
class Listed:
    """An order of yours: a function from an epoch to its batches of indices. Same epoch, same batches."""

    function: Callable[[int], Batches]

    def batches(self, seed: int, epoch: int) -> Batches:
        """See `Order`."""
        return [list(batch) for batch in self.function(epoch)]


@dataclass(frozen=True)
class Position:
    """A place in the data: before batch `cursor` of a rank in an epoch."""

    seed: int = 0
    epoch: int = 0
    cursor: int = 0
    rank: int = 0
    world: int = 1

    def state_dict(self) -> dict[str, int]:
        """Five numbers."""
        return asdict(self)

    def on(self, rank: int, world: int) -> Position:
        """The same place for another number of ranks: what any rank has not seen yet is dealt out anew.

        Raises:
            DataError: the batches seen so far do not divide among that many ranks.
        """
        seen = self.cursor * self.world
        if seen % world:
            raise DataError(f"{seen} batches were used by {self.world} ranks; {world} ranks cannot go on from there.", do=f"Resume with a number of ranks that divides {seen}.")
        return Position(self.seed, self.epoch, seen // world, rank, world)


class Sampler:
    """The batches of one rank.

    Every batch of an epoch goes to exactly one rank, in turns. Where they do not divide, the last turn of some ranks is None, so that
    all ranks take as many turns; nothing is seen twice and nothing is left out.

    Args:
        order: which samples make the batches. seed: of shuffling. rank, world: this process and how many there are.
    """

    def __init__(self, order: Order, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank {rank} of {world}", where="Sampler")
        self.order, self.seed, self.rank, self.world = order, seed, rank, world
        self._epoch: tuple[int, list[list[int] | None]] | None = None

    def turns(self, epoch: int) -> list[list[int] | None]:
        """This rank's batches of an epoch; None where it has to wait for the others."""
        if self._epoch is None or self._epoch[0] != epoch:
            batches = self.order.batches(self.seed, epoch)
            mine: list[list[int] | None] = list(batches[self.rank :: self.world])
            self._epoch = epoch, mine + [None] * (math.ceil(len(batches) / self.world) - len(mine))
        return self._epoch[1]

    def iterate(self, position: Position) -> Iterator[list[int] | None]:
        """From a position to the end of its epoch."""
        return iter(self.turns(position.epoch)[position.cursor :])


def order_of(number: int, batch_size: int, *, shuffle: bool = True, lengths: Sequence[int] | None = None, tokens: int | None = None,
             weights: Sequence[float] | None = None, drop_last: bool = False) -> Order:
    """The order that some settings ask for: packed with `tokens`, bucketed with `lengths`, weighted with `weights`, else plain.

    Raises:
        DataError: settings that contradict each other.
    """
    asked: list[Any] = [name for name, value in (("lengths", lengths), ("weights", weights)) if value is not None]
    if len(asked) > 1 or tokens is not None and lengths is None or asked and drop_last:
        raise DataError(f"{' and '.join(asked) or 'tokens'} cannot be combined{' with drop_last' if drop_last else ''}.", where="a sampler", do="`tokens` needs `lengths`; `lengths` and `weights` exclude each other")
    for values in (lengths, weights):
        if values is not None and len(values) != number:
            raise DataError(f"{len(values)} {asked[0]} for {number} samples", where="a sampler")
    if tokens is not None and lengths is not None:
        return Packed(tuple(lengths), tokens)
    if lengths is not None:
        return Bucketed(tuple(lengths), batch_size)
    if weights is not None:
        return Weighted(tuple(weights), batch_size)
    return Plain(number, batch_size, shuffle, drop_last)
