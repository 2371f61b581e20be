"""Samplers and loaders: every sample once, positions that continue exactly, the same batches with and without workers."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from fxopt.errors import DataError
from fxopt.train.loader import Given, Loader, Replayed, packed_row, source_of
from fxopt.train.sampler import Bucketed, Order, Packed, Plain, Position, Sampler, Weighted, order_of


@st.composite
def orders(draw: st.DrawFn) -> tuple[Order, int]:
    """(an order in which each sample comes once, the number of samples)."""
    number, size = draw(st.integers(0, 60)), draw(st.integers(1, 9))
    lengths = tuple(draw(st.lists(st.integers(1, 30), min_size=number, max_size=number)))
    kinds = [Plain(number, size, draw(st.booleans())), Bucketed(lengths, size, draw(st.integers(1, 4))), Packed(lengths, 30 + size, draw(st.integers(1, 20)))]
    return draw(st.sampled_from(kinds)), number


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(1, 5), st.integers(0, 2**40), st.integers(0, 3))
def test_every_sample_once_over_all_ranks(case: tuple[Order, int], world: int, seed: int, epoch: int) -> None:
    order, number = case
    turns = [Sampler(order, seed, rank, world).turns(epoch) for rank in range(world)]
    assert len({len(mine) for mine in turns}) == 1, "all ranks take as many turns"
    assert sorted(itertools.chain.from_iterable(batch for mine in turns for batch in mine if batch is not None)) == list(range(number))
    empty = sum(batch is None for mine in turns for batch in mine)
    assert empty < world
    assert all(batch for mine in turns for batch in mine if batch is not None)


@settings(max_examples=30, deadline=None)
@given(orders(), st.integers(0, 2**40), st.data())
def test_a_position_is_all_there_is(case: tuple[Order, int], seed: int, data: st.DataObject) -> None:
    order, _ = case
    whole = Sampler(order, seed).turns(2)
    cursor = data.draw(st.integers(0, len(whole)))
    assert list(Sampler(order, seed).iterate(Position(seed, 2, cursor))) == whole[cursor:]


def test_orders_are_what_they_are_called() -> None:
    chance = random.Random(0)
    lengths = tuple(chance.randint(1, 100) for _ in range(300))
    waste = [sum(len(b) * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in order.batches(0, 0)) for order in (Plain(300, 8), Bucketed(lengths, 8))]
    assert waste[1] < 0.3 * waste[0]
    packs = Packed(lengths, 128).batches(0, 0)
    assert all(sum(lengths[i] for i in pack) <= 128 for pack in packs) and sum(lengths) / (128 * len(packs)) > 0.9
    drawn = list(itertools.chain.from_iterable(Weighted((0.0, 1.0, 3.0), 10, 4000).batches(1, 0)))
    assert 0 not in drawn and 2.5 < drawn.count(2) / drawn.count(1) < 3.5
    assert Plain(20, 4).batches(0, 0) != Plain(20, 4).batches(0, 1) != Plain(20, 4).batches(1, 1)
    assert Plain(10, 4, drop_last=True).batches(0, 0)[-1:] != [[]] and len(Plain(10, 4, drop_last=True).batches(0, 0)) == 2


def test_positions_move_to_other_numbers_of_ranks() -> None:
    assert Position(0, 1, 6, 0, 2).on(3, 4) == Position(0, 1, 3, 3, 4)
    with pytest.raises(DataError, match="3 ranks cannot"):
        Position(0, 1, 5, 0, 2).on(0, 3)


@pytest.mark.parametrize("bad", [{"tokens": 5}, {"lengths": (1,), "weights": (1,)}, {"lengths": (1, 2)}, {"weights": (0.0,)}, {"lengths": (9,), "tokens": 4}, {"batch_size": 0}])
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        order_of(**{"number": 1, "batch_size": 2, **bad})


class Noisy(Dataset):
    """Draws from all three generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64)


def flat(batches: Any) -> list[list[float]]:
    return [row for batch in batches for row in batch.tolist()]


