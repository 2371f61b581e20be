"""The way of a model's call: through a program of the whole, or through the original code and the programs of its parts."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn as nn

from fxopt.dispatch.lowered import Entry, Lowered
from fxopt.dispatch.failure import Failure
from fxopt.dispatch.parts import Parts, WholeDispatcher
from fxopt.dispatch.reference import SEED, usable
from fxopt.errors import CallError, CaptureError, DifferentiatedTwice, FxoptError, PassError, Untraceable
from fxopt.ir import meta
from fxopt.ir.capture import Call
from fxopt.passes.lora import Lora, check_targets
from fxopt.passes.pipeline import Pipeline
from fxopt.runtime import adapted, selfcheck
from fxopt.runtime.binding import routing
from fxopt.runtime.flops import Share, flops
from fxopt.runtime.garbage import only_own
from fxopt.runtime.python_random import kept_random
from fxopt.runtime.smaller import first_samples, on


class RootDispatcher(WholeDispatcher):
    """A model's dispatcher. A kind of call that cannot be captured whole runs in parts.

    Attributes:
        parts: the parts, None if all kinds of call so far were captured whole.
        in_parts: the kinds of call that run in parts, and what stood against the whole.
        partial: whether the latest call ran in parts; `last` is None then.
    """

    def __init__(self, model: nn.Module, passes: Pipeline, *, check: bool = True, verify: str | None = None) -> None:
        super().__init__(model, passes, check=check, verify=verify)
        self.parts: Parts | None = None
        self.in_parts: dict[Any, Untraceable] = {}
        self.chosen: set[str] = set()
        self.partial = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RootDispatcher:
        new = super().__deepcopy__(memo)
        assert isinstance(new, RootDispatcher)
        new.in_parts, new.chosen, new.partial = dict(self.in_parts), set(self.chosen), self.partial
        if self.parts is not None:
            new.parts = self.parts.copied(new, memo)
        return new

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's return value; without adapters by the original code, bit for bit."""
        if not self.enabled:
            return type(self.model).forward(self.model, *args, **kwargs)
        call = Call.of(args, kwargs)
        self.prepare(call)
        if self.last is not None:
            return self.run(self.last, call)
        if self.tapping is not None:
            raise CallError("this call runs in parts, which have programs of their own: there is no whole program to tap", where=self._said(), do="optimize the part, and tap that")
        assert self.parts is not None
        with routing(self.parts.route):
            return type(self.model).forward(self.model, *args, **kwargs)

    def prepare(self, call: Call) -> None:
        """Capture a call's kind if it is new. `last` is its program, or None if it runs in parts.

        Raises:
            CaptureError: neither the whole nor a part of it can be captured.
        """
        with self.weights.shown():
            self._prepare(call)

    def _prepare(self, call: Call) -> None:
        if self.parts is not None:
            self.refresh()
        known = self.in_parts.get(self.key(call)[:-1]) if self.parts is not None else None
        if known is not None:
            self.example = Call(call.spec, call.leaves, tuple(t.detach() for t in call.tensors))
            if self.active is not None and self.fresh:  # another adapter
                with self.weights.stand_ins(), only_own():
                    self._capture_parts(call, known)
            self.last, self.partial = None, True
            return
        notes = len(self.notes)
        try:
            self.last, self.partial = self.find(call), False
        except Untraceable as error:
            del self.notes[notes:]  # they are of a capture that did not come about
            with self.weights.stand_ins(), only_own():
                self._capture_parts(call, error)
            self.last, self.partial = None, True
            self.example = Call(call.spec, call.leaves, tuple(t.detach() for t in call.tensors))

    def lowered(self) -> list[Lowered]:
        """All that was captured so far, of the whole and of parts."""
        own = [each for entries in self.entries.values() for entry in entries for each in (entry.assuming, entry.plain) if each is not None]
        return own + ([each for _, each in self.parts.programs()] if self.parts is not None else [])

    def forget(self) -> None:
        """Drop all programs."""
        super().forget()
        self.parts = None
        self.in_parts.clear()

    def _attempt(self, call: Call, exact: bool, share: bool = True) -> Entry:
        if self.parts is not None:
            self.installed = adapted.installed(self.model)  # parts may have installed more since
        return super()._attempt(call, exact, share)

    # -- capturing in parts --------------------------------------------------------------------------------------------

    def _capture_parts(self, call: Call, error: Untraceable) -> None:
        """Capture the parts of one kind of call, and compare a step with the original's."""
        planned = next((p for p in self.passes if getattr(p, "budget", None) is not None), None)
        if planned is not None:
            raise FxoptError(f"{planned}: a plan needs the whole step in one graph, and {error.what}", where=error.where,
                             do=f"{error.do}; or leave the budget out: the model then runs in parts") from error
        fresh, named = self.fresh, [name for name, _ in self.model.named_parameters()]
        for pass_ in self.passes if fresh else ():
            if isinstance(pass_, Lora):
                check_targets(pass_, named, "the model is captured in parts")
        if self.parts is None:
            shares, total = self._counted(call, error)
            self.parts = Parts(self, Failure.of(error, ""), shares, total)
        try:
            self._find_parts(call, error, self.parts)
        except Exception:
            if not any(True for _ in self.parts.programs()):
                self.parts = None
            raise
        self.installed, self._watched = adapted.installed(self.model), None
        if fresh:
            self._settle(self.parts)
        self.in_parts[self.key(call)[:-1]] = Untraceable(error.what, where=error.where, do=error.do)  # without its traceback
        if self.check:
            self._check_parts(call, self.parts)

    def _counted(self, call: Call, error: Untraceable) -> tuple[dict[str, Share], int]:
        """What each module multiplies. Also the proof that the original code runs: else its own error says more."""
        try:
            found: list[Any] = []
            self._step(call, lambda given: found.append(flops(self.model, lambda: self._original(call, given))))
        except Exception as own:
            raise CaptureError(f"{type(self.model).__name__} fails on this call by itself: {type(own).__name__}: {own}", where=error.where,
                               do="give inputs that the original code takes") from own
        if self.installed is not None:  # what adapted weights cost is no measure of the model
            return {}, 0
        shares, total = found[0]
        return {name: shares[module] for name, module in self.model.named_modules() if module in shares}, total

    def _find_parts(self, call: Call, error: Untraceable, parts: Parts) -> None:
        parts.finding = True
        try:
            self._parted_step(call, parts, frozenset())
        finally:
            parts.finding = False
        parts.complete()
        if not any(lowered.program.slots for _, lowered in parts.programs()):
            tried = "; ".join(str(f) for c in parts.candidates.values() for f in list(dict.fromkeys(c.failures.values()))[:1])
            raise CaptureError(f"{error.what}; and no part of it that has parameters can be captured", where=error.where,
                               do=f"{error.do}{f' (tried: {tried[:600]})' if tried else ''}") from error

    def _settle(self, parts: Parts) -> None:
        """What passes must do in at least one part; what they freeze is frozen everywhere."""
        programs = list(parts.programs())
        for pass_ in self.passes:
            if isinstance(pass_, Lora):
                check_targets(pass_, [weight.name for *_, weight in adapted.weights_of(self.model)], "only parts that are captured take adapters")
            records = [record for _, lowered in programs for record in lowered.program.log if record.text == pass_.text()]
            if pass_.must_fire and not any(record.rewrites for record in records):
                why = list(dict.fromkeys(note for record in records for note in record.notes))
                raise PassError(f"{pass_} changed nothing in any part: {'; '.join(why[:4]) or 'there is none'}", do="change its arguments, or take it out of the pipeline")
        if self.active is not None:
            adapted.activate(self.model, self.active)
            self.chosen.add(self.active)
            factors = {id(p) for module, leaf, weight in adapted.weights_of(self.model) for name in weight.adapters
                       for p in adapted.factors(module, leaf, name).values()}
            for parameter in self.model.parameters():
                if id(parameter) not in factors:
                    parameter.requires_grad_(False)

    # -- running and checking ------------------------------------------------------------------------------------------

    def _routed(self, call: Call, given: Any, parts: Parts) -> Any:
        args, kwargs = call.rebuild(given)
        with routing(parts.route):
            return type(self.model).forward(self.model, *args, **kwargs)

    def _step(self, call: Call, run: selfcheck.Run, wanted: frozenset[str] | None = frozenset()) -> selfcheck.Step:
        with kept_random():
            return selfcheck.step(self.model, run, call.tensors, SEED, wanted)

    def _parted_step(self, call: Call, parts: Parts, wanted: frozenset[str] | None) -> selfcheck.Step:
        """A step in parts. Whether the Python code between them writes into their results, or differentiates their gradients, is seen here."""
        try:
            return self._step(call, lambda given: self._routed(call, given, parts), wanted)
        except DifferentiatedTwice:
            parts.twice = True
            self.note("the code around the parts differentiates their gradients: their graphs run operator by operator under autograd, which saves no memory")
        except RuntimeError as error:
            if parts.separate or "inplace" not in str(error):
                raise
            parts.separate = True
            self.note("the code around the parts writes into what they return: results are copied")
        return self._parted_step(call, parts, wanted)

    def _check_parts(self, call: Call, parts: Parts) -> None:
        """One whole step: the original code on the adapted weights against the original code and the parts' programs."""
        programs = [lowered.program for _, lowered in parts.programs()]
        if any(program.training for program in programs) and any(getattr(p, "dropout", 0.0) for p in self.passes):
            parts.checks.append("the whole step was not compared: an adapter's dropout acts in graphs only; each part was compared without it")
            return

        def original(given: Any) -> Any:
            with kept_random():
                return self._original(call, given)

        tried, expected = call, None
        small = first_samples(call)
        if small is not None:
            with contextlib.suppress(RuntimeError, ValueError, IndexError):  # code that takes one batch size only
                expected = self._step(tried := small, original, None)
        if expected is None or not usable(expected.outputs):
            tried, expected = call, self._step(call, original, None)
        try:
            found = self._parted_step(tried, parts, None)
        except RuntimeError as error:
            raise CaptureError(f"a step in parts fails: {error}", where=type(self.model).__name__, do="run the model as it is") from error
        dtypes = {d for p in programs for d in meta.float_dtypes(p.nodes) - meta.float_dtypes(list(p.history())[-1].nodes)}

        outcome = selfcheck.compare(self.model, expected, found, f"{type(self.model).__name__} in parts",
                                    lambda: selfcheck.rounded(self.model, original, tried.tensors, SEED), dtypes)
        parts.checks.append(f"a whole step in parts against the model: {outcome}{on(tried, call)}")
