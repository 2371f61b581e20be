"""The collector's sight during a capture is put back."""

from __future__ import annotations

import gc
import weakref

import pytest

from fxopt.runtime.garbage import only_own


class Ring:
    def __init__(self) -> None:
        self.ring = self


def test_what_was_made_inside_is_collected_and_the_rest_afterwards() -> None:
    old = weakref.ref(ring := Ring())
    with only_own():
        assert gc.get_freeze_count()
        new = weakref.ref(Ring())
        del ring
        gc.collect()
        assert new() is None and old() is not None
    assert not gc.get_freeze_count()
    gc.collect()
    assert old() is None


def test_it_ends_with_an_error_and_leaves_a_program_that_freezes_itself() -> None:
    with pytest.raises(KeyError), only_own():
        raise KeyError
    assert not gc.get_freeze_count()
    gc.freeze()
    try:
        with only_own():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
