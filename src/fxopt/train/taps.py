"""Values from the middle of a graph, logged while a run goes on. No module hooks: the program of the step is asked."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import torch.fx as fx
from torch import Tensor

from fxopt.errors import DataError
from fxopt.ir import meta
from fxopt.ir.capture import Call
from fxopt.ir.program import Program, Sample
from fxopt.runtime.binding import live_state
from fxopt.train.callbacks import Callback, State


def largest(value: Tensor) -> Tensor:
    """The largest absolute value."""
    return value.abs().amax()


class Taps(Callback):
    """Logs a number of named values every so many steps, as `tap/<name>`.

    The first batch of such a step is run through its program once more, before the step and with the step's random numbers, so the values are
    those of the step itself; a tapped step costs one forward more, every other nothing.

    Args:
        nodes: {name: pattern}: of a node of the program (`linear_3`), or of a module's path, whose last value is meant (`*layers.1.mlp`).
        every: steps between two. reduce: from a value to one number.

    Raises:
        DataError: when the run begins, the model is not optimized; at the first tap, a pattern matches nothing.
    """

    def __init__(self, nodes: Mapping[str, str], every: int = 1, reduce: Callable[[Tensor], Tensor] = largest) -> None:
        if every < 1:
            raise DataError(f"every={every}", where="Taps", do="at least 1")
        self.nodes, self.every, self.reduce = dict(nodes), every, reduce

    def on_setup(self, state: State, stage: str) -> None:
        if not callable(getattr(type(state.model), "prepare", None)):
            raise DataError(f"{type(state.model).__name__} has no program to tap.", where="Taps", do="Give `fxopt.optimize(model)` to the trainer.")

    def on_batch_start(self, state: State, batch: Any, index: int) -> None:
        if state.micro or state.step % self.every:
            return
        program = state.model.prepare(batch)  # type: ignore[operator]
        if program is None:
            raise DataError("The model runs in parts, which have programs of their own.", where="Taps", do="Optimize a part of it, or leave the taps out.")
        wanted = {node: name for name, pattern in self.nodes.items() for node in [self._find(program, pattern)]}
        given = Call.of((), dict(batch)) if isinstance(batch, Mapping) else Call.of(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), {})
        values = live_state(state.model.model, [name for name in program.slots if name not in program.constants])  # type: ignore[arg-type]
        held = {name: value.detach().clone() if program.slots[name].kind != "parameter" else value for name, value in values.items()}  # a graph may write buffers

        def see(node: fx.Node, value: Any, _: Mapping[fx.Node, Any]) -> None:
            if node in wanted and isinstance(value, Tensor):
                state.log(f"tap/{wanted[node]}", self.reduce(value.detach().float()))

        program.watch(Sample(tuple(tensor.detach() for tensor in given.tensors), held), see)

    def _find(self, program: Program, pattern: str) -> fx.Node:
        tensors = [node for node in program.graph.nodes if node.op == "call_function" and meta.tensor(node) is not None]
        by_name = [node for node in tensors if fnmatch.fnmatchcase(node.name, pattern)]
        by_path = [node for node in tensors if fnmatch.fnmatchcase(meta.provenance(node).path, pattern)]
        if not by_name and not by_path:
            paths = sorted({meta.provenance(node).path for node in tensors})
            raise DataError(f"No node and no module is matched by {pattern!r}.", where="Taps", do=f"The modules are {', '.join(paths[:6])}, ...; `opt.program.text()` shows the nodes.")
        return (by_name or by_path)[-1]
