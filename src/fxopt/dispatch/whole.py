"""Which captured program a call runs, and what happens when none covers it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn

from fxopt.dispatch.checking import EDGE, Checking
from fxopt.dispatch.lowered import Entry, Lowered, adapter_of, edges, last_assuming, unbound, without_assumptions, writes_input
from fxopt.dispatch.reference import SEED, Reference
from fxopt.errors import CallError, CaptureError, Untraceable
from fxopt.ir import regions
from fxopt.ir.capture import Call, capture, guards
from fxopt.ir.program import Program, Sample
from fxopt.passes import pipeline as pipelines
from fxopt.passes.pipeline import Pipeline
from fxopt.runtime import adapted, compression, saving, selfcheck
from fxopt.runtime.attributes import Changed, changed
from fxopt.runtime.binding import Binding, live_state, routing, unrouted
from fxopt.runtime.garbage import only_own
from fxopt.runtime.install import install
from fxopt.runtime.python_random import kept_random
from fxopt.runtime.region import RegionRunner
from fxopt.runtime.sharding import Unsharded
from fxopt.runtime.smaller import on
from fxopt.runtime.tapping import Tapping
from fxopt.runtime.watched import Watched
from fxopt.torch_private import pytree

log = logging.getLogger("fxopt")
KINDS = 16  # kinds of call per model
SHAPES = 6  # captures per kind of call, when sizes turn out to be fixed
_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, complex)


class Dispatcher(Checking):
    """Captures a model call by kind, runs the passes, and picks the program for each call.

    Args:
        model: the original module; its parameters, hooks and blocks stay its own.
        passes: the pipeline.
        check: compare one step of model and graph after each capture.
        verify: None, or "values": every pass's promise is checked on the call's own values.

    Attributes:
        weights: whether the model has its weights, or pieces of them.
    """

    weights: Unsharded = Unsharded()

    def __init__(self, model: nn.Module, passes: Pipeline, *, check: bool = True, verify: str | None = None) -> None:
        self.model, self.check, self.verify = model, check, verify
        self.active = adapter_of(passes)
        self.pipelines: dict[str | None, Pipeline] = {self.active: passes}
        self.enabled = True
        self.entries: dict[Any, list[Entry]] = {}
        self.runners: dict[Any, RegionRunner] = {}
        self.installed = adapted.installed(model)
        self.last: Lowered | None = None
        self.example: Call | None = None  # the latest one
        self.notes: list[str] = []
        self.tapping: Tapping | None = None
        self.counted: frozenset[str] = frozenset()  # numbers that the code changes at every call
        self._watched: Watched | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        model = memo.get(id(self.model))
        if model is None:
            raise CallError("a dispatcher cannot be copied without its model", do="copy the Optimized")
        new = memo[id(self)] = type(self)(model, self.passes, check=self.check, verify=self.verify)
        new.pipelines, new.active, new.enabled = dict(self.pipelines), self.active, self.enabled
        new.entries = self.entries_unbound()
        new.runners, new.notes, new.counted = dict(self.runners), list(self.notes), self.counted
        return new

    def entries_unbound(self) -> dict[Any, list[Entry]]:
        """The captures, for another model of the same structure."""
        return {key: [dataclasses.replace(e, assuming=unbound(e.assuming), plain=unbound(e.plain)) for e in found] for key, found in self.entries.items()}

    @property
    def passes(self) -> Pipeline:
        """The pipeline of the active adapter."""
        return self.pipelines[self.active]

    @property
    def pending(self) -> bool:
        """Whether the passes will add parameters that do not exist yet."""
        known = self.installed.adapters if self.installed is not None else {}
        return self.active is not None and self.active not in known

    def activate(self, adapter: str) -> None:
        """Make this adapter the one that calls run with; its program is made when first needed."""
        if adapter != self.active:
            self.active = adapter
            adapted.activate(self.model, adapter)

    # -- the way of a call -----------------------------------------------------------------------------------------

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's return value, computed by a captured program; without adapters by the original code, bit for bit."""
        if not self.enabled:
            return type(self.model).forward(self.model, *args, **kwargs)
        call = Call.of(args, kwargs)
        self.last = self.find(call)
        return self.run(self.last, call)

    def run(self, lowered: Lowered, call: Call) -> Any:
        """The return value of a call, computed by a program that covers it."""
        assert lowered.binding is not None
        tensors = self._inputs(lowered, call)
        flat = lowered.binding(tensors) if self.tapping is None else self.tapping.run(self.model, lowered.program, self.runners, tensors)
        return pytree.tree_unflatten(flat, lowered.program.signature.out_spec)

    @staticmethod
    def _inputs(lowered: Lowered, call: Call) -> list[torch.Tensor]:
        """The call's tensors as the graph takes them: contiguous."""
        if lowered.writes and (len({t.untyped_storage().data_ptr() for t in call.tensors}) < len(call.tensors) or not all(t.is_contiguous() for t in call.tensors)):
            raise CallError("the model writes into its inputs, and they share memory or are not contiguous", do="pass clones")
        return [t if t.is_contiguous() else t.contiguous() for t in call.tensors]

    def find(self, call: Call) -> Lowered:
        """The program for a call; captured now if there is none yet."""
        self.refresh()
        key = self.key(call)
        lowered = self._covering(call, key)
        self.watched.hooks(self.note)
        self.example = Call(call.spec, call.leaves, tuple(t.detach() for t in call.tensors))  # one that was refused is none
        return lowered

    @property
    def watched(self) -> Watched:
        """What the programs take for granted of the model's Python side."""
        if self._watched is None:
            self._watched = self._watch()
        return self._watched

    def _watch(self) -> Watched:
        return Watched(self.model, ignored=self.counted)

    def refresh(self) -> None:
        """Forget all programs if a module of the model was replaced."""
        if self._watched is not None and self._watched.stale():
            if self.installed is not None:
                raise CallError(f"{self._watched.stale()} was replaced after adapters were added", where=type(self.model).__name__,
                                do="put it back, or optimize the changed model afresh (`opt.merge()` gives a plain one)")
            self.note(f"{self._watched.stale()} was replaced: the model is captured again")
            self.forget()

    def forget(self) -> None:
        """Drop all programs."""
        self.entries.clear()
        self.runners.clear()
        self._watched = None

    def _covering(self, call: Call, key: Any) -> Lowered:
        shapes = tuple(tuple(t.shape) for t in call.tensors)
        reasons = []
        for entry in self.entries.get(key, ()):
            verdict = entry.guards.check(shapes)
            if verdict == "edge":
                with self.weights.stand_ins(), only_own():
                    verdict = self._edge(entry, call, shapes)
            if verdict == "ok":
                return self._variant(entry, call)
            reasons.append(verdict)
        with self.weights.stand_ins(), only_own():
            entry = self._capture(call, key, reasons)
        return self._variant(entry, call)

    def key(self, call: Call) -> Any:
        """What a program is valid for, beside sizes: structure, constants, dtypes, modes, what takes a gradient."""
        constants = []
        for leaf in call.leaves:
            if leaf is not None and not isinstance(leaf[0], _PLAIN):
                raise CallError(f"an argument of type {type(leaf[0]).__name__} cannot be part of a captured call", where=type(self.model).__name__,
                                do="leave it out, or call `opt.model` (the original code, with the same weights) for such calls")
            plain = None if leaf is None else leaf[0]
            constants.append((type(plain), repr(plain) if isinstance(plain, (float, complex)) else plain))  # -0.0 is not 0.0, nan is nan
        kinds = tuple((t.dtype, t.dim(), t.device, t.requires_grad) for t in call.tensors)
        device = call.tensors[0].device.type if call.tensors else "cpu"
        if device == "meta":
            raise CallError("the call's tensors are on the meta device, where nothing is computed", where=type(self.model).__name__, do="move model and inputs to a device")
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return call.spec, tuple(constants), kinds, modes, self.watched.attributes(), self.watched.parameters()

    def _variant(self, entry: Entry, call: Call, check: Reference | None = None) -> Lowered:
        """The entry's program for a call: with the assumptions if the call meets them, else without. Made when first needed.
        With `check`, the capture is compared with the model on that call before weights are adapted."""
        if entry.assumptions is None:
            last = last_assuming(self.passes)
            entry.begun = self.passes, pipelines.run(Pipeline(tuple(self.passes)[:last]), entry.raw) if last else entry.raw
            entry.assumptions = entry.begun[1].assumptions
        assuming = False
        if entry.assumptions:  # else the nodes of the graph are not walked through: this is on the way of every call
            index = {node.name: i for i, node in enumerate(entry.raw.placeholders)}
            assuming = all(a.holds(call.tensors[index[a.leaf]]) for a in entry.assumptions)
        found = entry.assuming if assuming else entry.plain
        if found is None:
            with self.weights.stand_ins(), only_own():
                found = self._lower(entry, self.passes if assuming or not entry.assumptions else without_assumptions(self.passes), call, check)
            self.weights.accept(self.model, found.schedule)
            if assuming:
                entry.assuming = found
            else:
                entry.plain = found
        if found.binding is None:
            found.binding = self._bind(found)
        return found

    def _bind(self, lowered: Lowered) -> Binding:
        return Binding(self.model, lowered.program, lowered.schedule, saving.of(lowered.program), self.runners)

    # -- capturing -------------------------------------------------------------------------------------------------

    def _capture(self, call: Call, key: Any, reasons: list[str]) -> Entry:
        known = self.entries.get(key, [])
        if len(known) >= SHAPES:
            raise CallError(f"{SHAPES} captures of this kind of call do not cover it: {reasons[-1]}", where=type(self.model).__name__,
                            do="the model's code fixes sizes; use a few fixed sizes, or pad to them")
        if not known and len(self.entries) >= KINDS:
            raise CallError(f"{KINDS} kinds of call were captured already", where=type(self.model).__name__,
                            do="a constant argument changes at every call: pass it as a tensor")
        if known:
            self.note(f"captured again: {reasons[-1]}")
        if self.installed is not None:
            self._refuse_unfrozen()
        if any(t.is_nested for t in call.tensors):
            raise CallError("a nested tensor cannot be part of a captured call", where=type(self.model).__name__, do="pad it and pass the lengths or a mask, or call `opt.model`")
        shapes = tuple(tuple(t.shape) for t in call.tensors)
        try:
            entry = self._attempt(call, exact=any(r.startswith(EDGE) for r in reasons))
        except (CaptureError, RuntimeError):
            if not any(size < 2 for shape in shapes for size in shape):
                raise
            entry = self._attempt(call, exact=True)  # the code treats a size of 1 in its own way
        self.entries.setdefault(self.key(call), []).append(entry)  # the passes may have changed what takes a gradient
        return entry

    def _attempt(self, call: Call, exact: bool, share: bool = True) -> Entry:
        """Capture, check, optimize and check again. `exact`: for the call's own sizes of 0 and 1 alone. `share`: trace repeated blocks once."""
        self._refuse_counted()
        with adapted.skeleton(self.model), routing(unrouted), kept_random() as drawn, changed(self.model) as attributes:
            raw = self._raw(call, exact, share)
            if drawn():
                raise Untraceable(f"{type(self.model).__name__} draws random numbers from Python's or NumPy's generators, which a graph would fix",
                                  where=self._said(), do="draw them with torch, or outside of the model")
        if any(isinstance(value, Iterator) for value in raw.outputs):
            raise Untraceable(f"{type(self.model).__name__} returns an iterator, whose code runs after the call", where=self._said(), do="return a list or a tuple")
        if attributes.numbers:
            self.counted, self._watched = self._counted_on(call), None
            self._refuse_counted()
        if attributes.others:
            self.note(f"{', '.join(sorted(attributes.others)[:3])}{' and more' if len(attributes.others) > 3 else ''}: set by the model's code, and not when its graph runs: "
                      "return what is read after a call")
        raw = raw.replace(facts=raw.facts | self._facts())
        self._accept(raw)
        entry = Entry(raw, guards(raw))
        shapes = tuple(tuple(t.shape) for t in call.tensors)
        verdict = entry.guards.check(shapes)
        if verdict not in ("ok", "edge"):
            raise CaptureError(f"the captured graph does not cover the call that it was captured from: {verdict}", where=type(self.model).__name__,
                               do="the model's code fixes a size (with len() or int()): use x.shape, or call with at least two samples")
        installed = self.installed
        try:
            self._prove(entry, call, edge=verdict == "edge")
        except (CaptureError, RuntimeError) as error:
            if not share or self.installed is not installed or not self._shared():
                raise
            self.note(f"what is alike is traced one by one, since one traced for all failed: {str(error).splitlines()[0]}")
            return self._attempt(call, exact, share=False)
        return entry

    def _raw(self, call: Call, exact: bool, share: bool) -> Program:
        """The program of a call before any pass."""
        return capture(self.model, call, exact=exact, share=share, note=self.note)

    def _refuse_counted(self) -> None:
        """Code that counts its calls stays Python, for any kind of call: what it counts is read where it does not count, too."""
        if self.counted:
            raise Untraceable(f"{type(self.model).__name__} changes {', '.join(sorted(self.counted)[:3])} at every call, which a graph would not", where=self._said(),
                              do="keep the number in a buffer, change it outside of the model, or pass it as an argument")

    def _counted_on(self, call: Call) -> frozenset[str]:
        """The numbers on modules that the code changes at every call, and not only at the first of a kind."""
        found = Changed(self.model)

        def twice(given: Sequence[torch.Tensor]) -> None:
            self._original(call, given)
            found.begin()
            self._original(call, given)
            found.end()

        selfcheck.step(self.model, twice, call.tensors, SEED, frozenset())
        return frozenset(found.numbers)

    def _shared(self) -> bool:
        """Whether some of the latest capture stands for more than it was traced from."""
        return bool(regions.repeated_blocks(self.model))

    def _facts(self) -> frozenset[Any]:
        """What passes must know of the model."""
        return frozenset() if self.installed is None else frozenset({self.installed})

    def _accept(self, raw: Program) -> None:
        """Raise if a program as captured may not stand for its module."""

    def _said(self) -> str:
        """The module's name in messages."""
        return type(self.model).__name__

    def _prove(self, entry: Entry, call: Call, edge: bool) -> None:
        """Make the entry's program for a call, with the checks that are due."""
        fresh, prove = self.installed is None, self.check or edge
        changed = fresh and self._changes_function()
        reference = self._reference(entry, call)
        usable = self._variant(entry, call, reference if prove and changed else None)
        if prove:
            # where a size is 0 or 1 the original code is the reference, or the same proof is due when such a call comes
            kinds = selfcheck.kinds(self.model) if changed and edge else None  # all gradients were compared with the capture's
            usable.checks.append(self._compare_lowered(usable, reference, fresh and changed and not edge, kinds) + on(reference.call, call))
            usable.checks += compression.checked(usable.binding, reference.call.tensors)
            if edge:
                entry.edges.add(edges(tuple(tuple(t.shape) for t in call.tensors)))

    def _lower(self, entry: Entry, passes: Pipeline, call: Call, check: Reference | None) -> Lowered:
        raw, begun = entry.raw, entry.begun
        if self.verify is not None and self.installed is not None:
            raise CallError("verify=\"values\" covers the first capture of a model whose weights are adapted",
                            do="optimize a fresh model to verify another kind of call")
        sample = Sample(call.tensors, live_state(self.model, list(raw.slots.keys() - raw.constants.keys()))) if self.installed is None else None
        if begun is not None and begun[0] is passes and self.verify is None and self.installed is None:
            program = pipelines.run(Pipeline(tuple(passes)[last_assuming(passes):]), begun[1], sample=sample)
        else:
            program = pipelines.run(passes, raw, verify=self.verify, sample=sample)
        del sample  # it holds the dense weights, which installing frees
        checks = []
        if check is not None:
            checks.append(f"capture against the model: {self._compare_original(raw, check, selfcheck.learning(program))}{on(check.call, call)}")
        if install(self.model, program):
            self._watched, self.installed = None, adapted.installed(self.model)
            if self.active is not None:
                adapted.activate(self.model, self.active)
        schedule = regions.cut(program, regions.repeated_blocks(self.model))
        for reason in schedule.dissolved:
            self.note(f"not a region of its own: {reason}")
        return Lowered(program, schedule, writes=any(writes_input(node) for node in program.nodes), checks=checks)

    def _refuse_unfrozen(self) -> None:
        frozen: Iterable[str] = self.last.program.frozen if self.last is not None else ()
        for name, parameter in self.model.named_parameters():
            if name in frozen and parameter.requires_grad:
                raise CallError(f"{name} was given a gradient after a pass had frozen it", do="train it from the start: leave it out of the frozen set")

    def note(self, text: str) -> None:
        """Keep a sentence for the report, and log it once."""
        if text not in self.notes:
            self.notes.append(text)
            log.warning("fxopt: %s", text)
