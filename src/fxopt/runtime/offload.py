"""Memory that leaves the device between forward and backward, beside the computation: a region's saved values wait on the host.

Two buffers at a time, in both directions. Forward: what region k saved is copied while region k + 1 computes, and is free on the device
when region k + 1 hands over its own. Backward: while region k computes, what region k - 1 saved comes back.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxopt.ir.offload import LEAST


class Host:
    """Copies pieces of a device's memory to the host and back, in a stream of their own. A device without streams copies at once.

    `packets` are linked in the order in which they left: see `Packet.take`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.leaving: list[tuple[torch.cuda.Event | None, list[torch.Tensor]]] = []
        self.last: weakref.ref[Packet] | None = None

    def out(self, memory: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Begin to copy 1-dim uint8 tensors to the host; the device keeps them until the next call of `out` or `settle`."""
        self.settle()
        if self.stream is None:
            return [piece.clone() for piece in memory]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            away = [torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True).copy_(piece, non_blocking=True) for piece in memory]
            self.leaving.append((self.stream.record_event(), list(memory)))
        return away

    def settle(self) -> None:
        """Let go of what left: the computation waits for its copy, so that the memory may be written to again."""
        for event, _ in self.leaving:
            if event is not None:
                torch.cuda.current_stream(self.device).wait_event(event)
        self.leaving.clear()

    def back(self, away: Sequence[torch.Tensor]) -> tuple[torch.cuda.Event | None, list[torch.Tensor]]:
        """Begin to copy from the host. The computation must wait for the event before it reads."""
        if self.stream is None:
            return None, [piece.clone() for piece in away]
        found = [torch.empty(piece.shape, dtype=piece.dtype, device=self.device) for piece in away]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may have had another use before
        with torch.cuda.stream(self.stream):
            for piece, source in zip(found, away):
                piece.copy_(source, non_blocking=True)
                piece.record_stream(self.stream)  # should nobody take it, it is not given away while it is written to
            return self.stream.record_event(), found


@functools.cache
def _host(device: torch.device) -> Host:
    return Host(device)


@dataclass(frozen=True)
class _View:
    """How a saved tensor lies in its piece of memory."""

    piece: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Packet:
    """What one region's forward sent to the host."""

    def __init__(self, host: Host, tensors: Sequence[torch.Tensor]) -> None:
        pieces: dict[int, int] = {}
        memory: list[torch.Tensor] = []
        self.views: list[_View] = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in pieces:  # views of one piece of memory leave together, and lie in it as before when they are back
                pieces[storage.data_ptr()] = len(memory)
                memory.append(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
            self.views.append(_View(pieces[storage.data_ptr()], tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()))
        self.host = host
        self.away = host.out(memory)
        self.coming: tuple[torch.cuda.Event | None, list[torch.Tensor]] | None = None
        self.before, host.last = host.last, weakref.ref(self)

    def call(self) -> None:
        """Begin to bring it back."""
        if self.coming is None:
            self.coming = self.host.back(self.away)

    def take(self) -> list[torch.Tensor]:
        """The tensors, on the device again. Then what left before it is called back: its backward comes next."""
        self.host.settle()
        self.call()
        assert self.coming is not None
        (event, memory), self.coming = self.coming, None
        if event is not None:
            torch.cuda.current_stream(self.host.device).wait_event(event)
        previous = self.before() if self.before is not None else None
        if previous is not None:
            previous.call()
        empty = [torch.empty(0, dtype=view.dtype, device=self.host.device) for view in self.views]
        return [t.set_(memory[v.piece].untyped_storage(), v.offset, v.size, v.stride) for t, v in zip(empty, self.views)]


def send(saved: Sequence[object], positions: Sequence[int]) -> tuple[Packet | None, tuple[int, ...]]:
    """Send saved values at these positions to the host, but for small ones; and the positions of those that left.

    A value leaves once even if it is saved twice.
    """
    found = [(i, t) for i in positions if isinstance(t := saved[i], torch.Tensor) and t.untyped_storage().nbytes() >= LEAST]
    if not found:
        return None, ()
    return Packet(_host(found[0][1].device), [t for _, t in found]), tuple(i for i, _ in found)
