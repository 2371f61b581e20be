"""Bind a Schedule to a live module: state is looked up by name at every call, blocks run through their own modules."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from fxopt.errors import LowerError
from fxopt.ir import meta
from fxopt.ir.capture import guards
from fxopt.ir.part import part_of
from fxopt.ir.partition import Policy
from fxopt.ir.program import Program
from fxopt.ir.regions import Region, Schedule, is_ref
from fxopt.runtime import hoisting
from fxopt.runtime.lazy import LazyOutput
from fxopt.runtime.region import RegionRunner
from fxopt.runtime.saving import Saving
from fxopt.torch_private import in_backward

_pending = threading.local()


Route = Callable[[nn.Module], Callable[..., Any] | None]
"""What runs in place of a module's own code, or None: its code."""


def unrouted(module: nn.Module) -> None:
    """The route on which every module runs its own code."""


@contextlib.contextmanager
def routing(route: Route) -> Iterator[None]:
    """Inside, on this thread, modules with a `BlockForward` run what the route says."""
    before = getattr(_pending, "route", None), getattr(_pending, "run", None)
    _pending.route, _pending.run = route, None
    try:
        yield
    finally:
        _pending.route, _pending.run = before


class BlockForward:
    """`forward` of a module: the region that the running program announces, what the present route says, or the module's own code.

    A checkpointed forward that is run again in the backward takes the route that it took before: it must save as many tensors.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.latest: Route | None = None
        self.__signature__ = inspect.signature(type(block).forward.__get__(block))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"latest": None}  # it leads to the programs of this model, not of the copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = getattr(_pending, "run", None)
        if run is not None and run[0] is self.block:
            _pending.run = None
            return run[1](args)
        route = getattr(_pending, "route", None)
        if not in_backward():
            self.latest = route
        elif route is None:
            route = self.latest
        instead = route(self.block) if route is not None else None
        if instead is not None:
            return instead(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)


def is_bound(module: nn.Module) -> bool:
    """Whether a module's forward may be a region."""
    return isinstance(module.__dict__.get("forward"), BlockForward)


def bind(module: nn.Module, path: str) -> None:
    """Let a module's forward be a region or a program.

    Raises:
        LowerError: something else took its place already.
    """
    if is_bound(module):
        return
    if "forward" in module.__dict__:
        raise LowerError("the module's forward was replaced on the instance", where=path, do="replace it before optimizing, on the class")
    module.__dict__["forward"] = BlockForward(module)


def unbind(model: nn.Module) -> None:
    """Give every block its own forward back."""
    for module in model.modules():
        if is_bound(module):
            del module.__dict__["forward"]


def locate(model: nn.Module, name: str) -> tuple[nn.Module, Mapping[str, Any], str]:
    """(owner, the owner's dict, leaf) of a parameter or buffer, by walking `_modules`: adapted weights have getters
    under the same names, which must not run here."""
    *path, leaf = name.split(".")
    owner = model
    for part in path:
        owner = owner._modules[part]  # type: ignore[assignment]
        if owner is None:
            raise KeyError(name)
    for store in (owner._parameters, owner._buffers):
        if leaf in store:
            return owner, store, leaf
    raise KeyError(name)


