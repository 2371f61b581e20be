"""Adapted weights are not kept for the backward of the original code, but computed again: no dense copy of the model builds up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fxopt.torch_private import DisableTorchFunctionSubclass

# Memory of the values made inside `recomputed`: a weak reference to it, and how to make it again. The reference keeps the address
# from being used for other memory, so that a hit is never another tensor.
_made: dict[int, tuple[StorageWeakRef, Callable[[], torch.Tensor]]] | None = None


@dataclass
class _View:
    """How to make a saved tensor again: what its memory holds, and which part of it it is."""

    again: Callable[[], torch.Tensor]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            return self.again().as_strided(self.size, self.stride, self.offset)


def noted(value: torch.Tensor, again: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The value, which autograd need not keep inside `recomputed`: `again` computes it anew, in memory of its own."""
    if _made is not None:
        reference = StorageWeakRef(value.untyped_storage())
        _made[reference.cdata] = reference, again
    return value


@contextlib.contextmanager
def recomputed() -> Iterator[None]:
    """Inside, what `noted` names is not saved for a backward but computed again there. The backward may come after the block.

    What `again` reads must be the same then: no optimizer steps in between. Blocks may be nested: they know each other's values.
    """
    global _made
    before, _made = _made, {} if _made is None else _made
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _made = before


def _pack(saved: torch.Tensor) -> Any:
    if saved.layout is not torch.strided:  # without a storage
        return saved.detach()
    with DisableTorchFunctionSubclass():
        known = (_made or {}).get(saved.untyped_storage()._cdata)
        # detached: a node that saves its own output would hold itself alive
        return saved.detach() if known is None else _View(known[1], saved.size(), saved.stride(), saved.storage_offset())


def _unpack(packed: Any) -> torch.Tensor:
    return packed() if isinstance(packed, _View) else packed
