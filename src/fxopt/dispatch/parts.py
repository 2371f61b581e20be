"""A model whose code as a whole cannot be traced: its largest parts that can are captured, and the rest stays Python.

The parts are found by one run of the original code. A module whose call cannot be captured runs its own code, and its children are
tried when that code calls them; so each part is captured from a real call, in the grad mode and the autocast state that it comes in.
Afterwards the original code of the rest runs as ever, and on that thread, for that call, a part's `forward` is its program
(`binding.routing`). A kind of call of a part that cannot be captured runs the part's own code, and the report says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch.autograd.graph import saved_tensors_hooks

from fxopt.dispatch.failure import Failure
from fxopt.dispatch.likeness import Group
from fxopt.dispatch.lowered import Lowered, writes_input
from fxopt.dispatch.whole import Dispatcher
from fxopt.errors import CallError, CaptureError, LowerError, Untraceable
from fxopt.ir.capture import Call, canonical_names, guards
from fxopt.ir.facts import Installed
from fxopt.ir.part import PartOf
from fxopt.ir.program import Program
from fxopt.passes.pipeline import Pipeline
from fxopt.runtime.binding import bind, routing, unrouted
from fxopt.runtime.flops import Share
from fxopt.runtime.region import differentiable_twice
from fxopt.runtime.sharding import Unsharded
from fxopt.runtime.shell import Shell
from fxopt.runtime.watched import Watched
from fxopt.torch_private import pytree


class WholeDispatcher(Dispatcher):
    """The dispatcher of a whole model, as its parts see it.

    Attributes:
        chosen: of a model in parts, the adapters whose weights are chosen.
    """

    chosen: set[str]

    @property
    def fresh(self) -> bool:
        """Whether the active adapter (or, without one, the pipeline) has still to choose its weights."""
        known = self.installed.adapters if self.installed is not None else {}
        return self.active is None or self.active not in known and self.active not in self.chosen


class PartDispatcher(Dispatcher):
    """The programs of one part. Names are those of the root; pipelines, the active adapter and compiled regions are the root's."""

    def __init__(self, root: WholeDispatcher, path: str, share: Share | None, group: Group) -> None:
        self.root, self.group, self.copied = root, group, False
        self._passes: tuple[Pipeline, Pipeline] | None = None  # the root's, and what is left of it here
        super().__init__(Shell.of(root.model, path), root.passes, check=root.check, verify=root.verify)
        self.path, self.runners = path, root.runners
        self.fact = PartOf(path, last=share is not None and not share.behind, first=share is not None and not share.before)

    def __deepcopy__(self, memo: dict[int, Any]) -> PartDispatcher:
        raise CallError("the programs of a part cannot be copied alone", do="copy the Optimized")

    @property
    def passes(self) -> Pipeline:
        """The root's pipeline, without passes that give results beside the loss other values: Python code may read those of a part."""
        whole = self.root.passes
        if self._passes is None or self._passes[0] is not whole:
            kept = tuple(p for p in whole if p.promise.outputs != "declared")
            for left in (p for p in whole if p not in kept):
                self.root.note(f"{left} is not applied to parts: what it leaves out, the code around them may read")
            self._passes = whole, whole if len(kept) == len(whole) else Pipeline(kept)
        return self._passes[1]

    @property
    def active(self) -> str | None:  # type: ignore[override]
        """The root's active adapter."""
        return self.root.active

    @active.setter
    def active(self, adapter: str | None) -> None:
        pass  # Dispatcher.__init__ sets it; the root keeps it

    @property
    def weights(self) -> Unsharded:  # type: ignore[override]
        """The root's."""
        return self.root.weights

    def key(self, call: Call) -> Any:
        """As of any module; and which adapter is active, which may have no weight here."""
        key = super().key(call)
        return *key[:-1], (key[-1], self.active)

    def note(self, text: str) -> None:
        """Keep a sentence for the report, with the part's name."""
        self.root.note(f"{self.path}: {text}")

    def _raw(self, call: Call, exact: bool, share: bool) -> Program:
        """As captured, or moved here from a part that is alike."""
        if not call.tensors:
            raise Untraceable(f"{type(self.model).__name__} is called without tensors", where=self._said(), do="pass what it depends on as a tensor")
        kind, shapes = call_kind(self, call), tuple(tuple(t.shape) for t in call.tensors)
        covering = (p for p in self.group.program(self.path, kind) if guards(p).check(shapes) in ("ok", "edge"))
        found = next(covering, None) if share and not exact else None
        self.copied = found is not None
        if found is not None:
            return found
        part = self.model.get_submodule(self.path)
        with self.group.seen(self.model, part) as (watched, read):
            raw = super()._raw(call, exact, share)
        if not exact:
            self.group.give(self.path, part, kind, raw, watched, read)
        return raw

    def _shared(self) -> bool:
        return self.copied or super()._shared()

    def _watch(self) -> Watched:
        return Watched(self.model, self.path, ignored=self.counted)

    def _said(self) -> str:
        return f"module {self.path}"

    def _facts(self) -> frozenset[Any]:
        installed = self.installed
        if installed is None and self.active is not None and not self.root.fresh:  # the model's adapters are chosen: none comes late
            installed = Installed(frozenset(name for name, _ in self.model.named_parameters()), adapters={self.active: {}})
        return frozenset({self.fact}) if installed is None else frozenset({self.fact, installed})

    def _accept(self, raw: Program) -> None:
        """What Python code around a part could see beside its return value.

        Raises:
            Untraceable: it writes into its arguments, or reads a tensor of the model that is not its own.
        """
        writing = next((node for node in raw.nodes if writes_input(node)), None)
        if writing is not None:
            raise Untraceable(f"{type(self.model).__name__} writes into its arguments ({writing.name})", where=self._said(), do="write into a copy")
        state = {_memory(t): name for name, t in (*self.root.model.named_parameters(), *self.root.model.named_buffers())}
        for value in raw.constants.values():
            if isinstance(value, torch.Tensor) and value.numel() and (_memory(value) in state or not _memory(value) or value.requires_grad):
                raise Untraceable(f"{type(self.model).__name__} reads {state.get(_memory(value), 'a tensor of the model')}, which is not its own",
                                  where=self._said(), do="register it on the module too, or pass it as an argument")


