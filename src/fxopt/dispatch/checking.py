"""One step of the original against a captured program: which call it is made on, and what is compared."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn

from fxopt.dispatch.lowered import Entry, Lowered, edges, reads
from fxopt.dispatch.reference import SEED, Reference
from fxopt.errors import CaptureError
from fxopt.ir import meta
from fxopt.ir.capture import Call
from fxopt.ir.edit import random
from fxopt.ir.facts import Installed
from fxopt.ir.program import Program
from fxopt.passes.pipeline import Pipeline
from fxopt.runtime import adapted, compression, selfcheck
from fxopt.runtime.binding import live_state, routing, unrouted
from fxopt.runtime.recompute import recomputed
from fxopt.runtime.smaller import smaller

EDGE = "sizes of 0 or 1 are not covered"


class Checking:
    """The part of a dispatcher that compares."""

    model: nn.Module
    passes: Pipeline
    installed: Installed | None

    def _variant(self, entry: Entry, call: Call, check: Reference | None = None) -> Lowered:
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Keep a sentence for the report."""
        raise NotImplementedError

    def _changes_function(self) -> bool:
        """Whether a pass of the pipeline promises another function, other gradients or other outputs than the model's."""
        return any(p.promise.values == "bounded" or "declared" in (p.promise.gradients, p.promise.outputs) for p in self.passes)

    def _reference(self, entry: Entry, call: Call) -> Reference:
        """The model's own step on a part of the call that the program covers; on the call itself where checks are off."""
        sequences = not any(getattr(p, "budget", None) is not None for p in self.passes)  # a plan holds for one length
        return Reference(self.model, self._original, call, smaller(entry.raw, entry.guards, call, sequences) if self.check else ())

    def _original(self, call: Call, tensors: Sequence[torch.Tensor]) -> Any:
        args, kwargs = call.rebuild(tensors)
        with recomputed() if self.installed is not None else contextlib.nullcontext(), routing(unrouted):  # torch.func has no rule for what it does
            return type(self.model).forward(self.model, *args, **kwargs)

    def _compare_original(self, raw: Program, reference: Reference, wanted: frozenset[str]) -> str:
        """The captured program against the original code, before adapters come."""
        expected, call = reference.take(wanted), reference.call
        state = live_state(self.model, list(raw.slots.keys() - raw.constants.keys()))
        found = selfcheck.step(self.model, lambda given: raw.run(given, state), call.tensors, SEED, wanted)
        return f"{self._compare(expected, found, lambda given: self._original(call, given), call, f'the captured graph of {self._name}', wanted)}"

    def _compare_lowered(self, lowered: Lowered, reference: Reference, own: bool, wanted: frozenset[str] | None = None) -> str:
        """The bound program against the original code, whose weights are the adapted ones.

        Args:
            own: right after the first capture, which was compared with the model. What cannot be compared with it now is compared with
                the program's own graph: that needs no dense copy of stored weights.
            wanted: where a step of the model is taken for this, the parameters whose gradients are compared.
        """
        program, binding = lowered.program, lowered.binding
        assert binding is not None
        drops = program.training and any(getattr(p, "dropout", 0.0) for p in self.passes)  # on activations: no weight shows it
        drops = drops or any(p.promise.outputs == "declared" for p in self.passes)
        draws = any(p.promise.random == "declared" for p in self.passes) and any(random(node) for node in program.nodes)  # others than the model
        known = None if drops or draws or any(p.promise.values == "bounded" for p in self.passes) else reference.adapted()
        alone = known is None and (drops or own)
        if known is not None:
            wanted = frozenset(known.gradients)

        def original(given: Sequence[torch.Tensor]) -> Any:
            if alone:
                names = [n for n in program.slots if n not in program.constants and reads(program, n)]
                return program.run(given, live_state(self.model, names))
            with adapted.only(self.model, wanted) if wanted is not None else contextlib.nullcontext():
                return self._original(call, given)

        expected = known
        if expected is None:
            expected = selfcheck.step(self.model, original, reference.call.tensors, SEED, wanted) if alone or reference.taken else reference.take(wanted)
        call = reference.call
        found = selfcheck.step(self.model, lambda given: compression.exact(binding, [t.contiguous() for t in given]), call.tensors, SEED, wanted)
        expected = dataclasses.replace(expected, gradients={name: grad for name, grad in expected.gradients.items() if name in found.gradients})
        computed = meta.float_dtypes(program.nodes) - meta.float_dtypes(list(program.history())[-1].nodes)
        outcome = self._compare(expected, found, original, call, f"the optimized {self._name}", wanted, computed)
        return f"program against {'its graph' if alone else 'the model'}: {outcome}"

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _compare(self, expected: selfcheck.Step, found: selfcheck.Step, original: selfcheck.Run, call: Call, what: str, wanted: frozenset[str] | None,
                 computed: Iterable[torch.dtype] = ()) -> selfcheck.Outcome:
        return selfcheck.compare(self.model, expected, found, what, lambda: selfcheck.rounded(self.model, original, call.tensors, SEED, wanted), computed)

    def _edge(self, entry: Entry, call: Call, shapes: Any) -> str:
        """A size of 0 or 1 where the capture assumed at least 2: proven by one comparison per pattern of such sizes."""
        pattern = edges(shapes)
        if pattern in entry.edges:
            return "ok"
        try:
            lowered = self._variant(entry, call)
            outcome = self._compare_lowered(lowered, Reference(self.model, self._original, call), own=False)
        except (CaptureError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            self.note(f"a call with sizes {pattern} is captured on its own: {first}")
            return f"{EDGE} ({first})"
        entry.edges.add(pattern)
        lowered.checks.append(f"sizes of 0 or 1 {pattern}: {outcome}")
        return "ok"
