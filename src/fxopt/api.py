"""`optimize` and what it returns."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy

from fxopt import in_parts
from fxopt.adapting import Adapting, call_of
from fxopt.certified import bisected, certified
from fxopt.dispatch import Dispatcher, Part, account, parts_report
from fxopt.errors import CallError, FxoptError
from fxopt.explain import Explanation, explain
from fxopt.ir import text
from fxopt.ir.capture import Call
from fxopt.ir.program import Program
from fxopt.ir.regions import repeated_blocks
from fxopt.ir.taps import Tap
from fxopt.passes import presets
from fxopt.passes.base import Pass
from fxopt.passes.bisect import Culprit, Judge
from fxopt.passes.certificate import Certificate
from fxopt.passes.pipeline import Pipeline, pipeline
from fxopt.runtime.binding import live_state
from fxopt.runtime.locate import NonFinite, locate
from fxopt.runtime.plan import Plan, planned, planner
from fxopt.runtime.precision_time import predicted as predicted_precision
from fxopt.runtime.profile import Profile, profile
from fxopt.runtime.sizes import largest, resized
from fxopt.runtime.tapping import Tapping

Passes = str | Pass | Pipeline | Iterable[str | Pass | Pipeline]


def optimize(model: nn.Module, passes: Passes | None = None, *, inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
             check: bool = True, verify: str | None = None) -> Optimized:
    """The same model, running as captured graphs that passes have rewritten.

    Args:
        model: any module. It stays usable; its blocks, parameters and hooks are its own, and passes that adapt or
            quantize weights do so on this model.
        passes: text (`"lora(rank=16) | quantize(nf4) | fuse"`), Pass values, or a Pipeline. None: `presets.exact()`,
            passes that change nothing but speed and memory.
        inputs: an example call, a tuple (args) or a dict (kwargs): capture now. None: capture at the first call.
            Batch size and length are dynamic either way; other kinds of call are captured when they come.
        check: after each capture, compare one step (outputs, all gradients, buffers) with the original.
        verify: "values" refuses a program whose certificate fails: each pass application is tested as `Optimized.verify` does.

    Raises:
        CaptureError: the model cannot be captured (where, and what to do), or a graph is not equal to it.
        PassError: a pass cannot be parsed or applied, or broke its promise.
    """
    if not isinstance(model, nn.Module):
        raise FxoptError(f"optimize takes an nn.Module, got {type(model).__name__}", do="wrap the function in a module")
    if isinstance(model, Optimized):
        raise FxoptError("the model is optimized already", do="optimize `opt.model` with the whole pipeline")
    lazy = next((name for name, value in (*model.named_parameters(), *model.named_buffers()) if is_lazy(value)), None)
    if lazy is not None:
        raise FxoptError(f"{lazy} has no shape yet (a lazy module)", do="call the model on a batch before it is optimized")
    chosen = presets.exact() if passes is None else pipeline(passes)
    opt = _class_for(type(model))(model, Dispatcher(model, chosen, check=check, verify=verify))
    if inputs is not None:
        opt.prepare(inputs)
    return opt


class Optimized(Adapting, nn.Module):
    """A model that runs as optimized graphs. Made by `optimize`.

    Parameters, buffers and submodules are the original's own; `state_dict` keeps the original names; everything that
    is not defined here (`config`, `generate`, `save_pretrained`, ...) is the original model's.

    Attributes:
        model: the original module. Calling it runs the original Python code, with the same (adapted) weights.
        passes: the pipeline.
    """

    def __init__(self, model: nn.Module, dispatcher: Dispatcher) -> None:
        self.__dict__["model"] = model  # not a submodule: names stay the original's
        super().__init__()
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = model.__dict__[shared]
        self.__dict__["dispatcher"] = dispatcher

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's return value, computed by the program for this kind of call."""
        return self.dispatcher(args, kwargs)

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The original's mode."""
        return self.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        pass  # nn.Module.__init__ sets it; the original keeps its own

    @property
    def passes(self) -> Pipeline:
        """The pipeline that every captured call goes through."""
        return self.dispatcher.passes

    def prepare(self, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Program | None:
        """Capture and optimize one kind of call, without running a step of it for real. Returns its program; None if it runs in parts."""
        self.dispatcher.prepare(call_of(inputs))
        return self.dispatcher.last.program if self.dispatcher.last is not None else None

    # -- the original's ways -------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__:
                raise
            return getattr(self.__dict__["model"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes are the original's: `opt.scale = 2` is seen by its code, and by the next capture."""
        if name.startswith("_") or name in ("training", "model", "dispatcher"):
            super().__setattr__(name, value)
        else:
            setattr(self.model, name, value)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The original's parameters, adapters included.

        Raises:
            FxoptError: the passes add parameters that do not exist before the first capture: an optimizer made now would
                never train them.
        """
        if self.dispatcher.pending:
            raise FxoptError("the adapters do not exist yet: they are made when the first call is captured",
                             do="give `optimize` the example `inputs`, or call the model once, before asking for parameters")
        return super().named_parameters(*args, **kwargs)

    def train(self, mode: bool = True) -> Optimized:
        """Switch the original between its two modes."""
        self.model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state dict: original names, plus the adapters."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the original."""
        return self.model.load_state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        model = copy.deepcopy(self.model, memo)
        memo[id(self.model)] = model
        new = type(self)(model, copy.deepcopy(self.dispatcher, memo))
        memo[id(self)] = new
        return new

    def __reduce__(self) -> Any:
        return _revive, (self.model, {name: passes.text() for name, passes in self.dispatcher.pipelines.items()}, self.dispatcher.active)

    def __repr__(self) -> str:
        return f"Optimized[{self.passes.text()}](\n{self.model!r}\n)"

    # -- seeing --------------------------------------------------------------------------------------------------------

    @property
    def program(self) -> Program:
        """The program of the latest call.

        Raises:
            FxoptError: there was none, or it ran in parts.
        """
        if self.dispatcher.last is None:
            raise FxoptError("the latest call runs in parts, each with a program of its own" if self.dispatcher.partial else "nothing was captured yet",
                             do="see `opt.parts` and `opt.report`" if self.dispatcher.partial else "call the model once, or pass `inputs` to optimize")
        return self.dispatcher.last.program

    @property
    def parts(self) -> tuple[Part, ...]:
        """If the latest call ran in parts: which modules run as programs, and which stay Python and why. Else empty."""
        return account(self.dispatcher.parts) if self.dispatcher.partial else ()

    @property
    def programs(self) -> tuple[Program, ...]:
        """The program of the latest call, or those of all parts."""
        if not self.dispatcher.partial:
            return (self.program,)
        return tuple(program for part in self.parts for program in part.programs)

    @property
    def report(self) -> str:
        """What each pass did to the latest program, what it did not do and why, and what the checks found."""
        lowered = self.dispatcher.last
        if lowered is None and not self.dispatcher.partial:
            return "nothing was captured yet"
        lines = [text.report(self.program) if lowered is not None else parts_report(self.dispatcher.parts)]
        lines += [f"check: {line}" for line in lowered.checks] if lowered is not None else []
        lines += [str(lowered.binding.hoisting)] if lowered is not None and lowered.binding is not None and lowered.binding.hoisting is not None else []
        lines += predicted_precision(self.program, repeated_blocks(self.model)) if lowered is not None else []
        lines += [f"note: {line}" for line in (*self.dispatcher.notes, *dict.fromkeys(r.untraced for r in self.dispatcher.runners.values() if r.untraced))]
        return "\n".join(lines)

    def explain(self, *, predict: str = "ends") -> Explanation | in_parts.ByPart[Explanation]:
        """What each pass did to the latest program, what it did not and why, what that is worth, and how to change it; `print` it, or
        take its `json()`.

        Args:
            predict: memory and time of a step before and after the pipeline ("ends"), after "each" pass too (seconds for each), or "none".

        A call that runs in parts is explained by part.

        Raises:
            FxoptError: nothing was captured yet.
        """
        if self.dispatcher.partial:
            return in_parts.explained(self.dispatcher.parts, predict)
        program, lowered = self.program, self.dispatcher.last
        return explain(program, self.model, self.dispatcher.example, predict=predict, checks=lowered.checks, notes=self.dispatcher.notes)

    def locate(self, inputs: tuple[Any, ...] | Mapping[str, Any] | None = None, *, scale: float = 1.0) -> NonFinite | None:
        """The first value of a step on a batch that is not finite, forward or backward, with what it was made from, the line of the
        model's code and the pass that made it; `print` it. None: all outputs and gradients are finite. Nothing is changed by the replay.

        Args:
            inputs: the batch; None: the last call. scale: what the loss is multiplied by for the backward (a loss scale).

        Raises:
            CallError: the call runs in parts. CheckError: the backward cannot be replayed.
        """
        call = self.sized_call(inputs)
        program = self.dispatcher.last.program
        read = {str(node.target) for node in program.nodes if node.op == "get_attr"}
        return locate(program, call.tensors, live_state(self.model, [name for name in program.slots if name in read and name not in program.constants]), scale)

    @contextlib.contextmanager
    def tap(self, taps: Tapping | Mapping[str, Tap | str]) -> Iterator[Tapping]:
        """Inside, calls also give values from the middle of their program, or gradients of such: `values()` of what is yielded, after a
        call and its backward. Outside, calls run the program itself, as before.

        Args:
            taps: by name; a text is the pattern of a `Tap`. Give what was yielded once more to trace nothing anew.

        Raises:
            CallError: (of the call) no node is meant by a pattern, with what is nearest; or the call runs in parts.
        """
        outer, dispatcher = self.dispatcher.tapping, self.dispatcher
        dispatcher.tapping = taps if isinstance(taps, Tapping) else Tapping({name: Tap(tap) if isinstance(tap, str) else tap for name, tap in taps.items()})
        try:
            yield dispatcher.tapping
        finally:
            dispatcher.tapping = outer

    def profile(self, inputs: tuple[Any, ...] | Mapping[str, Any] | None = None, *, repeats: int = 5) -> Profile:
        """Time and bytes of each node of a step on a batch, forward and backward, with the modules and lines that they come from; `print`
        it, or take its `json()` or `folded()` stacks. Weights, gradients, buffers and random states are as before afterwards.

        Args:
            inputs: the batch; None: the last call. repeats: steps that are timed, the shortest counts.
        """
        if inputs is None and self.dispatcher.example is None:
            raise FxoptError("the model was not called yet", do="give `inputs`")
        call = self.dispatcher.example if inputs is None else inputs if isinstance(inputs, Call) else call_of(inputs)
        args, kwargs = call.rebuild(call.tensors)
        return profile(self, lambda: self(*args, **kwargs), repeats)

    def verify(self, inputs: tuple[Any, ...] | Mapping[str, Any] | None = None, *, runs: int = 2, seed: int = 0,
               original: Mapping[str, torch.Tensor] | None = None, name: str | None = None, named_inputs: Sequence[str] | None = None) -> Certificate:
        """Randomized testing of how the program of a call was made: each pass application, on the call, on `runs` drawn ones and on
        adversarial ones, structure and values, and the program as it is run. `print` the certificate, or take its `json()`.

        Args:
            inputs: an example call; None: the last one. seed: of all random numbers.
            original: a state dict with the weights before quantization: then what they lose is tested too.
            name, named_inputs: how a command named the model and its inputs, for the record.

        Raises:
            FxoptError: nothing was captured yet. What does not hold raises nothing: see `Certificate.require`. Of a call that runs in parts, the
                stages of all of them are in one certificate.
        """
        if self._runs_in_parts(inputs):
            return in_parts.verified(self.dispatcher.parts, runs=runs, seed=seed, original=original, name=name, inputs=named_inputs)
        call = self.sized_call(inputs)
        lowered = self.dispatcher.last
        return certified(lowered.program, self.model, self.passes, call.tensors, lowered.binding, runs=runs, seed=seed, original=original, name=name,
                         inputs=named_inputs)

    def bisect(self, predicate: Judge | None = None, *, certificate: Certificate | None = None, inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
               original: Mapping[str, torch.Tensor] | None = None) -> Culprit:
        """The pass and the rewrite that make the program of a call wrong, with a script of under 60 lines that shows it, where there can be one.

        Args:
            predicate: `predicate(program)` is true of a wrong program; None: its certificate fails.
            certificate: one that fails, from `verify`; None (and of a model in parts): made now. inputs: an example call; None: the last one. original: see `verify`.

        Raises:
            CheckError: nothing is wrong, or the program is wrong as captured.
        """
        if self._runs_in_parts(inputs):
            return in_parts.bisect(self.dispatcher.parts, predicate, original)
        call = self.sized_call(inputs)
        return bisected(self.dispatcher.last.program, self.model, self.passes, call.tensors, predicate=predicate, certificate=certificate, original=original)

    def _prepared(self, inputs: tuple[Any, ...] | Mapping[str, Any] | None) -> Call:
        if inputs is None and self.dispatcher.example is None:
            raise FxoptError("the model was not called yet", do="give `inputs`")
        call = self.dispatcher.example if inputs is None else inputs if isinstance(inputs, Call) else call_of(inputs)
        self.dispatcher.prepare(call)
        return call

    def _runs_in_parts(self, inputs: tuple[Any, ...] | Mapping[str, Any] | None) -> bool:
        self._prepared(inputs)
        return self.dispatcher.partial

    def sized_call(self, inputs: tuple[Any, ...] | Mapping[str, Any] | None = None, *, batch: int | None = None, length: int | None = None) -> Call:
        """A call (None: the last one), which is captured now if it is of a new kind, with as many samples and tokens as wanted: its values
        are repeated.

        Raises:
            CallError: the captured graph fixes such a size, or the call runs in parts.
        """
        call = self._prepared(inputs)
        if self.dispatcher.last is None:
            raise CallError("this call runs in parts, and what is asked needs its whole step in one graph", where=type(self.model).__name__,
                            do="`print(opt.report)` says what stands against the whole, and what to change")
        return dataclasses.replace(call, tensors=tuple(resized(call.tensors, self.dispatcher.last.binding.guards.shapes, batch, length)))

    def plan(self, inputs: tuple[Any, ...] | Mapping[str, Any] | None = None, *, batch: int | None = None, length: int | None = None,
             optimizer: str | None = None) -> Plan | in_parts.PlanOfParts:
        """What a training step on a call will take, and what each region does about it; `print` it. Nothing is run.

        Args:
            inputs, batch, length: see `sized_call`.
            optimizer: whose state counts: "adamw", "adamw_8bit", "momentum", "sgd" or "none"; None: what the memory pass says, else
                "adamw".

        Raises:
            CallError: the memory pass's budget cannot be kept; with the smallest that can. Or other sizes are asked of a call that runs in
                parts: they are planned for the sizes that they were called with.
        """
        if (batch, length) == (None, None) and self._runs_in_parts(inputs):
            return in_parts.plan(self.dispatcher.parts, optimizer)
        call = self.sized_call(inputs, batch=batch, length=length)
        return planned(self.dispatcher.last.binding, call.tensors, optimizer)

    def largest_call(self, memory: int, vary: str = "batch", *, batch: int | None = None, length: int | None = None,
                     inputs: tuple[Any, ...] | Mapping[str, Any] | None = None, optimizer: str | None = None) -> tuple[int, Plan, Call]:
        """The most samples (or tokens) that a training step can take within so much memory, by plans alone; nothing is run.

        Args:
            memory: bytes. vary: "batch" or "length"; the other stays as `batch` or `length` says, or as in the call.
            inputs: a call; None: the last one. optimizer: as for `plan`.

        Returns:
            the size, its plan, and a call of that size with the example's values repeated.

        Raises:
            CallError: no size fits, or the captured graph fixes it.
        """
        if vary not in ("batch", "length"):
            raise FxoptError(f"vary is {vary!r}", do='write "batch" or "length"')
        call = self.sized_call(inputs)

        def of(number: int) -> Call:
            return self.sized_call(call, **{"batch": batch, "length": length, vary: number})

        found, plan = largest(planner(self.dispatcher.last.binding, lambda number: of(number).tensors, optimizer), memory)
        return found, plan, of(found)


_CLASSES: dict[type, type[Optimized]] = {}


def _class_for(original: type[nn.Module]) -> type[Optimized]:
    """Optimized under the original's class name, with the original's signature on `forward`: trainers look at both."""
    if original not in _CLASSES:

        def forward(self: Optimized, *args: Any, **kwargs: Any) -> Any:
            return self.dispatcher(args, kwargs)

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        forward.__doc__ = original.forward.__doc__
        _CLASSES[original] = type(original.__name__, (Optimized,), {"forward": forward, "__module__": original.__module__, "__doc__": original.__doc__})
    return _CLASSES[original]


def _revive(model: nn.Module, passes: Mapping[str | None, str], active: str | None) -> Optimized:
    opt = optimize(model, passes[active])
    opt.dispatcher.pipelines = {name: pipeline(text) for name, text in passes.items()}
    return opt
