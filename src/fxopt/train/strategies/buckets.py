"""Gradients added over all ranks, a bucket at a time, while the backward goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import ProcessError


@dataclass
class _Bucket:
    """Parameters of one dtype and device whose gradients are exchanged together.

    Attributes:
        waiting: how many of them the present backward has given no gradient yet.
        flat: their gradients one after the other, then a 1 for each that has one and a 0 for each that has none. work: the exchange.
        absent: (place, parameter, its part of `flat`) of those without a gradient on this rank.
    """

    parameters: list[nn.Parameter]
    waiting: int = 0
    flat: Tensor | None = None
    work: Any = None
    absent: list[tuple[int, nn.Parameter, Tensor]] | None = None


class Buckets:
    """The gradients of a module's trainable parameters.

    Buckets are begun in one order on all ranks, that of the parameters from the last to the first (about that of the backward), each as
    soon as all its gradients are there and those before it were begun: a gradient that is missing on one rank delays, and never
    mixes up or blocks. Which parameters have a gradient anywhere travels with the gradients, so that nothing must be found out before.

    Args:
        begin: starts to add a tensor over all ranks in place. wait: for it, on a kind of device. size: bytes of a bucket, at most, but for
            a larger parameter. overlap: begin during the backward; False: all after it.
    """

    def __init__(self, begin: Callable[[Tensor], Any], wait: Callable[[Any, str], None], size: int, overlap: bool) -> None:
        self.begin, self.wait, self.size, self.overlap = begin, wait, size, overlap
        self.buckets: list[_Bucket] = []
        self.names: dict[nn.Parameter, str] = {}
        self.where: dict[nn.Parameter, _Bucket] = {}
        self.hooks: list[Any] = []
        self.seen: set[nn.Parameter] = set()
        self.next = 0
        self.armed = False

    def arm(self, module: nn.Module) -> None:
        """The next backward is the last of a step: begin a bucket when it is complete."""
        self._cover(module)
        for bucket in self.buckets:
            bucket.waiting = len(bucket.parameters)
        self.seen.clear()
        self.next, self.armed = 0, self.overlap

    def finish(self, module: nn.Module) -> None:
        """Begin what was not begun, and wait for all of it. Gradients are parts of the buckets' memory from then on.

        Raises:
            ProcessError: see `Processes.wait`.
        """
        if not self.armed:  # no batch on this rank, or no overlap
            self._cover(module)
            self.next = 0
        self.armed = False
        for bucket in self.buckets[self.next :]:
            self._begin(bucket)
        self.next = 0
        for bucket in self.buckets:
            assert bucket.flat is not None and bucket.absent is not None
            self.wait(bucket.work, bucket.flat.device.type)
            # Read only where this rank lacks a gradient: on a GPU it waits for the device.
            present = bucket.flat[-len(bucket.parameters) :].tolist() if bucket.absent else []
            for place, parameter, part in bucket.absent:
                parameter.grad = part if present[place] else None
            bucket.flat = bucket.work = bucket.absent = None

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()
        self.buckets, self.hooks, self.where, self.names, self.armed = [], [], {}, {}, False

    def _cover(self, module: nn.Module) -> None:
        """Make buckets of what trains now: a schedule may freeze and unfreeze."""
        names = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
        if names.keys() == self.names.keys():
            return
        self.close()
        self.names = names
        filling: dict[tuple[torch.dtype, torch.device], tuple[_Bucket, int]] = {}
        for parameter in reversed(names):
            key, bytes_ = (parameter.dtype, parameter.device), parameter.numel() * parameter.element_size()
            bucket, used = filling.get(key, (None, 0))
            if bucket is None or used + bytes_ > self.size:
                bucket, used = _Bucket([]), 0
                self.buckets.append(bucket)
            bucket.parameters.append(parameter)
            filling[key] = bucket, used + bytes_
            self.where[parameter] = bucket
            if self.overlap:
                self.hooks.append(parameter.register_post_accumulate_grad_hook(self._has_gradient))

    def _has_gradient(self, parameter: nn.Parameter) -> None:
        if not self.armed:
            return
        bucket = self.where[parameter]
        if parameter in self.seen:
            if bucket.flat is not None:
                raise ProcessError("A gradient came twice in one backward, the second time after it was sent.", where=self.names[parameter],
                                   do="A reentrant checkpoint does this: give it use_reentrant=False, or take strategy=DDP(overlap=False).")
            return
        self.seen.add(parameter)
        bucket.waiting -= 1
        while self.next < len(self.buckets) and not self.buckets[self.next].waiting:
            self._begin(self.buckets[self.next])
            self.next += 1

    def _begin(self, bucket: _Bucket) -> None:
        parameters = bucket.parameters
        first, number = parameters[0], sum(parameter.numel() for parameter in parameters)
        bucket.flat = torch.empty(number + len(parameters), dtype=first.dtype, device=first.device)
        *parts, present = bucket.flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
        bucket.absent = []
        for place, (parameter, part) in enumerate(zip(parameters, parts, strict=True)):
            part, gradient = part.view(parameter.shape), parameter.grad
            if gradient is None:
                part.zero_()
                bucket.absent.append((place, parameter, part))
                continue
            if gradient.layout != torch.strided:
                raise ProcessError(f"The gradient is {gradient.layout}; only dense ones are added over processes.", where=self.names[parameter], do="Make the embedding with sparse=False.")
            part.copy_(gradient)
            parameter.grad = part  # the old memory is free at once: a step needs one bucket more, not all gradients twice
        missing = {place for place, _, _ in bucket.absent}
        present.copy_(torch.tensor([float(place not in missing) for place in range(len(parameters))]))
        bucket.work = self.begin(bucket.flat)