def live_state(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The present tensors of some slots."""
    found = {}
    for name in names:
        _, store, leaf = locate(model, name)
        found[name] = store[leaf]
    return found


class Binding:
    """A Program's schedule on a live model.

    Args:
        model: the original module; parameters are read from it at call time, so that `load_state_dict(assign=True)`,
            `.to()` and sharding wrappers are seen.
        saving: what each region saves for its backward.
        runners: shared by region key over all programs of one model.
        taps: how many of the last outputs nobody differentiates (see `ir.taps`).
    """

    def __init__(self, model: nn.Module, program: Program, schedule: Schedule, saving: Saving, runners: dict[Any, RegionRunner], taps: int = 0) -> None:
        self.model, self.program, self.schedule, self.saving = model, program, schedule, saving
        self.inputs = [node.name for node in program.placeholders]
        self.steps: list[tuple[Region, RegionRunner, nn.Module | None, list[Any]]] = []
        own = program.outputs[: len(program.outputs) - taps]
        loss = part_of(program.facts) is None and any(self._scalar_float(o) for o in own)
        later = self._readers(schedule) | {node.name for node in program.outputs[len(own):]}
        for region in schedule.regions:
            quiet = []
            if loss:
                quiet = [i for i, name in enumerate(region.outputs) if name not in later and not self._scalar(program, name)]
            key = region.key, tuple(quiet)
            runner = runners.get(key)
            if runner is None or runner.fixed:
                runner = runners[key] = RegionRunner(region, program.fake_mode, quiet)
            block = model.get_submodule(region.path) if region.path is not None else None
            if block is not None:
                bind(block, str(region.path))
            self.steps.append((region, runner, block, [self._cell(name) for name in region.state]))
        self.guards = guards(program)
        self.lazy = {name: self._lazy(name, nodes) for name, nodes in schedule.lazy.items()}
        self.dead_after = self._last_uses()
        self.hoisting = hoisting.of(self)

    def _cell(self, name: str) -> Any:
        if name in self.program.constants:
            return {name: self.program.constants[name]}, name
        try:
            _, store, leaf = locate(self.model, name)
        except KeyError:
            raise LowerError(f"the program reads {name!r}, which the model does not have") from None
        return store, leaf

    @staticmethod
    def _scalar_float(value: Any) -> bool:
        found = meta.tensor(value)
        return found is not None and found.dim() == 0 and found.is_floating_point()

    @staticmethod
    def _scalar(program: Program, name: str) -> bool:
        node = next(n for n in program.graph.nodes if n.name == name)
        found = meta.tensor(node)
        return found is None or found.dim() == 0

    @staticmethod
    def _readers(schedule: Schedule) -> set[str]:
        return {name for region in schedule.regions for name in region.inputs}

    def _last_uses(self) -> list[list[str]]:
        """For each step, the values that nobody reads after it."""
        keep = {str(o) for o in self.schedule.outputs if is_ref(o)} | {a.name for v in self.schedule.views for a in v.all_input_nodes}
        keep |= {name for values, *_ in self.lazy.values() for name in values}
        last: dict[str, int] = {}
        for i, (region, *_rest) in enumerate(self.steps):
            for name in (*region.inputs, *region.outputs):
                last[name] = i
        found: list[list[str]] = [[] for _ in self.steps]
        for name, i in last.items():
            if name not in keep:
                found[i].append(name)
        return found

    def _lazy(self, name: str, nodes: tuple[fx.Node, ...]) -> tuple[list[str], dict[str, Any], tuple[fx.Node, ...]]:
        """What a lazy output is computed from: names of values, cells of state, and the nodes."""
        values: dict[str, None] = {}
        cells: dict[str, Any] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    cells[source.name] = self._cell(str(source.target))
                elif source not in nodes:
                    values[source.name] = None
        return list(values), cells, nodes

    def _lazy_output(self, name: str, env: Mapping[str, Any], shapes: tuple[tuple[int, ...], ...]) -> LazyOutput:
        values, cells, nodes = self.lazy[name]
        local = {value: env[value] for value in values} | {key: store[leaf] for key, (store, leaf) in cells.items()}

        def compute() -> torch.Tensor:
            done = dict(local)
            for node in nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: done[n.name])
                done[node.name] = node.target(*args, **kwargs)
            return done[name]

        example = meta.value(nodes[-1])
        return LazyOutput.of(torch.Size(self.guards.sizes(example.shape, shapes)), example.dtype, next(v.device for v in local.values() if isinstance(v, torch.Tensor)),
                             compute, [v for v in local.values() if isinstance(v, torch.Tensor)])

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Flat outputs for the flat tensor inputs."""
        env: dict[str, Any] = dict(zip(self.inputs, tensors))
        policies = self.saving.policies(self, tensors)
        known = self.hoisting.fill(env, tensors) if self.hoisting is not None else frozenset()
        for at, ((region, runner, block, cells), dead, policy) in enumerate(zip(self.steps, self.dead_after, policies)):
            if at in known:
                for name in dead:
                    env.pop(name, None)
                continue
            values = [env[name] for name in region.inputs]

            def run(given: Sequence[Any], runner: RegionRunner = runner, cells: list[Any] = cells, policy: Policy = policy) -> tuple[Any, ...]:
                return runner([*given, *(store[leaf] for store, leaf in cells)], policy)

            for name in dead:
                env.pop(name, None)
            if block is None:
                outs = run(values)
            else:
                _pending.run = (block, run)
                try:
                    outs = block(*values)
                finally:
                    _pending.run = None
            del values
            for name, value in zip(region.outputs, outs):
                if name not in dead:
                    env[name] = value
        for node in self.schedule.views:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n.name])
            env[node.name] = node.target(*args, **kwargs)
        shapes = tuple(tuple(t.shape) for t in tensors)
        return [(self._lazy_output(str(o), env, shapes) if o in self.lazy else env[str(o)]) if is_ref(o) else o for o in self.schedule.outputs]
