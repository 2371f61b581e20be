"""Weights, gradients and optimizer states in equal pieces on all processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxopt.errors import CallError, DataError
from fxopt.runtime.averages import BY_BLOCK
from fxopt.runtime.pieces import Ranks
from fxopt.runtime.sharding import Sharding, Unsharded
from fxopt.train.sharded import Piece, Spread
from fxopt.train.strategies.ddp import DDP


class FSDP(DDP):
    """Every rank holds a piece of each weight, stored codes included, and of the optimizer's state; a block is whole while it runs.

    Gradients are summed after every batch, since kept whole over an accumulated step they would be what is saved here. After the run every
    rank has the whole model again. Settings are `DDP`'s.

    Raises:
        DataError: the pipeline hoists frozen regions out of the step, whose weights are in pieces then.
    """

    name, lockstep = "fsdp", True

    sharding: Sharding | None = None

    def setup(self, model: nn.Module) -> nn.Module:
        """See `Strategy`."""
        super().setup(model)
        optimized = _optimized(model)
        if any(str(each).partition("(")[0] == "hoist" for module in optimized for each in module.dispatcher.passes):
            raise DataError("`hoist` keeps what leaves frozen regions, and does not run them; the weights of those are in pieces.", where="strategy fsdp", do="Leave the pass out, or use strategy ddp.")
        schedules = [(module.dispatcher.model, each.schedule) for module in optimized for each in module.dispatcher.lowered()]
        callers = dict.fromkeys([model, *optimized, *(module.dispatcher.model for module in optimized)])
        self.sharding = Sharding(model, list(callers), schedules, Ranks(self.rank, self.world, self._exchange))
        for module in optimized:
            module.dispatcher.weights = self.sharding
        return model

    def _exchange(self, begin: Callable[[], dist.Work], device: torch.device) -> None:
        self.processes.wait(self.processes.started(begin), device.type)

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module, last: bool) -> Iterator[None]:
        """See `Strategy`. What lies outside of blocks is whole inside, for steps of a module's own that do not call the module."""
        if self.sharding is None:  # an evaluation alone, of a whole model
            yield
            return
        self.sharding.before_model()
        try:
            yield
        finally:
            self.sharding.after_model()

    def backward(self, model: nn.Module, loss: Tensor, last: bool) -> None:
        """See `Strategy`."""
        assert self.sharding is not None
        loss.backward()
        self.sharding.end_backward()

    def synchronize(self, model: nn.Module) -> None:
        """See `Strategy`."""
        assert self.sharding is not None
        self.sharding.synchronize()
        self._equal_buffers(model)

    def clip_norm(self, parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
        """See `Strategy`: the root of the sum of the ranks' squares."""
        own = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = math.sqrt(self.reduce([float(own) ** 2])[0])
        whole = own.new_tensor(norm)
        if limit is not None and math.isfinite(norm) and norm + 1e-6 > limit:  # see Single
            nn.utils.clip_grads_with_norm_(parameters, limit, whole)
        return whole

    # -- whole tensors ---------------------------------------------------------------------------------------------------

    def each(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """See `Strategy`: block by block."""
        assert self.sharding is not None
        named = {id(tensor): name for name, tensor in super().each(model)}
        yield from ((name, tensor) for name, tensor in super().each(model) if self.sharding.piece_of(tensor) is None)
        for unit in self.sharding.units:
            unit.gather()
            yield from ((named[id(member.held)], member.whole.detach()) for member in unit.members)
            unit.end()

    def end(self, model: nn.Module) -> None:
        """See `Strategy`."""
        if self.sharding is not None:
            self.sharding.undo()
            self._forget(model)

    def close(self, model: nn.Module) -> None:
        """See `Strategy`. After an error the weights stay in pieces: their owners are gone, perhaps."""
        if self.sharding is not None:
            self.sharding.detach()
            self._forget(model)
        super().close(model)

    def _forget(self, model: nn.Module) -> None:
        self.sharding = None
        for module in _optimized(model):
            module.dispatcher.weights = Unsharded()

    # -- checkpoints -----------------------------------------------------------------------------------------------------

    def state(self, model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
        """See `Strategy`: this rank's pieces, and whole buffers."""
        return self.pieces(model, super().state(model, names))

    def pieces(self, model: nn.Module, state: Any) -> Any:
        """See `Strategy`."""
        assert self.sharding is not None
        held = {name: self.sharding.piece_of(parameter) for name, parameter in model.named_parameters()}
        named = {name: found for name, found in held.items() if found is not None}

        def marked(value: Any, key: str = "") -> Any:
            if isinstance(value, Tensor) and key in named and value.shape == named[key][1].held.shape:
                flat, member = named[key]
                return Piece(value, *flat.bounds(member), member.shape)
            if isinstance(value, Mapping):
                return {name: marked(item, str(name)) for name, item in value.items()}
            return type(value)(marked(item) for item in value) if isinstance(value, (list, tuple)) else value

        return marked(state)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See `Strategy`: what is laid out like a parameter is in pieces like it, other tensors are the rank's own."""
        state, numbered = optimizer.state_dict(), self._numbered(optimizer)

        def marked(number: int, name: str, value: Any) -> Any:
            flat, member = numbered[number]
            if not isinstance(value, Tensor) or not value.dim():
                return value
            return Piece(value, *flat.bounds(member), member.shape) if value.shape == member.held.shape and name not in BY_BLOCK else Piece(value)

        return {**state, "state": {number: {name: marked(number, name, value) for name, value in entry.items()} for number, entry in state["state"].items()}}

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """See `Strategy`.

        Raises:
            DataError: the state of a whole parameter (averages of 8 bits, in blocks) that is not laid out like it.
        """
        numbered = self._numbered(optimizer)
        # numbers, such as the count of steps: without a dimension, though the parameter has some
        counts = {"step"} | {name for number, entry in state["state"].items() for name, value in entry.items()
                             if isinstance(value, Tensor) and not value.dim() and len(numbered[int(number)][1].shape)}

        def mine(number: int, name: str, value: Any) -> Any:
            flat, member = numbered[number]
            if isinstance(value, Spread):
                return value.of(self.rank, self.world) if value.shape is None else value.read(*flat.bounds(member))
            if not isinstance(value, Tensor) or name in counts:
                return value
            if value.shape != member.shape:
                raise DataError(f"{name} of {member.name} is {list(value.shape)}, and the parameter {list(member.shape)}: it cannot be cut into pieces.", where="the optimizer's state",
                                do="Resume with the checkpoint's strategy, or train with averages of 32 bits.")
            return value.reshape(-1)[slice(*flat.bounds(member))]

        optimizer.load_state_dict({**state, "state": {number: {name: mine(int(number), name, value) for name, value in entry.items()} for number, entry in state["state"].items()}})

    def _numbered(self, optimizer: torch.optim.Optimizer) -> dict[int, Any]:
        assert self.sharding is not None
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found = {number: self.sharding.piece_of(parameter) for number, parameter in enumerate(parameters)}
        if any(each is None for each in found.values()):
            raise CallError("the optimizer has a parameter that is none of the model's", where="strategy fsdp", do="make it from `model.parameters()`")
        return found

    def localized(self, model: nn.Module, state: Any) -> Any:
        """See `Strategy`."""
        assert self.sharding is not None
        named = {name: found for name, parameter in model.named_parameters() if (found := self.sharding.piece_of(parameter)) is not None}

        def mine(value: Any, key: str = "") -> Any:
            if key in named and isinstance(value, (Spread, Tensor)) and tuple(value.shape or ()) == tuple(named[key][1].shape):
                flat, member = named[key]
                return value.read(*flat.bounds(member)) if isinstance(value, Spread) else value.reshape(-1)[slice(*flat.bounds(member))]
            if isinstance(value, Mapping):
                return {name: mine(item, str(name)) for name, item in value.items()}
            return type(value)(mine(item) for item in value) if isinstance(value, (list, tuple)) else value

        return mine(state)

    def load(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """See `Strategy`.

        Raises:
            DataError: the shapes are not the model's.
        """
        assert self.sharding is not None
        for name, parameter in model.named_parameters():
            found = self.sharding.piece_of(parameter)
            if found is not None and name in state and tuple(state[name].shape) != tuple(found[1].shape):
                raise DataError(f"{name} is {list(state[name].shape)} in the checkpoint and {list(found[1].shape)} in the model.", do="Resume with the same model, or begin anew in another folder.")
        super().load(model, self.localized(model, state))


def _optimized(model: nn.Module) -> list[Any]:
    """The optimized models in a module, which may be one."""
    return [module for module in model.modules() if callable(getattr(type(module), "prepare", None)) and hasattr(module, "dispatcher")]