class _Alike(Untraceable):
    """A module that is like this one could not be captured."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


@dataclass(eq=False)
class Candidate:
    """A module that Python code calls: captured, or tried and not.

    Attributes:
        failures: by kind of call.
        unkeyed: of calls that have no kind, since an argument can be no part of one.
        called: whether it was called at all.
    """

    path: str
    module: nn.Module
    dispatcher: PartDispatcher
    failures: dict[Any, Failure] = field(default_factory=dict)
    unkeyed: Failure | None = None
    called: bool = False

    @property
    def captured(self) -> bool:
        """Whether some kind of its calls is a program."""
        return bool(self.dispatcher.entries)

    @property
    def example(self) -> Call | None:
        """A call that a program covers."""
        return self.dispatcher.example if self.captured else None


class Parts:
    """The parts of one model.

    Args:
        root: the model's dispatcher.
        why: the failure of the whole.
        shares: what each module multiplies, by path, see `runtime.flops`; empty if it was not counted.
        total: FLOPs of the model's call.

    Attributes:
        sizes: numbers of elements of the model's parameters as they are at first, by name; `owned`: the names in each module.
    """

    def __init__(self, root: WholeDispatcher, why: Failure, shares: Mapping[str, Share], total: int) -> None:
        self.root, self.why, self.shares, self.total = root, why, shares, total
        self.names = {module: name for name, module in root.model.named_modules()}
        first = canonical_names(root.model)
        self.sizes = {name: p.numel() for name, p in root.model.named_parameters()}
        self.owned = {path: frozenset(first[f"{path}.{name}".lstrip(".")] for name, _ in module.named_parameters(remove_duplicate=False))
                      for module, path in self.names.items()}
        self.candidates: dict[nn.Module, Candidate] = {}
        self.groups: list[Group] = []
        self.checks: list[str] = []
        self.finding = False  # while parts are looked for, calls with empty tensors wait
        self.separate = False  # whether Python code writes into what parts return: see `returned`
        self.twice = False  # whether Python code differentiates gradients of parts
        self.offer(root.model)

    # -- which modules -------------------------------------------------------------------------------------------------

    def offer(self, module: nn.Module) -> None:
        """Try the children of a module when its code calls them. Containers without code of their own are walked through."""
        for child in module.children():
            if child in self.candidates or not any(True for _ in child.parameters()):
                continue
            path = self.names[child]
            if type(child).forward is nn.Module.forward or self._entered(path):
                self.offer(child)
                continue
            try:
                bind(child, path)
            except LowerError as error:
                self.root.note(f"{path} runs as Python code: {error.what}")
                self.offer(child)
                continue
            self.candidates[child] = Candidate(path, child, PartDispatcher(self.root, path, self.shares.get(path), self._group(path, child)))

    def _entered(self, path: str) -> bool:
        """Whether the example calls modules in one that it does not call."""
        return path not in self.shares and any(other.startswith(f"{path}.") for other in self.shares)

    def _group(self, path: str, module: nn.Module) -> Group:
        """The parts that are like this one."""
        found = next((group for group in self.groups if group.admits(path, module)), None)
        if found is None:
            self.groups.append(found := Group(module))
            found.admits(path, module)
        return found

    def route(self, module: nn.Module) -> Callable[..., Any] | None:
        """What runs in place of a module's code."""
        candidate = self.candidates.get(module)
        return None if candidate is None else lambda *args, **kwargs: self._call(candidate, args, kwargs)

    def _call(self, candidate: Candidate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        candidate.called = True
        call = Call.of(args, kwargs)
        lowered = self._find(candidate, call)
        if lowered is None:
            return type(candidate.module).forward(candidate.module, *args, **kwargs)
        with differentiable_twice() if self.twice else contextlib.nullcontext():
            return self.returned(candidate.dispatcher.run(lowered, call))

    def returned(self, value: Any) -> Any:
        """What Python code gets of a part. If it writes into results, it gets copies of those that a backward looks at: torch forbids
        writes into views that an `autograd.Function` made (the result of a linear is one)."""
        if not self.separate:
            return value
        return pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t.requires_grad else t, value)

    def _find(self, candidate: Candidate, call: Call) -> Lowered | None:
        """The program for a part's call; None if its own code has to run."""
        dispatcher = candidate.dispatcher
        if self.finding and any(t.numel() == 0 for t in call.tensors):
            return None
        before = dispatcher.installed
        try:
            if candidate.failures and _kind(dispatcher, call) in candidate.failures:
                return None
            if not candidate.captured:
                self._like_a_twin(candidate, call)
            with _undisturbed():
                return dispatcher.find(call)
        except (CaptureError, CallError, LowerError, RuntimeError) as error:
            if dispatcher.installed is not before:
                raise
            self._failed(candidate, call, error.failure if isinstance(error, _Alike) else Failure.of(error, candidate.path))
            return None

    def _failed(self, candidate: Candidate, call: Call, failure: Failure) -> None:
        try:
            candidate.failures[_kind(candidate.dispatcher, call)] = failure
        except CallError:
            if candidate.unkeyed is not None:
                return
            candidate.unkeyed = failure
        if candidate.captured:
            self.root.note(f"a kind of call of {candidate.path} runs as Python code: {failure}")
        self.offer(candidate.module)

    def _like_a_twin(self, candidate: Candidate, call: Call) -> None:
        """Raise what the capture of an equal module raised for such a call: it is not tried again."""
        for other in self.candidates.values():
            if other is not candidate and other.failures and not other.captured and _alike(other, candidate):
                kind = call_kind(candidate.dispatcher, call)
                found = next((failure for known, failure in other.failures.items() if known[:_CALL] == kind), None)
                if found is not None:
                    raise _Alike(found.within(other.path, candidate.path))

    def complete(self) -> None:
        """Capture what the example did not call (layers that are dropped at random, experts without a token) like its twins."""
        while True:
            waiting = [c for c in self.candidates.values() if not c.called]
            for candidate in waiting:
                twin = next((c for c in self.candidates.values() if c.called and _alike(c, candidate)), None)
                if twin is None:
                    continue
                candidate.called = True
                if twin.example is not None:
                    self._find(candidate, twin.example)
                else:
                    self.offer(candidate.module)
            if not any(c.called for c in waiting):
                return

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def captured(self) -> list[Candidate]:
        """The parts, in the order of the model."""
        order = list(self.names)
        return sorted((c for c in self.candidates.values() if c.captured), key=lambda c: order.index(c.module))

    def programs(self) -> Iterator[tuple[Candidate, Lowered]]:
        """Every program of every part."""
        for candidate in self.captured:
            for entries in candidate.dispatcher.entries.values():
                for entry in entries:
                    for lowered in (entry.plain, entry.assuming):
                        if lowered is not None:
                            yield candidate, lowered

    def copied(self, root: WholeDispatcher, memo: dict[int, Any]) -> Parts:
        """The same parts on a copy of the model."""
        new = Parts(root, self.why, self.shares, self.total)
        new.candidates.clear()
        groups: dict[Group, Group] = {}
        new.separate = self.separate
        new.checks, new.sizes, new.owned = list(self.checks), self.sizes, self.owned
        for module, candidate in self.candidates.items():
            other = memo[id(module)]
            bind(other, candidate.path)
            dispatcher = PartDispatcher(root, candidate.path, self.shares.get(candidate.path), groups.setdefault(candidate.dispatcher.group, Group(other)))
            dispatcher.group.differing[candidate.path] = candidate.dispatcher.group.differing[candidate.path]
            dispatcher.entries = candidate.dispatcher.entries_unbound()
            dispatcher.example, dispatcher.counted = candidate.dispatcher.example, candidate.dispatcher.counted
            new.candidates[other] = Candidate(candidate.path, other, dispatcher, dict(candidate.failures), candidate.unkeyed, candidate.called)
        return new


_CALL = 4  # the first entries of a kind, which are of the call; the rest is of the module


def _kind(dispatcher: Dispatcher, call: Call) -> Any:
    """The kind of a call, whatever learns and is adapted."""
    return dispatcher.key(call)[:-1]


def _memory(tensor: torch.Tensor) -> int:
    """Where a tensor's memory is; 0 if it has none (a weight that is stored quantized, while it is captured)."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def call_kind(dispatcher: Dispatcher, call: Call) -> Any:
    """The kind of a call, whatever module it is of."""
    return dispatcher.key(call)[:_CALL]


def _alike(a: Candidate, b: Candidate) -> bool:
    return a.dispatcher.group is b.dispatcher.group


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, modules run their own code, and what a checkpoint around the call does with saved tensors does not happen."""
    with routing(unrouted), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        yield
