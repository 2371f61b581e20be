"""The group of processes that train together: joining it, and exchanging numbers, tensors and plain data."""

from __future__ import annotations

import atexit
import datetime
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from fxopt.errors import ProcessError
from fxopt.torch_private import default_store
from fxopt.train.plain import decode, encode
from fxopt.train.strategies.environment import place
from fxopt.train.strategies.monitor import Monitor

_SLOT = 1024
"""Bytes that `share` exchanges at first: what is longer takes a second exchange."""
_HEAD = 8
_SLICE = datetime.timedelta(seconds=1)
_MARGIN = datetime.timedelta(seconds=5)
"""How much later the group gives an exchange up than `wait`, whose message says more."""
_runs = 0
"""Groups made by this process: equal on all ranks, so that the keys of one run are not those of another."""


def join(joining: float, timeout: float) -> None:
    """Make the process group that the launcher's variables describe, unless there is one. gloo for the CPU, nccl for CUDA.

    Args:
        joining: seconds to wait for the other processes. timeout: seconds of one exchange. The group must know them: a process does not end
            before an exchange that it has begun does, also when it has given up waiting.

    Raises:
        ProcessError: nobody has said which process this is, or the others did not come.
    """
    if not dist.is_available():
        raise ProcessError("This build of torch has no torch.distributed.", where="strategy ddp", do="Use strategy single, or another build of torch.")
    if dist.is_initialized():
        return
    found = place()
    if found is None:
        raise ProcessError("No launcher has said which process this is.", where="the environment", do="Start it with `fxopt launch`, torchrun or srun; or use strategy single.")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(found.local % torch.cuda.device_count())
    # torchrun may hold the store itself, which env:// knows from its variables.
    url = "env://" if found.source == "torchrun" else f"tcp://{found.host}:{found.port}"
    wait = datetime.timedelta(seconds=joining)
    try:
        store, rank, world = next(dist.rendezvous(url, found.rank, found.world, timeout=wait))
        store.set_timeout(wait)
        store.set(f"fxopt/here/{rank}", "")
        store.wait([f"fxopt/here/{other}" for other in range(world)], wait)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore("fxopt", store), rank=rank, world_size=world,
                                timeout=datetime.timedelta(seconds=timeout) + _MARGIN)
    except (RuntimeError, ValueError, OSError) as error:  # torch's DistError is a RuntimeError
        raise ProcessError(f"The {found.world} processes did not meet: {str(error).splitlines()[0]}", where=f"rank {found.rank}, {found.host}:{found.port} ({found.source})",
                           do=f"Within {joining:.0f} s all of them must reach that host and port. Are all started, with different ranks?") from error
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Processes:
    """The process group during one run. Every method that exchanges is called by all ranks, in the same order.

    Args:
        timeout: seconds that one exchange may take, if all ranks are alive. silence: see `Monitor`.
    """

    def __init__(self, timeout: float, silence: float) -> None:
        global _runs
        _runs += 1
        self.rank, self.world, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        backend = dist.get_backend()
        # Numbers and plain data lie on the CPU: for a group of nccl alone there is one of gloo beside it.
        self.control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout)) if backend == "nccl" else dist.group.WORLD
        self.monitor = Monitor(dist.PrefixStore(f"fxopt/run{_runs}", default_store()), self.rank, self.world, silence, self._abort)

    def _abort(self) -> None:
        # gloo's waits are cut into slices by `wait`; a kernel of nccl ends only if its communicator is aborted.
        if torch.cuda.is_available() and dist.is_initialized():
            dist.group.WORLD.abort()

    def start_sum(self, tensor: Tensor) -> dist.Work:
        """Begin to add a tensor over all ranks, in place."""
        return self.started(lambda: dist.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None, async_op=True))

    def started(self, begin: Callable[[], dist.Work]) -> dist.Work:
        """Begin an exchange.

        Raises:
            ProcessError: a rank has failed or was lost.
        """
        if (error := self.monitor.error()) is not None:
            raise error
        try:
            return begin()
        except RuntimeError as error:
            raise self.monitor.explain(error) from error

    def wait(self, work: dist.Work, device: str = "cpu") -> None:
        """Wait for an exchange; of CUDA tensors, make the stream wait for it.

        Raises:
            ProcessError: a rank has failed or was lost, or did not come within the timeout; it is named.
        """
        if device != "cpu":
            work.wait()
            return
        limit = time.monotonic() + self.timeout
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError as error:
                if work.is_completed():  # otherwise the slice is over
                    raise self.monitor.explain(error) from error
            if (failed := self.monitor.error()) is not None:
                raise failed
            if time.monotonic() > limit:
                raise ProcessError(f"The other processes did not come to an exchange within {self.timeout:.0f} s, though they are alive.", where=f"rank {self.rank} of {self.world}",
                                   do="Does code of yours do on one rank what it does not on the others? Otherwise raise the timeout: strategy=DDP(timeout=…).")

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums of numbers over all ranks, in fp64, bitwise equal on all of them."""
        tensor = torch.tensor(values, dtype=torch.float64)
        self.wait(self.start_sum(tensor))
        return tensor.tolist()

    def largest(self, tensor: Tensor) -> None:
        """The largest over all ranks, element by element, in place."""
        self.wait(self.started(lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control if tensor.device.type == "cpu" else None, async_op=True)), tensor.device.type)

    def from_first(self, tensor: Tensor) -> None:
        """Rank 0's values, in place."""
        self.wait(self.started(lambda: dist.broadcast(tensor, 0, group=self.control if tensor.device.type == "cpu" else None, async_op=True)), tensor.device.type)

    def share(self, value: Any) -> list[Any]:
        """Plain data (what `fxopt.train.plain.encode` takes) of every rank, by rank. Two exchanges if it is longer than a kilobyte."""
        payload = _packed(value)
        slot = torch.zeros(_SLOT, dtype=torch.uint8)
        slot[:_HEAD] = torch.tensor([len(payload)]).view(torch.uint8)
        slot[_HEAD : _HEAD + len(payload)] = payload[: _SLOT - _HEAD]
        slots = self._all(slot)
        lengths = [int(each[:_HEAD].view(torch.int64)) for each in slots]
        found = [each[_HEAD:] for each in slots]
        if max(lengths) > _SLOT - _HEAD:
            found = self._all(torch.nn.functional.pad(payload, (0, max(lengths) - len(payload))))
        return [_unpacked(each[:length]) for each, length in zip(found, lengths, strict=True)]

    def _all(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        self.wait(self.started(lambda: dist.all_gather(found, tensor, group=self.control, async_op=True)))
        return found

    def gather(self, value: Any) -> list[Any] | None:
        """Plain data of every rank on rank 0, which needs memory for all of it; None elsewhere."""
        payload = _packed(value)
        lengths = self.share(len(payload))
        found = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths] if self.rank == 0 else None
        padded = torch.nn.functional.pad(payload, (0, max(lengths) - len(payload)))
        self.wait(self.started(lambda: dist.gather(padded, found, 0, group=self.control, async_op=True)))
        return None if found is None else [_unpacked(each[:length]) for each, length in zip(found, lengths, strict=True)]


def _packed(value: Any) -> Tensor:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(value, "$", tensors)).encode()
    # Copies: views of one storage (gradients in a bucket) are no tensors of a file of safetensors.
    held = safetensors.torch.save({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}) if tensors else b""
    return torch.frombuffer(bytearray(len(text).to_bytes(_HEAD, "little") + text + held), dtype=torch.uint8)


def _unpacked(payload: Tensor) -> Any:
    data = payload.numpy().tobytes()
    end = _HEAD + int.from_bytes(data[:_HEAD], "little")
    return decode(json.loads(data[_HEAD:end]), safetensors.torch.load(data[end:]) if end < len(data) else {})
