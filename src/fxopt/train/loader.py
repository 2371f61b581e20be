"""Data with a position: whatever gives batches, as something that can be continued in the middle of an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import data as torch_data

from fxopt.data.dataset import Dataset, Part
from fxopt.errors import DataError
from fxopt.runtime.counting import IGNORED_LABEL
from fxopt.train.batch import Batch
from fxopt.train.randomness import Stream, isolated, mixed
from fxopt.train.sampler import Order, Plain, Position, Sampler, Weighted, order_of

Collate = Callable[[list[Any]], Batch]


class Source(Protocol):
    """Batches of epochs, from any position."""

    def length(self, epoch: int) -> int | None:
        """Turns of this rank in an epoch; None if that is not known."""

    def batches(self, epoch: int, cursor: int) -> Iterator[Batch]:
        """The rest of an epoch from a position; None where this rank has no batch and the others do."""

    def state_dict(self) -> dict[str, Any]:
        """What must be known beside epoch and cursor to continue."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


class Loader:
    """Batches of a data set, exactly resumable, also with workers.

    Each batch is made under random states of its own, from (seed, epoch, number of the batch over all ranks): what a data set or a collate function
    draws (Python, numpy, torch) does not depend on the workers, on the model, or on where a run was resumed.

    Args:
        dataset: anything with `len` and items: a list, a torch or Hugging Face data set.
        batch_size: samples of a batch.
        shuffle, lengths, tokens, weights, drop_last: see `fxopt.train.sampler.order_of`.
        order: an order of your own instead.
        collate: a list of samples to a batch; None: that of a `fxopt.data.Dataset`, else torch's default_collate.
        workers: processes that make batches ahead.
        seed: of order and random states. rank, world: see `Sampler`.

    Raises:
        DataError: a data set without a length; settings that contradict each other.
    """

    def __init__(self, dataset: Any, batch_size: int = 1, *, shuffle: bool = False, lengths: Sequence[int] | None = None, tokens: int | None = None,
                 weights: Sequence[float] | None = None, drop_last: bool = False, order: Order | None = None, collate: Collate | None = None,
                 workers: int = 0, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(f"A {type(dataset).__name__} has no length or no items.", where="Loader", do="Give batches themselves (any iterable) to the trainer.")
        if order is None:
            order = order_of(len(dataset), batch_size, shuffle=shuffle, lengths=lengths, tokens=tokens, weights=weights, drop_last=drop_last)
        self.dataset, self.workers = dataset, workers
        self.sampler = Sampler(order, seed, rank, world)
        own = dataset.collate if isinstance(dataset, (Dataset, Part)) else torch_data.default_collate
        self.maker = _Maker(dataset, collate or own, seed, quiet=collate is None and isinstance(dataset, (list, tuple, torch_data.TensorDataset)))
        self.more: dict[str, Any] = {}
        self._jobs: list[Any] = []
        self._torch: torch_data.DataLoader | None = None

    def on(self, rank: int, world: int) -> Loader:
        """The same data for one of several processes."""
        made = Loader(self.dataset, order=self.sampler.order, collate=self.maker.collate, workers=self.workers, seed=self.sampler.seed, rank=rank, world=world)
        made.maker, made.more = self.maker, self.more
        return made

    def length(self, epoch: int) -> int:
        """See `Source`."""
        return len(self.sampler.turns(epoch))

    def __len__(self) -> int:
        return self.length(0)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(0, 0)

    def batches(self, epoch: int, cursor: int) -> Iterator[Batch]:
        """See `Source`."""
        sampler = self.sampler
        jobs = [(epoch, (cursor + i) * sampler.world + sampler.rank, indices) for i, indices in enumerate(sampler.iterate(Position(sampler.seed, epoch, cursor, sampler.rank, sampler.world)))]
        if not self.workers:
            return map(self.maker, jobs)
        self._jobs[:] = jobs
        if self._torch is None:
            self._torch = torch_data.DataLoader(_Jobs(self.maker), batch_size=None, sampler=self._jobs, num_workers=self.workers, persistent_workers=True, collate_fn=_as_it_is,
                                                generator=torch.Generator().manual_seed(sampler.seed), **self.more)
        return iter(self._torch)

    def state_dict(self) -> dict[str, Any]:
        """Seed, rank and world: with epoch and cursor, which the trainer knows, the whole position."""
        return {"seed": self.sampler.seed, "rank": self.sampler.rank, "world": self.sampler.world}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the saved seed.

        Raises:
            DataError: the state is of other data.
        """
        if set(state) != {"seed", "rank", "world"}:
            raise DataError(f"The saved position has the entries {', '.join(map(str, state))}, which are not a Loader's.", do="Resume with the same kind of data.")
        self.sampler.seed = self.maker.seed = state["seed"]
        self.sampler._epoch = None


class _Maker:
    """Makes batches under random states of their own."""

    def __init__(self, dataset: Any, collate: Collate, seed: int, quiet: bool) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self.quiet = quiet  # a list and torch's collation draw nothing

    def __call__(self, job: tuple[int, int, list[int] | None]) -> Batch:
        epoch, number, indices = job
        if indices is None:
            return None
        if self.quiet:
            return self.collate([self.dataset[i] for i in indices])
        with isolated(mixed(self.seed, epoch, number)):
            many = getattr(self.dataset, "__getitems__", None)
            return self.collate(many(indices) if many is not None else [self.dataset[i] for i in indices])


class _Jobs(torch_data.Dataset):
    """What torch's loader hands to its workers."""

    def __init__(self, maker: _Maker) -> None:
        self.maker = maker

    def __getitem__(self, job: Any) -> Batch:
        return self.maker(job)


def _as_it_is(batch: Batch) -> Batch:
    return batch


class Given:
    """A list of batches; each rank takes its turn of them."""

    def __init__(self, items: Sequence[Batch], rank: int = 0, world: int = 1) -> None:
        self.items, self.rank, self.world = items, rank, world

    def length(self, epoch: int) -> int:
        """See `Source`."""
        return -(-len(self.items) // self.world)

    def batches(self, epoch: int, cursor: int) -> Iterator[Batch]:
        """See `Source`."""
        for turn in range(cursor, self.length(epoch)):
            place = turn * self.world + self.rank
            yield self.items[place] if place < len(self.items) else None

    def state_dict(self) -> dict[str, Any]:
        """Nothing beside the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class Replayed:
    """Any iterable of batches. To continue in the middle, its epoch is run again up to there.

    What it draws from the global generators comes from a stream of its own, so that the epoch is the same without the model's draws.
    An iterator (which is its own iterator) goes on over all epochs, and cannot be resumed.
    """

    def __init__(self, items: Iterable[Batch], seed: int = 0) -> None:
        self.items = items
        self.once = iter(items) is items
        self.stream = Stream(seed)
        self.start = self.stream.raw  # random states when the present epoch began

    def length(self, epoch: int) -> int | None:
        """See `Source`."""
        try:
            return len(self.items) if isinstance(self.items, Sized) else None
        except TypeError:  # a DataLoader has `__len__`, which fails where its data set has none
            return None

    def batches(self, epoch: int, cursor: int) -> Iterator[Batch]:
        """See `Source`."""
        for holder in (self.items, getattr(self.items, "sampler", None), getattr(self.items, "batch_sampler", None)):
            if callable(getattr(holder, "set_epoch", None)):
                holder.set_epoch(epoch)
        if cursor:
            self.stream.raw = self.start
        else:
            self.start = self.stream.raw
        with self.stream:
            iterator = iter(self.items)
            for _ in itertools.islice(iterator, 0 if self.once else cursor):
                pass
        return self._rest(iterator)

    def _rest(self, iterator: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            with self.stream:
                batch = next(iterator, self)
            if batch is self:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The random states when the epoch began, as data."""
        python, legacy, torch_state = self.start
        return {"python": [python[0], list(python[1]), python[2]], "numpy": [legacy[0], torch.from_numpy(legacy[1].astype("int64")), *legacy[2:]], "torch": torch_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the epoch where the saved run began it.

        Raises:
            DataError: the state is of other data; or an iterator, which cannot be run again.
        """
        if self.once:
            raise DataError("The data is an iterator: it cannot be run again up to where the saved run was.", where=type(self.items).__name__,
                            do="Give something that begins anew at each `iter`: a list, a DataLoader, a class with `__iter__`.")
        if set(state) != {"python", "numpy", "torch"}:
            raise DataError(f"The saved position has the entries {', '.join(map(str, state))}, which are not an iterable's.", do="Resume with the same kind of data.")
        python, legacy = state["python"], state["numpy"]
        self.start = (python[0], tuple(python[1]), python[2]), (legacy[0], legacy[1].numpy().astype("uint32"), *legacy[2:]), state["torch"]
        self.stream.raw = self.start


def source_of(data: Any, *, batch_size: int | None = None, shuffle: bool = False, seed: int = 0, workers: int = 0, rank: int = 0, world: int = 1) -> Source:
    """A source from whatever was given.

    A list or tuple holds batches. A torch DataLoader over a data set with a length is taken apart: its samples are dealt out in an
    order of ours (plain, shuffled, weighted, or its batch sampler's), so that it can be continued without being run again; other
    iterables are replayed. With `batch_size`, `data` holds samples.

    Raises:
        DataError: a data set of samples without a batch size; an iterable that cannot be dealt out to several ranks.
    """
    if isinstance(data, Loader):
        return data.on(rank, world) if (rank, world) != (data.sampler.rank, data.sampler.world) else data
    if batch_size is not None:
        return Loader(data, batch_size, shuffle=shuffle, workers=workers, seed=seed, rank=rank, world=world)
    if isinstance(data, (list, tuple)):
        return Given(data, rank, world)
    if isinstance(data, torch_data.DataLoader) and (loader := _taken_apart(data, seed, rank, world)) is not None:
        return loader
    if not isinstance(data, torch_data.DataLoader) and (isinstance(data, torch_data.Dataset) and hasattr(data, "__getitem__") or hasattr(data, "column_names")):
        raise DataError(f"A {type(data).__name__} holds samples, not batches.", where="the training data", do="Give `batch_size` to the trainer, or wrap it: fxopt.Loader(dataset, batch_size=8).")
    if isinstance(data, (str, bytes, Mapping)) or not hasattr(data, "__iter__"):
        raise DataError(f"A {type(data).__name__} cannot be passed over.", where="the data", do="Give an iterable of batches, or a data set with `batch_size`; a file is read by `fxopt.data.Dataset`.")
    if world > 1:
        raise DataError(f"A {type(data).__name__} cannot be dealt out to {world} processes.", where="the data", do="Give a list of batches, a DataLoader over a data set with a length, or fxopt.Loader.")
    return Replayed(data, seed)


def _taken_apart(loader: torch_data.DataLoader, seed: int, rank: int, world: int) -> Loader | None:
    """A torch loader as one of ours; None if its order cannot be known."""
    dataset, sampler, outer = loader.dataset, loader.sampler, loader.batch_sampler
    if isinstance(dataset, torch_data.IterableDataset) or type(loader) is not torch_data.DataLoader or outer is None or loader.worker_init_fn is not None:
        return None
    drop = bool(loader.drop_last)
    order: Order
    if type(outer) is not torch_data.BatchSampler or loader.batch_size is None:
        return None
    if type(sampler) is torch_data.SequentialSampler:
        order = Plain(len(dataset), loader.batch_size, False, drop)
    elif type(sampler) is torch_data.RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset):
        order = Plain(len(dataset), loader.batch_size, True, drop)
    elif type(sampler) is torch_data.WeightedRandomSampler and sampler.replacement and not drop:
        order = Weighted(tuple(map(float, sampler.weights)), loader.batch_size, sampler.num_samples)
    else:
        return None
    made = Loader(dataset, order=order, collate=None if loader.collate_fn is torch_data.default_collate else loader.collate_fn, workers=loader.num_workers, seed=seed, rank=rank, world=world)
    made.more = {"timeout": loader.timeout, "multiprocessing_context": loader.multiprocessing_context, **({"prefetch_factor": loader.prefetch_factor} if loader.num_workers else {})}
    return made


def packed_row(samples: list[Mapping[str, Sequence[int] | Tensor]]) -> dict[str, Tensor]:
    """Collates tokenized samples (`input_ids`, `labels` or none) into one row [1, tokens] without padding.

    `position_ids` start at 0 in each sample, which is how models (and the `pack` pass) tell them apart; the first label of each is
    -100, since nothing before it may predict it.
    """
    rows = []
    for sample in samples:
        ids = torch.as_tensor(sample["input_ids"])
        labels = torch.as_tensor(sample.get("labels", ids)).clone()
        labels[:1] = IGNORED_LABEL
        rows.append((ids, labels, torch.arange(len(ids))))
    ids, labels, positions = (torch.cat(parts)[None] for parts in zip(*rows, strict=True))
    return {"input_ids": ids, "labels": labels, "position_ids": positions}
