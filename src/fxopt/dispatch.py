"""Which captured program a call runs, and what happens when none covers it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch.utils import _pytree as pytree

from fxopt.errors import CallError, CaptureError
from fxopt.ir import regions
from fxopt.ir.capture import Call, capture, guards
from fxopt.ir.partition import min_cut, save_all
from fxopt.ir.program import Assumption, Program, ShapeGuards
from fxopt.passes import pipeline as pipelines
from fxopt.passes.pipeline import Pipeline
from fxopt.runtime import adapted, selfcheck
from fxopt.runtime.binding import Binding, live_state
from fxopt.runtime.region import RegionRunner

log = logging.getLogger("fxopt")
KINDS = 16  # kinds of call per model
SHAPES = 6  # captures per kind of call, when sizes turn out to be fixed
SEED = 20240229
_EDGE = "sizes of 0 or 1 are not covered"
_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, complex)


@dataclass(eq=False)
class Lowered:
    """A program after the passes, cut and bound. `binding` is made on first use and not copied."""

    program: Program
    schedule: regions.Schedule
    binding: Binding | None = None
    checks: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Entry:
    """One capture: the raw program, the sizes it covers, and what the passes made of it.

    `assuming` holds for calls that meet the program's assumptions (an attention mask of ones), `plain` for all.
    """

    raw: Program
    guards: ShapeGuards
    assumptions: tuple[Assumption, ...] | None = None
    assuming: Lowered | None = None
    plain: Lowered | None = None
    edges: set[Any] = field(default_factory=set)


class Dispatcher:
    """Captures a model call by kind, runs the passes, and picks the program for each call.

    Args:
        model: the original module; its parameters, hooks and blocks stay its own.
        passes: the pipeline.
        check: compare one step of model and graph after each capture.
        verify: None, or "values": every pass's promise is checked on the call's own values.
    """

    def __init__(self, model: nn.Module, passes: Pipeline, *, check: bool = True, verify: str | None = None) -> None:
        self.model, self.passes, self.check, self.verify = model, passes, check, verify
        self.entries: dict[Any, list[Entry]] = {}
        self.runners: dict[Any, RegionRunner] = {}
        self.installed = False
        self.last: Lowered | None = None
        self.notes: list[str] = []
        self._modules: list[nn.Module] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatcher:
        model = memo.get(id(self.model))
        if model is None:
            raise CallError("a dispatcher cannot be copied without its model", do="copy the Optimized")
        new = memo[id(self)] = Dispatcher(model, self.passes, check=self.check, verify=self.verify)
        new.entries = {key: [dataclasses.replace(e, assuming=_unbound(e.assuming), plain=_unbound(e.plain)) for e in found]
                       for key, found in self.entries.items()}
        new.runners, new.installed, new.notes = dict(self.runners), self.installed, list(self.notes)
        return new

    # -- the way of a call -----------------------------------------------------------------------------------------

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's return value, computed by a captured program."""
        call = Call.of(args, kwargs)
        lowered = self.find(call)
        self.last = lowered
        program = lowered.program
        assert lowered.binding is not None
        flat = lowered.binding([t if t.is_contiguous() else t.contiguous() for t in call.tensors])
        return pytree.tree_unflatten(flat, program.signature.out_spec)

    def find(self, call: Call) -> Lowered:
        """The program for a call; captured now if there is none yet."""
        key = self.key(call)
        shapes = tuple(tuple(t.shape) for t in call.tensors)
        reasons = []
        for entry in self.entries.get(key, ()):
            verdict = entry.guards.check(shapes)
            if verdict == "edge":
                verdict = self._edge(entry, call, shapes)
            if verdict == "ok":
                return self._variant(entry, call)
            reasons.append(verdict)
        return self._variant(self._capture(call, key, reasons), call)

    def key(self, call: Call) -> Any:
        """What a program is valid for, beside sizes: structure, constants, dtypes, modes, what takes a gradient."""
        constants = []
        for leaf in call.leaves:
            if leaf is not None and not isinstance(leaf[0], _PLAIN):
                raise CallError(f"an argument of type {type(leaf[0]).__name__} cannot be part of a captured call", where=type(self.model).__name__,
                                do="leave it out, or call `opt.model` (the original code, with the same weights) for such calls")
            constants.append(None if leaf is None else (type(leaf[0]), leaf[0]))
        if self._modules is None:
            self._modules = list(self.model.modules())
        kinds = tuple((t.dtype, t.dim(), t.device, t.requires_grad) for t in call.tensors)
        device = call.tensors[0].device.type if call.tensors else "cpu"
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (call.spec, tuple(constants), kinds, modes, tuple(m.training for m in self._modules),
                tuple((p.requires_grad, p.dtype) for p in self.model.parameters()))

    def _variant(self, entry: Entry, call: Call) -> Lowered:
        """The entry's program for a call: with the assumptions if the call meets them, else without. Made when first needed."""
        if entry.assumptions is None:
            entry.assumptions = _assumptions(self.passes, entry.raw)
        index = {node.name: i for i, node in enumerate(entry.raw.placeholders)}
        assuming = bool(entry.assumptions) and all(a.holds(call.tensors[index[a.leaf]]) for a in entry.assumptions)
        found = entry.assuming if assuming else entry.plain
        if found is None:
            found = self._lower(entry.raw, self.passes if assuming or not entry.assumptions else _without_assumptions(self.passes), call)
            if assuming:
                entry.assuming = found
            else:
                entry.plain = found
        if found.binding is None or found.binding.stale():
            found.binding = self._bind(found)
        return found

    def _bind(self, lowered: Lowered) -> Binding:
        policy = min_cut if "remat" in lowered.program.facts else save_all
        return Binding(self.model, lowered.program, lowered.schedule, policy, self.runners)

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
            log.info("fxopt: capturing %s again: %s", type(self.model).__name__, reasons[-1])
        if self.installed:
            self._refuse_unfrozen()
        with adapted.skeleton(self.model):
            raw = capture(self.model, call, exact=any(r.startswith(_EDGE) for r in reasons))
        self._note_hooks()
        entry = Entry(raw, guards(raw))
        small = self._small(entry, call) if self.check else call
        outcome = self._compare_original(raw, small) if self.check and not self.installed and self._changes_function() else None
        usable = self._variant(entry, call)
        if outcome is not None:
            usable.checks.append(f"capture against the model: {outcome}")
        if self.check:
            usable.checks.append(f"program against {'its graph' if self._changes_function() else 'the model'}: {self._compare_lowered(usable, small)}")
        self.entries.setdefault(self.key(call), []).append(entry)  # the passes may have changed what takes a gradient
        return entry

    def _lower(self, raw: Program, passes: Pipeline, call: Call) -> Lowered:
        if self.verify is not None:
            names = list(raw.slots)
            if self.installed:
                raise CallError("verify=\"values\" covers the first capture of a model whose weights are adapted",
                                do="optimize a fresh model to verify another kind of call")
            program = pipelines.run(passes, raw, verify=self.verify, inputs=call.tensors, state=live_state(self.model, names))
        else:
            program = pipelines.run(passes, raw)
        if adapted.install(self.model, program):
            self._modules = None
        self.installed = self.installed or any(slot.made is not None for slot in program.slots.values())
        schedule = regions.cut(program, regions.repeated_blocks(self.model))
        for reason in schedule.dissolved:
            self.note(f"not a region of its own: {reason}")
        return Lowered(program, schedule)

    def _changes_function(self) -> bool:
        """Whether a pass of the pipeline promises another function or other gradients than the model's."""
        return any(p.promise.values == "bounded" or p.promise.gradients == "declared" for p in self.passes)

    # -- checking --------------------------------------------------------------------------------------------------

    def _small(self, entry: Entry, call: Call) -> Call:
        """The call cut to its first two samples, if all its tensors have a batch and the program covers two: checks cost less."""
        sizes = {t.shape[0] if t.dim() else 0 for t in call.tensors}
        if len(sizes) != 1 or sizes.pop() <= 2:
            return call
        tensors = tuple(t.detach()[:2].clone().requires_grad_(t.requires_grad) for t in call.tensors)
        if entry.guards.check(tuple(tuple(t.shape) for t in tensors)) != "ok":
            return call
        flat = [o for o in self._peek(Call(call.spec, call.leaves, tensors)) if isinstance(o, torch.Tensor) and o.is_floating_point()]
        return Call(call.spec, call.leaves, tensors) if all(bool(o.isfinite().all()) for o in flat) else call

    def _peek(self, call: Call) -> list[Any]:
        """The model's flat outputs, with state and random state put back."""
        return selfcheck.outputs(self.model, lambda: self._original(call), call.tensors, SEED)

    def _original(self, call: Call) -> Any:
        args, kwargs = call.rebuild(call.tensors)
        return type(self.model).forward(self.model, *args, **kwargs)

    def _compare_original(self, raw: Program, call: Call) -> selfcheck.Outcome:
        state = live_state(self.model, list(raw.slots.keys() - raw.constants.keys()))
        return self._compare(lambda: self._original(call), lambda: raw.run(call.tensors, state), call, f"the captured graph of {type(self.model).__name__}")

    def _compare_lowered(self, lowered: Lowered, call: Call) -> selfcheck.Outcome:
        program, binding = lowered.program, lowered.binding
        assert binding is not None
        if self._changes_function():
            names = [n for n in program.slots if n not in program.constants and _read(program, n)]
            original = lambda: program.run(call.tensors, live_state(self.model, names))  # noqa: E731
        else:
            original = lambda: self._original(call)  # noqa: E731
        return self._compare(original, lambda: binding([t.contiguous() for t in call.tensors]), call, f"the optimized {type(self.model).__name__}")

    def _compare(self, original: Callable[[], Any], graph: Callable[[], Any], call: Call, what: str) -> selfcheck.Outcome:
        expected, found = (selfcheck.step(self.model, run, call.tensors, SEED) for run in (original, graph))
        return selfcheck.compare(self.model, expected, found, what, lambda: selfcheck.rounded(self.model, original, call.tensors, SEED))

    def _edge(self, entry: Entry, call: Call, shapes: Any) -> str:
        """A size of 0 or 1 where the capture assumed at least 2: proven by one comparison per pattern of such sizes."""
        pattern = tuple(tuple(size if size < 2 else -1 for size in shape) for shape in shapes)
        if pattern in entry.edges:
            return "ok"
        try:
            lowered = self._variant(entry, call)
            outcome = self._compare_lowered(lowered, call)
        except (CaptureError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            self.note(f"a call with sizes {pattern} is captured on its own: {first}")
            return f"{_EDGE} ({first})"
        entry.edges.add(pattern)
        lowered.checks.append(f"sizes of 0 or 1 {pattern}: {outcome}")
        return "ok"

    def _refuse_unfrozen(self) -> None:
        frozen: Iterable[str] = self.last.program.frozen if self.last is not None else ()
        for name, parameter in self.model.named_parameters():
            if name in frozen and parameter.requires_grad:
                raise CallError(f"{name} was given a gradient after a pass had frozen it", do="train it from the start: leave it out of the frozen set")

    def _note_hooks(self) -> None:
        blocks = set(regions.repeated_blocks(self.model)) | {""}
        for name, module in self.model.named_modules():
            if name not in blocks and (module._forward_hooks or module._forward_pre_hooks):
                self.note(f"forward hooks of {name} run during capture only: put them on a block, or ask for a value with a tap")

    def note(self, text: str) -> None:
        """Keep a sentence for the report, and log it once."""
        if text not in self.notes:
            self.notes.append(text)
            log.warning("fxopt: %s", text)


def _assumptions(passes: Pipeline, raw: Program) -> tuple[Assumption, ...]:
    """What the pipeline would assume of the inputs: its passes are run up to the last one that may assume something."""
    may = [i for i, p in enumerate(passes) if getattr(p, "assume", False)]
    if not may:
        return ()
    return pipelines.run(Pipeline(tuple(passes)[: may[-1] + 1]), raw).assumptions


def _read(program: Program, name: str) -> bool:
    return any(node.op == "get_attr" and node.target == name for node in program.graph.nodes)


def _unbound(lowered: Lowered | None) -> Lowered | None:
    return None if lowered is None else Lowered(lowered.program, lowered.schedule, None, list(lowered.checks))


def _without_assumptions(passes: Pipeline) -> Pipeline:
    """The same passes, asked not to assume anything of the inputs."""
    return Pipeline(tuple(dataclasses.replace(p, assume=False) if any(f.name == "assume" for f in dataclasses.fields(p)) else p for p in passes))
