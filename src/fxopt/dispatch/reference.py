"""The side of a comparison that is right: one step of the model itself, on the smallest part of a call that says something."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn

from fxopt.ir.capture import Call
from fxopt.runtime import adapted, selfcheck

SEED = 20240229


class Reference:
    """A step of a model, taken when it is first asked for.

    Args:
        model: the module; on it the step leaves no trace.
        run: (call, tensors) to the model's return value.
        call: the call that is to be proven.
        parts: smaller ones of the same kind, cheapest first. The first is taken on which all numbers are finite and no loss is zero.
    """

    def __init__(self, model: nn.Module, run: Callable[[Call, Sequence[torch.Tensor]], Any], call: Call, parts: Iterable[Call] = ()) -> None:
        self.model, self.run, self._call, self._parts = model, run, call, parts
        self._step: selfcheck.Step | None = None

    @property
    def taken(self) -> bool:
        """Whether there is a step, of the model as it was then."""
        return self._step is not None

    @property
    def call(self) -> Call:
        """What the step was taken on; if there is none yet, one without gradients finds it."""
        if self._step is None:
            self.take(frozenset())
            self._step = None
        return self._call

    def take(self, wanted: Container[str] | None) -> selfcheck.Step:
        """The step, with the gradients of these parameters (None: of all that learn)."""
        for part in itertools.chain(self._parts, [self._call]):
            step = selfcheck.step(self.model, lambda given, part=part: self.run(part, given), part.tensors, SEED, wanted)
            if part is self._call or usable(step.outputs):
                break
        self._call, self._parts, self._step = part, (), step
        return step

    def adapted(self) -> selfcheck.Step | None:
        """The same step of the model with the adapters that it has been given since, if they change no value yet; else None, and the step
        has to be taken anew. The gradients of their factors follow from those of the weights that they stand beside."""
        if self._step is None:
            return None
        found = adapted.pulled_back(self.model, self._step.gradients)
        return None if found is None else selfcheck.Step(self._step.outputs, found, self._step.buffers)


def usable(outputs: list[Any]) -> bool:
    """Whether a step says something: all numbers finite, and no loss that is zero."""
    found = [o for o in outputs if isinstance(o, torch.Tensor) and o.is_floating_point()]
    return all(bool(o.isfinite().all()) for o in found) and all(float(o) != 0.0 for o in found if o.dim() == 0)
