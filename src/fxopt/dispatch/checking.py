"""One step of the original against a captured program: which call it is made on, and what is compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn

from fxopt.dispatch.lowered import Entry, Lowered, edges, reads
from fxopt.errors import CaptureError
from fxopt.ir import meta
from fxopt.ir.capture import Call
from fxopt.ir.facts import Installed
from fxopt.ir.program import Program
from fxopt.passes.pipeline import Pipeline
from fxopt.runtime import adapted, compression, selfcheck
from fxopt.runtime.binding import live_state, routing, unrouted
from fxopt.runtime.recompute import recomputed
from fxopt.runtime.smaller import smaller

SEED = 20240229
EDGE = "sizes of 0 or 1 are not covered"


class Checking:
    """The part of a dispatcher that compares."""

    model: nn.Module
    passes: Pipeline
    installed: Installed | None

    def _variant(self, entry: Entry, call: Call, check: Call | None = None) -> Lowered:
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Keep a sentence for the report."""
        raise NotImplementedError

    def _changes_function(self) -> bool:
        """Whether a pass of the pipeline promises another function, other gradients or other outputs than the model's."""
        return any(p.promise.values == "bounded" or "declared" in (p.promise.gradients, p.promise.outputs) for p in self.passes)

    def _small(self, entry: Entry, call: Call, sequences: bool) -> Call:
        """A part of the call on which the model computes finite numbers and a loss, if the program covers it: checks cost less."""
        for part in smaller(entry.raw, entry.guards, call, sequences):
            flat = [o for o in self._peek(part) if isinstance(o, torch.Tensor) and o.is_floating_point()]
            if all(bool(o.isfinite().all()) for o in flat) and all(float(o) != 0.0 for o in flat if o.dim() == 0):
                return part
        return call

    def _peek(self, call: Call) -> list[Any]:
        """The model's flat outputs, with state and random state put back."""
        return selfcheck.outputs(self.model, lambda given: self._original(call, given), call.tensors, SEED)

    def _original(self, call: Call, tensors: Sequence[torch.Tensor]) -> Any:
        args, kwargs = call.rebuild(tensors)
        with recomputed() if self.installed is not None else contextlib.nullcontext(), routing(unrouted):  # torch.func has no rule for what it does
            return type(self.model).forward(self.model, *args, **kwargs)

    def _compare_original(self, raw: Program, call: Call, wanted: frozenset[str]) -> selfcheck.Outcome:
        state = live_state(self.model, list(raw.slots.keys() - raw.constants.keys()))
        return self._compare(lambda given: self._original(call, given), lambda given: raw.run(given, state), call,
                             f"the captured graph of {type(self.model).__name__}", wanted)

    def _compare_lowered(self, lowered: Lowered, call: Call, fresh: bool, wanted: frozenset[str] | None = None) -> selfcheck.Outcome:
        """The bound program against the original code, whose weights are the adapted ones.

        `fresh`: right after the first capture, which was compared with the original before adapters came, the program's own
        graph is the reference: it needs no dense copy of the weights.
        """
        program, binding = lowered.program, lowered.binding
        assert binding is not None
        names = [n for n in program.slots if n not in program.constants and reads(program, n)]

        drops = program.training and any(getattr(p, "dropout", 0.0) for p in self.passes)  # on activations: no weight shows it
        drops = drops or any(p.promise.outputs == "declared" for p in self.passes)

        def original(given: Sequence[torch.Tensor]) -> Any:
            if drops or fresh and self._changes_function():
                return program.run(given, live_state(self.model, names))
            with adapted.only(self.model, wanted) if wanted is not None else contextlib.nullcontext():
                return self._original(call, given)

        return self._compare(original, lambda given: compression.exact(binding, [t.contiguous() for t in given]), call, f"the optimized {type(self.model).__name__}", wanted,
                             meta.float_dtypes(program.nodes) - meta.float_dtypes(list(program.history())[-1].nodes))

    def _compare(self, original: selfcheck.Run, graph: selfcheck.Run, call: Call, what: str, wanted: frozenset[str] | None = None,
                 computed: Iterable[torch.dtype] = ()) -> selfcheck.Outcome:
        expected, found = (selfcheck.step(self.model, run, call.tensors, SEED, wanted) for run in (original, graph))
        return selfcheck.compare(self.model, expected, found, what, lambda: selfcheck.rounded(self.model, original, call.tensors, SEED, wanted), computed)

    def _edge(self, entry: Entry, call: Call, shapes: Any) -> str:
        """A size of 0 or 1 where the capture assumed at least 2: proven by one comparison per pattern of such sizes."""
        pattern = edges(shapes)
        if pattern in entry.edges:
            return "ok"
        try:
            lowered = self._variant(entry, call)
            outcome = self._compare_lowered(lowered, call, fresh=False)
        except (CaptureError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            self.note(f"a call with sizes {pattern} is captured on its own: {first}")
            return f"{EDGE} ({first})"
        entry.edges.add(pattern)
        lowered.checks.append(f"sizes of 0 or 1 {pattern}: {outcome}")
        return "ok"
