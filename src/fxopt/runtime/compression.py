"""Saved values of 8 bits, checked: a binding's gradients with them against those without."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch

from fxopt.errors import CaptureError
from fxopt.ir.compress import Compressed
from fxopt.ir.partition import min_cut
from fxopt.kernels.tolerance import COMPRESSED
from fxopt.runtime import selfcheck
from fxopt.runtime.binding import Binding
from fxopt.runtime.plan import Planned
from fxopt.runtime.saving import Always, Saving


def asked(saving: Saving) -> bool:
    """Whether regions may keep values in 8 bits."""
    return isinstance(saving, Planned) and saving.budget.compress


@contextlib.contextmanager
def _with(binding: Binding, saving: Saving) -> Iterator[None]:
    kept, binding.saving = binding.saving, saving
    try:
        yield
    finally:
        binding.saving = kept


def exact(binding: Binding, tensors: Sequence[torch.Tensor]) -> list[object]:
    """The binding's outputs by exact ways alone: those that take least, whatever the budget."""
    if not asked(binding.saving):
        return binding(tensors)
    assert isinstance(binding.saving, Planned)
    with _with(binding, Planned(dataclasses.replace(binding.saving.budget, bytes=None, compress=False))):
        return binding(tensors)


def checked(binding: Binding, tensors: Sequence[torch.Tensor], seed: int = 0) -> list[str]:
    """What a check says of a binding that may keep values in 8 bits; nothing of others. All that may be compressed is, in every region.

    Raises:
        CaptureError: a gradient is off by more than `tolerance.COMPRESSED`, or not finite, or an output differs at all.
    """
    if not asked(binding.saving):
        return []
    steps = []
    for saving in (Always(min_cut), Always(Compressed(min_cut))):
        with _with(binding, saving):
            steps.append(selfcheck.step(binding.model, lambda given: binding([t.contiguous() for t in given]), tensors, seed))
    outcome = selfcheck.compare_gradients(*steps, COMPRESSED)
    return [f"values in 8 bits, all that may be, against none: {outcome}"]
