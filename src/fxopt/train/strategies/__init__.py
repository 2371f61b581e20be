"""Where a run's processes meet: the few points at which several of them differ from one, and the strategies by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fxopt.errors import DataError
from fxopt.train.strategies.ddp import DDP
from fxopt.train.strategies.environment import place
from fxopt.train.strategies.fsdp import FSDP
from fxopt.train.strategies.single import Single


class Strategy(Protocol):
    """How a model is trained on the processes of a run. `Single` is the one for one process.

    The loop weighs each batch's loss by its share in the items of the whole step, over all ranks, so gradients are *summed* over ranks.
    Every method that exchanges something is called by all ranks, in the same order: what the loop does next (another step, a
    validation, a checkpoint, the end) is decided from numbers that `reduce` has made equal.

    Attributes:
        name: for messages and `Trainer(strategy=)`. rank, world: this process, and how many there are.
        lockstep: weights are in pieces; the forward of the model exchanges something itself (sharded weights are gathered), so that every rank must run as many
            forwards and backwards as the others. Where a rank has no batch, the loop then gives it one of another time, with weight 0.
    """

    name: str
    rank: int
    world: int
    lockstep: bool

    def setup(self, model: nn.Module) -> nn.Module:
        """Wrap or shard the model, and make its weights equal on all ranks; what comes back is called by the loop. Before the optimizers
        are made, from `model.parameters()`.

        Raises:
            ProcessError: the ranks have different models.
        """

    def no_sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward of one batch. `last`: of a step, on all ranks."""

    def backward(self, model: nn.Module, loss: Tensor, last: bool) -> None:
        """The backward of one batch of a step, whose gradients are added to those of the step. Before the last one nothing need be
        exchanged; the last one may begin to exchange. A rank without a batch calls none."""

    def synchronize(self, model: nn.Module) -> None:
        """After the last backward of a step, on every rank, also one that had no batch: afterwards each gradient is the sum over all
        ranks, and None only if it is None on all. Buffers that the forward has changed are made equal."""

    def changed_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """The buffers, by name, that this rank has changed since they were last made equal by `setup`, `synchronize` or `load`: a
        checkpoint in the middle of a step keeps them for each rank."""

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, bitwise equal on all of them: of items, losses, tokens, metrics, votes."""

    def clip_norm(self, parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
        """The norm of all gradients, 0-dim, over all ranks and equal on them; scaled down in place to `limit` if it is larger. After
        `synchronize`."""

    def state(self, model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """Parameters and buffers of these names, for a checkpoint: whole, or in `Piece`s, of which each rank writes its own. Ranks other than
        0 may give no whole ones."""

    def load(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Write parameters and buffers back, from whole tensors or a checkpoint's pieces (`Spread`), of however many ranks."""

    def each(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and buffer with its name, whole, on every rank; a tensor need not outlive the iteration. To the end, on all ranks."""

    def pieces(self, model: nn.Module, state: Any) -> Any:
        """A state of plain data, in which a tensor under the name of a parameter that lies in pieces, and of its present shape, is such a
        `Piece` too (the averages of the weights)."""

    def localized(self, model: nn.Module, state: Any) -> Any:
        """What `pieces` was given, from whole tensors or pieces of however many ranks, as this rank holds it."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Its `state_dict`, with `Piece`s."""

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Take over such a state, from whole tensors or a checkpoint's pieces, of however many ranks.

        Raises:
            DataError: a part of it can only be read by as many ranks as wrote it.
        """

    def share(self, value: Any) -> list[Any]:
        """Plain data (what `fxopt.train.plain.encode` takes) of every rank, by rank, on all ranks."""

    def gather(self, value: Any) -> list[Any] | None:
        """As `share`, but on rank 0 only; None elsewhere."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def end(self, model: nn.Module) -> None:
        """The run went well, and the last checkpoint is written: every rank gets the whole model."""

    def failed(self, error: BaseException) -> None:
        """This rank's run ends with an error of its own: tell the others, without waiting for them."""

    def close(self, model: nn.Module) -> None:
        """The run is over, in whatever way: take hooks and wrappers off the model. Exchanges nothing."""


GROUP = "fxopt.strategies"
"""The entry-point group in which packages name strategies of their own: a callable without arguments that gives a `Strategy`."""

STRATEGIES: dict[str, Callable[[], Strategy]] = {"single": Single, "ddp": DDP, "fsdp": FSDP}
"""Those of fxopt, by name. Each is made once for every `fit`, `validate`, …, so it takes over a process group that is there."""


def strategy_of(name: str) -> Strategy:
    """The strategy of a name; "auto" is ddp where a launcher has started several processes, and single elsewhere.

    Raises:
        DataError: there is none of this name. ProcessError: it cannot be had here.
    """
    if name == "auto":
        found = place()
        name = "ddp" if found is not None and found.world > 1 else "single"
    if name in STRATEGIES:
        return STRATEGIES[name]()
    others = entry_points(group=GROUP)
    if name in others.names:
        return others[name].load()()
    raise DataError(f"There is no strategy {name!r}.", where="the trainer", do=f"There are auto, {', '.join([*STRATEGIES, *sorted(others.names)])}; or give an object of the protocol fxopt.train.strategies.Strategy.")
