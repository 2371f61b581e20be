"""The whole model on every process; gradients are summed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import DataError, ProcessError
from fxopt.train.signals import Stopped
from fxopt.train.strategies.buckets import Buckets
from fxopt.train.strategies.group import Processes, join
from fxopt.train.strategies.single import Single
from fxopt.train.task import changing_buffers


class DDP(Single):
    """Every rank holds the model and trains on its own batches; the gradients of what trains are added over all ranks.

    After each step everything that training changes is bitwise equal on all ranks: weights and optimizer states because all of them take
    the same gradients, and buffers (running means of batch norm) because they are averaged over the ranks that changed them
    (whole numbers: the largest). Within a step each rank normalizes with its own batch, as torch's DDP does.

    Args:
        timeout: seconds that one exchange may take while all ranks are alive. silence: seconds without a sign of life after which a rank
            counts as lost. joining: seconds to wait for the other processes at first. bucket: bytes of gradients that are exchanged
            together. overlap: exchange during the backward.

    Raises:
        ProcessError: no launcher has started several processes, or they did not meet.
    """

    name, lockstep = "ddp", False

    def __init__(self, *, timeout: float = 1800.0, silence: float = 60.0, joining: float = 300.0, bucket: int = 25 << 20, overlap: bool = True) -> None:
        if not (timeout > 0 and silence > 0 and joining > 0 and bucket > 0):
            raise DataError(f"timeout={timeout}, silence={silence}, joining={joining}, bucket={bucket}", where="DDP", do="All of them are above 0.")
        join(joining, timeout)
        self.processes = Processes(timeout, silence)
        self.rank, self.world = self.processes.rank, self.processes.world
        self.buckets = Buckets(self.processes.start_sum, self.processes.wait, bucket, overlap)
        self.known: dict[str, Tensor] = {}

    def setup(self, model: nn.Module) -> nn.Module:
        """See `Strategy`: what trains, and buffers that may change, become those of rank 0; the rest must be equal by checksum."""
        tensors = _tensors(model)
        self._equal("shape or dtype", {name: f"{list(tensor.shape)} {tensor.dtype} {tensor.requires_grad}" for name, tensor in tensors.items()})
        changing = changing_buffers(model)
        own = {name for name, tensor in tensors.items() if tensor.requires_grad or name in changing}
        self._equal("values", {name: _checksum(tensor) for name, tensor in tensors.items() if name not in own and not tensor.is_meta})
        with torch.no_grad():
            for name in (name for name in tensors if name in own):  # in the order of the model: a set has none
                whole = tensors[name].detach().contiguous()
                self.processes.from_first(whole)
                tensors[name].copy_(whole)
        self._remember(model)
        return model

    def _equal(self, what: str, mine: Mapping[str, str | int]) -> None:
        checks = self.processes.share(zlib.crc32(repr(sorted(mine.items())).encode()))
        if len(set(checks)) == 1:
            return
        first, *others = self.processes.share(dict(mine))
        rank, other = next((rank, other) for rank, other in enumerate(others, 1) if other != first)
        name = next(name for name in sorted({**first, **other}) if first.get(name) != other.get(name))
        raise ProcessError(f"The {what} of {name} differ between rank 0 ({first.get(name, 'absent')}) and rank {rank} ({other.get(name, 'absent')}).", where="the model",
                           do="Make the same model on every process: the same code, files and seed.")

    def backward(self, model: nn.Module, loss: Tensor, last: bool) -> None:
        """See `Strategy`."""
        if last:
            self.buckets.arm(model)
        loss.backward()

    def synchronize(self, model: nn.Module) -> None:
        """See `Strategy`."""
        self.buckets.finish(model)
        self._equal_buffers(model)

    @torch.no_grad()
    def _equal_buffers(self, model: nn.Module) -> None:
        held = changing_buffers(model)
        if not held:
            return
        changed = self.changed_buffers(model)
        numbers = self.reduce([float(name in changed) for name in held])
        for (name, tensor), number in zip(held.items(), numbers, strict=True):
            if not number:
                continue
            whole = tensor.detach().clone() if name in changed or not tensor.is_floating_point() else torch.zeros_like(tensor)
            if tensor.is_floating_point():
                self.processes.wait(self.processes.start_sum(whole), whole.device.type)
                whole /= number
            else:
                whole = whole.to(torch.uint8) if whole.dtype == torch.bool else whole
                self.processes.largest(whole)
            tensor.copy_(whole)
        self._remember(model)

    def _remember(self, model: nn.Module) -> None:
        self.known = {name: tensor.detach().clone() for name, tensor in changing_buffers(model).items()}

    def changed_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """See `Strategy`. Known from their values: torch's batch norm writes its running means past the version counters."""
        held = changing_buffers(model)
        if not held:
            return {}
        same = [(known := self.known.get(name)) is not None and known.shape == tensor.shape for name, tensor in held.items()]
        differ = torch.stack([(tensor != self.known[name]).any().cpu() if alike else torch.tensor(True) for (name, tensor), alike in zip(held.items(), same, strict=True)])
        return {name: tensor for (name, tensor), changed in zip(held.items(), differ.tolist(), strict=True) if changed}

    def reduce(self, values: Sequence[float]) -> list[float]:
        """See `Strategy`."""
        return self.processes.sums(values)

    def share(self, value: Any) -> list[Any]:
        """See `Strategy`."""
        return self.processes.share(value)

    def gather(self, value: Any) -> list[Any] | None:
        """See `Strategy`."""
        return self.processes.gather(value)

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """See `Strategy`."""
        super().load(model, state)
        self._remember(model)

    def barrier(self) -> None:
        """See `Strategy`."""
        self.processes.sums([0.0])

    def failed(self, error: BaseException) -> None:
        """See `Strategy`. A run that was stopped by a signal has stopped on all ranks."""
        if not isinstance(error, Stopped):
            self.processes.monitor.report(error)

    def close(self, model: nn.Module) -> None:
        """See `Strategy`."""
        self.buckets.close()
        self.processes.monitor.close()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _checksum(tensor: Tensor) -> int:
    """Tells a mistake (another file, another seed), not an attack: 32 bits."""
    return zlib.crc32(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else 0
