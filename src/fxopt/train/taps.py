"""Values from the middle of a graph, and gradients of such, logged while a run goes on. No module hooks: the graph gives them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from fxopt.errors import DataError
from fxopt.ir.taps import LOW, Tap
from fxopt.runtime.tapping import Tapping
from fxopt.train.callbacks import Callback, State


class Taps(Callback):
    """Logs a number of named values every so many steps, as `tap/<name>`; a histogram as `tap/<name>/2^k`, the number of elements of that size,
    for the k that there are.

    The first batch of such a step runs through a variant of its program that has the values as further outputs (see `fxopt.ir.taps`): the step
    is the same bit for bit, and only the regions with a tap are compiled anew, once. All other batches run the program itself.

    Args:
        nodes: {name: tap}; a text is the pattern of a `Tap`: of a node of the program (`linear_3`), or of a module's path, whose last value is
            meant (`*layers.1.mlp`). every: steps between two.

    Raises:
        DataError: when the run begins: no part of the model is optimized, or several are. CallError, at the first tap: a pattern matches nothing.
    """

    def __init__(self, nodes: Mapping[str, str | Tap], every: int = 1) -> None:
        if every < 1:
            raise DataError(f"every={every}", where="Taps", do="at least 1")
        if whole := [name for name, tap in nodes.items() if isinstance(tap, Tap) and tap.reduce == "value"]:
            raise DataError(f"{whole[0]} is a whole value; a row of the log holds numbers.", where="Taps", do="Reduce it, or use `opt.tap` in a callback of yours.")
        self.nodes, self.every = dict(nodes), every
        self.tapping: Tapping | None = None
        self.model: Any = None
        self.open = ExitStack()

    def on_setup(self, state: State, stage: str) -> None:
        found = [module for module in state.model.modules() if callable(getattr(type(module), "tap", None))]
        if len(found) != 1:
            raise DataError(f"{len(found)} parts of {type(state.model).__name__} have a program to tap; one is wanted.", where="Taps", do="Give `fxopt.optimize(model)` to the trainer.")
        self.model, self.tapping = found[0], None

    def on_batch_start(self, state: State, batch: Any, index: int) -> None:
        if not state.micro and state.step % self.every == 0:
            self.tapping = self.open.enter_context(self.model.tap(self.tapping or self.nodes))

    def on_batch_end(self, state: State, batch: Any, index: int, loss: Tensor) -> None:
        if self.tapping is None or state.step % self.every or state.micro > 1:
            return
        self.open.close()
        for name, value in self.tapping.values().items():
            if value.dim():
                for k, count in enumerate(value.tolist()):
                    if count:
                        state.log(f"tap/{name}/2^{LOW + k}", count)
            else:
                state.log(f"tap/{name}", value)

    def on_exception(self, state: State, error: BaseException) -> None:
        self.open.close()
