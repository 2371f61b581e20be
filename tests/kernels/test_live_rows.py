"""The rows of a batch that are live: which, in which order, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxopt.errors import CheckError
from fxopt.kernels.live_rows import OVERLOAD


def by_hand(keep: list[list[bool]], read: list[list[bool]]) -> list[tuple[int, int, bool]]:
    """(sequence, position, kept) of the live rows."""
    return [(b, s, kept) for b, row in enumerate(keep) for s, kept in enumerate(row) if kept or read[b][s]]


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_rows(data: st.DataObject) -> None:
    batch, seq, multiple = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6)), data.draw(st.sampled_from((1, 2, 8)))
    keep = [[s < length for s in range(seq)] for length in data.draw(st.lists(st.integers(0, seq), min_size=batch, max_size=batch))]
    if data.draw(st.booleans()):
        keep = [row[::-1] for row in keep]
    # rows that see no other one may be read too: those before the first token
    read = [[data.draw(st.booleans()) and not any(row[: s + 1]) or row[s] for s in range(seq)] for row in keep]
    found = OVERLOAD(torch.tensor(keep).long(), [batch, seq], [torch.tensor(read).flatten()], [0, 0], [torch.zeros(batch, seq, 3)], True, True, multiple)
    place, slot, sequence, position, segment, real, sees = found
    expected = by_hand(keep, read)
    total = len(place)
    assert total % multiple == 0 and total >= max(2, len(expected)) and total - len(expected) < max(multiple, 3) and int(real.sum()) == len(expected)
    assert [(int(b), int(s)) for b, s in zip(sequence[real], position[real], strict=True)] == [(b, s) for b, s, _ in expected]
    assert torch.equal(place[real], (sequence * seq + position)[real]) and torch.equal(slot[real], place[real])
    assert bool((slot[~real] == batch * seq).all()) and bool((place < batch * seq).all()) and segment.shape == (1, total)
    assert sees.tolist() == [kept for *_, kept in expected] + [False] * (total - len(expected))
    for i in range(total):
        for j in range(total):
            together = bool(sees[i] and sees[j] and sequence[i] == sequence[j]) or i == j or not (real[i] or real[j])
            assert bool(segment[0, i] == segment[0, j]) == together


def test_cut_labels() -> None:
    """One label less for each sequence, at its end or start."""
    read = torch.tensor([[True, False, True], [False, False, True]])
    for cuts, expected in (([0, 1], [0, 2, 6]), ([1, 0], [1, 3, 7])):
        place, _, _, _, _, real, _ = OVERLOAD(None, [2, 4], [read.flatten()], cuts, [], False, True, 1)
        assert place[real].tolist() == expected


@pytest.mark.parametrize("causal, blank, wrong", [(True, True, "sequence 1, token 2"), (False, True, "sequence 1, token 0"), (True, False, "sequence 1, token 0")])
def test_a_row_that_is_read_and_sees_others_is_refused(causal: bool, blank: bool, wrong: str) -> None:
    keep, read = torch.tensor([[1, 1, 1], [0, 1, 0]]), torch.tensor([[True, True, True], [True, True, True]])
    with pytest.raises(CheckError, match=wrong):
        OVERLOAD(keep, [2, 3], [read], [0, 0], [], causal, blank, 1)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckError, match="with 5 labels"):
        OVERLOAD(None, [2, 3], [torch.ones(5, dtype=torch.bool)], [0, 0], [], False, True, 1)
    with pytest.raises(CheckError, match="no rows of one batch"):
        OVERLOAD(torch.ones(2, 3), [2, 3], [], [], [torch.ones(2, 4)], False, True, 1)


def test_the_number_of_rows_is_a_size_of_its_own() -> None:
    """Two calls have two sizes; a dry run with plain numbers takes the most rows there can be."""
    arguments = lambda x: (x, [*x.shape], [], [], [], True, True, 8)  # noqa: E731
    with FakeTensorMode(shape_env=ShapeEnv()):
        a, b = (OVERLOAD(*arguments(torch.ones(3, 7)))[0].shape[0] for _ in range(2))
        assert isinstance(a, torch.SymInt) and a.node.expr != b.node.expr and a.node.hint == 23
    with FakeTensorMode():
        assert OVERLOAD(*arguments(torch.ones(3, 7)))[4].shape == (1, 24)