def test_batches_do_not_depend_on_workers_or_the_model() -> None:
    alone = flat(Loader(Noisy(), 3, shuffle=True, seed=7).batches(1, 0))
    torch.rand(5)
    random.random()
    assert flat(Loader(Noisy(), 3, shuffle=True, seed=7).batches(1, 0)) == alone
    loader = Loader(Noisy(), 3, shuffle=True, seed=7, workers=2)
    assert flat(loader.batches(1, 0)) == alone
    assert flat(loader.batches(1, 2)) == alone[6:]
    before = torch.get_rng_state()
    flat(Loader(Noisy(), 3).batches(0, 0))
    assert torch.equal(before, torch.get_rng_state())
    assert flat(Loader(Noisy(), 3, shuffle=True, seed=8).batches(1, 0)) != alone


def test_torch_loaders_are_taken_apart() -> None:
    for loader, kind in ((DataLoader(Noisy(), 3), False), (DataLoader(Noisy(), 3, shuffle=True), True)):
        source = source_of(loader, seed=1)
        assert isinstance(source, Loader) and source.sampler.order == Plain(10, 3, kind)
        assert sorted(row[0] for row in flat(source.batches(0, 0))) == list(range(10))
    weighted = source_of(DataLoader(Noisy(), 2, sampler=WeightedRandomSampler([1.0] * 10, 6)))
    assert isinstance(weighted, Loader) and len(weighted) == 3
    twice = source_of(DataLoader(Noisy(), 2, sampler=RandomSampler(Noisy(), replacement=True)))
    assert isinstance(twice, Replayed)


class Drawing:
    """An iterable that draws as it goes."""

    def __iter__(self) -> Any:
        order = torch.randperm(6).tolist()
        for index in order:
            yield torch.tensor([index, random.random()])


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        for index in range(5):
            yield torch.full((2,), float(index)) + torch.rand(2)


@pytest.mark.parametrize("make", [Drawing, lambda: DataLoader(Endless(), batch_size=2)])
def test_iterables_are_replayed_up_to_the_position(make: Any) -> None:
    source = source_of(make(), seed=3)
    first = flat(b.reshape(1, -1) for b in source.batches(0, 0))
    state = None
    second = []
    for batch in source.batches(1, 0):
        torch.rand(3)  # the model's
        second += flat([batch.reshape(1, -1)])
        state = state or source.state_dict()
    assert first != second
    again = source_of(make(), seed=99)
    again.load_state_dict(state)
    assert flat(b.reshape(1, -1) for b in again.batches(1, 2)) == second[2:]


def test_what_cannot_be_continued_is_refused() -> None:
    with pytest.raises(DataError, match="iterator"):
        source_of(iter([1])).load_state_dict({})
    with pytest.raises(DataError, match="samples"):
        source_of(Noisy())
    with pytest.raises(DataError, match="cannot be passed over"):
        source_of(3)
    with pytest.raises(DataError, match="dealt out"):
        source_of(Drawing(), world=2)
    with pytest.raises(DataError, match="not a Loader's"):
        Loader(Noisy()).load_state_dict({"x": 1})
    with pytest.raises(DataError, match="no length"):
        Loader(Drawing())


def test_lists_are_dealt_out() -> None:
    assert [list(Given([0, 1, 2], rank, 2).batches(0, 0)) for rank in (0, 1)] == [[0, 2], [1, None]]
    samples = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    row = packed_row(samples)
    assert {key: value.tolist() for key, value in row.items()} == {"input_ids": [[5, 6, 7, 8, 9]], "labels": [[-100, 6, 7, -100, 9]], "position_ids": [[0, 1, 2, 0, 1]]}


def test_a_hugging_face_like_data_set_is_read_in_batches() -> None:
    class Rows:
        column_names = ["x"]

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> dict[str, float]:
            raise AssertionError("rows are asked for together")

        def __getitems__(self, indices: list[int]) -> list[dict[str, float]]:
            return [{"x": float(i)} for i in indices]

    assert [batch["x"].tolist() for batch in source_of(Rows(), batch_size=2).batches(0, 0)] == [[0, 1], [2, 3], [4]]
    with pytest.raises(DataError, match="samples"):
        source_of(Rows())
