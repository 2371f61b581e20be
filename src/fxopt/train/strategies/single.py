"""One process: nothing is exchanged."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.train.sharded import wholes


class Single:
    """One process."""

    name, rank, world, lockstep = "single", 0, 1, False

    def setup(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def backward(self, model: nn.Module, loss: Tensor, last: bool) -> None:
        """Plain autograd."""
        loss.backward()

    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Nothing is exchanged anyway."""
        return contextlib.nullcontext()

    def synchronize(self, model: nn.Module) -> None:
        """The gradients are whole as they are."""

    def changed_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """None that must be made equal."""
        return {}

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
            held[name].copy_(wholes(value))

    def each(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The model's own tensors."""
        return ((name, tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()] if not tensor.is_meta)

    def pieces(self, model: nn.Module, state: Any) -> Any:
        """Nothing is in pieces."""
        return state

    def localized(self, model: nn.Module, state: Any) -> Any:
        """Whole tensors."""
        return wholes(state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Its own."""
        return optimizer.state_dict()

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """See `Strategy`."""
        optimizer.load_state_dict(wholes(state))

    def share(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def barrier(self) -> None:
        """Nobody to wait for."""

    def end(self, model: nn.Module) -> None:
        """The model is as it should be."""

    def failed(self, error: BaseException) -> None:
        """Nobody to tell."""

    def close(self, model: nn.Module) -> None:
        """Nothing was changed."""
