"""Where a run's processes meet: the few points at which several of them differ from one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Strategy(Protocol):
    """How a model is trained on the processes of a run. `Single` is the one for one process.

    The loop weighs each batch's loss by its share in the items of the whole step, over all ranks, so gradients are *summed* over ranks.
    """

    name: str
    rank: int
    world: int

    def setup(self, model: nn.Module) -> nn.Module:
        """Wrap or shard the model; what comes back is called by the loop. Before the optimizers are made."""

    def backward(self, model: nn.Module, loss: Tensor, last: bool) -> None:
        """The backward of one batch of a step. Before the last one ranks need not exchange gradients."""

    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of one batch: nothing is exchanged before the last of a step."""

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, equal on all of them: of items, losses, tokens, metrics."""

    def clip_norm(self, parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
        """The norm of all gradients, 0-dim, over all ranks; scaled down in place to `limit` if it is larger."""

    def state(self, model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole parameters and buffers of these names, for a checkpoint."""

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Write whole parameters and buffers back."""

    def gather(self, value: Any) -> list[Any] | None:
        """Plain data of every rank, on rank 0; None elsewhere."""

    def barrier(self) -> None:
        """Wait for all ranks."""


class Single:
    """One process."""

    name, rank, world = "single", 0, 1

    def setup(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def backward(self, model: nn.Module, loss: Tensor, last: bool) -> None:
        """Plain autograd."""
        loss.backward()

    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Nothing is exchanged anyway."""
        return contextlib.nullcontext()

    def reduce(self, values: Sequence[float]) -> list[float]:
        """The values themselves."""
        return list(values)

    def clip_norm(self, parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
        """See `Strategy`."""
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        # Up to the limit torch multiplies every gradient by 1 (its factor is limit / (norm + 1e-6), at most 1): left out, 60 us a step.
        if limit is not None and math.isfinite(value := float(norm)) and value + 1e-6 > limit:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def state(self, model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """The model's own tensors."""
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: held[name].detach() for name in names}

    @torch.no_grad()
    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copies in place."""
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, value in state.items():
            held[name].copy_(value)

    def gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def barrier(self) -> None:
        """Nobody to wait for."""
