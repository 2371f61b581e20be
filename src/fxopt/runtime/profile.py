"""Where the time of a step goes: each node of the program's graphs is timed by itself, forward and backward.

The regions of a step run node by node instead of as compiled code; everything around them stays. So the sum of the nodes is the work of
the step, what a step takes without this beside it is the cost of Python and autograd between the nodes, and both are told.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from fxopt.ir import meta
from fxopt.ir.regions import is_view
from fxopt.runtime.forecast import origin
from fxopt.runtime.lazy import LazyOutput
from fxopt.runtime.plan import size
from fxopt.runtime.region import RegionRunner, executing
from fxopt.torch_private import pytree


@dataclass
class Row:
    """A node of a graph, in all of the equal regions that run it.

    Attributes:
        direction: "forward" or "backward". node, op: its name and what it calls. path, source, code: the module (of the first of equal
            blocks) and the user's line that it comes from; passes: which made or changed it. calls: how often it ran in the step.
        seconds: of all calls. moved: bytes that it reads and writes, views none; allocated: bytes of new memory that it returns.
    """

    direction: str
    node: str
    op: str
    path: str
    source: str
    code: str
    passes: tuple[str, ...]
    calls: int = 0
    seconds: float = 0.0
    moved: int = 0
    allocated: int = 0


@dataclass(frozen=True)
class Profile:
    """A step, node by node; `print` it.

    Attributes:
        rows: by time, the longest first. step: seconds of forward and backward as they run otherwise. wall: of the profiled ones.
    """

    rows: tuple[Row, ...]
    step: float
    wall: float

    @property
    def nodes(self) -> float:
        """Seconds of all nodes."""
        return sum(row.seconds for row in self.rows)

    def __str__(self) -> str:
        return self.table()

    def table(self, top: int = 30) -> str:
        """The `top` nodes that take longest, and the sums."""
        shown = self.rows[:top]
        lines = [f"{'ms':>9}  {'%':>5}  {'moved':>9}  {'GB/s':>6}  {'calls':>6}  node"]
        for row in shown:
            rate = row.moved / row.seconds / 1e9 if row.seconds else 0.0
            at = f"{row.path or '<root>'} ({row.source})" if row.source else row.path or "<root>"
            lines.append(f"{row.seconds * 1e3:9.3f}  {row.seconds / (self.nodes or 1) * 100:5.1f}  {size(row.moved):>9}  {rate:6.1f}  {f'x{row.calls}':>6}  "
                         f"{row.direction} {row.node} {row.op}  # {at}{f' [{chr(44).join(row.passes)}]' if row.passes else ''}")
        rest = self.nodes - sum(row.seconds for row in shown)
        lines += [f"{rest * 1e3:9.3f}  {rest / (self.nodes or 1) * 100:5.1f}  {'':9}  {'':6}  {'':6}  {len(self.rows) - len(shown)} others"] if len(self.rows) > len(shown) else []
        half = {way: sum(row.seconds for row in self.rows if row.direction == way) for way in ("forward", "backward")}
        lines.append(f"{self.nodes * 1e3:9.3f}  all nodes: forward {half['forward'] * 1e3:.3f}, backward {half['backward'] * 1e3:.3f}")
        lines.append(f"{self.step * 1e3:9.3f}  the step unprofiled: the nodes are {self.nodes / self.step:.0%} of it; profiled it takes {self.wall * 1e3:.3f} ms")
        return "\n".join(lines)

    def json(self) -> str:
        """All rows and sums. Units: seconds and bytes."""
        return json.dumps({"step_seconds": self.step, "profiled_seconds": self.wall, "node_seconds": self.nodes, "rows": [asdict(row) for row in self.rows]}, indent=1)

    def folded(self) -> str:
        """One line for each node, "module;module;line;node microseconds", as flame graph programs read them."""
        found = []
        for row in self.rows:
            frames = [row.direction, *(row.path.split(".") if row.path else ()), *([row.source] if row.source else ()), f"{row.node} {row.op}".replace(" ", "_")]
            found.append(f"{';'.join(frames)} {round(row.seconds * 1e6)}")
        return "\n".join(found) + "\n"


@dataclass
class _Recorder:
    """Runs graphs node by node. `times` are of the calls of a node in the present step; `best` the shortest of each call in any step."""

    rows: dict[fx.Node, Row] = field(default_factory=dict)
    times: dict[fx.Node, list[Any]] = field(default_factory=dict)
    best: dict[fx.Node, list[float]] = field(default_factory=dict)
    forwards: dict[Any, fx.Node] = field(default_factory=dict)
    """The region's node behind a number of autograd's sequence, which the backward of a node shares with it."""
    last_uses: dict[fx.Graph, dict[fx.Node, list[fx.Node]]] = field(default_factory=dict)

    def __call__(self, module: fx.GraphModule, args: Sequence[Any], runner: RegionRunner, direction: str) -> Any:
        graph = module.graph
        if graph not in self.last_uses:
            self.last_uses[graph] = _last_uses(graph)
            self._describe(graph, runner, direction)
        dead, given, env = self.last_uses[graph], iter(args), {}
        on_device = any(isinstance(a, Tensor) and a.is_cuda for a in args)
        for node in graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = getattr(module, str(node.target))
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: env[n])
            else:
                taken, named = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
                row, times = self.rows[node], self.times.setdefault(node, [])
                before = [t for t in pytree.tree_leaves((taken, named)) if isinstance(t, Tensor)]
                sizes, known = sum(t.nbytes for t in before), {t.untyped_storage()._cdata for t in before}
                del before
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_device else []
                began = _clock()
                if marks:
                    marks[0].record()
                env[node] = value = node.target(*taken, **named)
                del taken, named
                for gone in dead.get(node, ()):
                    del env[gone]
                if marks:
                    marks[1].record()
                    times.append(marks)
                else:
                    times.append(_clock() - began)
                made = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
                row.allocated += sum(t.nbytes for t in made if t.untyped_storage()._cdata not in known)
                row.moved += 0 if is_view(node) else sizes + sum(t.nbytes for t in made)
                del value, made
        raise AssertionError("a graph ends with its output")

    def _describe(self, graph: fx.Graph, runner: RegionRunner, direction: str) -> None:
        own = {node.name: node for node in runner.region.graph.nodes}
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            key = id(runner), node.meta.get("seq_nr")
            source = node if meta.PROVENANCE in node.meta else own.get(origin(node)) or self.forwards.get(key)
            if source is not None and direction == "forward":
                self.forwards.setdefault(key, source)
            where = meta.provenance(source) if source is not None else meta.Provenance(runner.region.path or "")
            self.rows[node] = Row(direction, node.name, str(getattr(node.target, "__name__", node.target)), where.path, where.source, where.code, where.passes)

    def end_step(self) -> None:
        """A step is over; waits for the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for node, times in self.times.items():
            found = [one[0].elapsed_time(one[1]) / 1e3 if isinstance(one, list) else one for one in times]
            self.best[node] = [min(pair) for pair in zip(self.best.get(node, found), found)]
        self.times.clear()

    def finish(self, steps: int) -> tuple[Row, ...]:
        """All rows of one step, the longest first."""
        for node, times in self.best.items():
            row = self.rows[node]
            row.calls, row.seconds, row.moved, row.allocated = len(times), sum(times), row.moved // steps, row.allocated // steps
        return tuple(sorted((self.rows[node] for node in self.best), key=lambda row: -row.seconds))


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nobody reads after it (its own, if nobody reads it at all)."""
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        if node.op == "call_function":
            found[node] = [*fresh, *([node] if node not in seen else ())]
    return found


def _clock() -> float:
    """Seconds. Where torch has one thread on a CPU they are processor time, which others that use the machine do not disturb."""
    return time.thread_time() if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter()


def profile(model: nn.Module, call: Callable[[], Any], repeats: int = 5) -> Profile:
    """Profile steps of a model, forward and backward: one to warm up, then some in turn with and without the profiler. Of each call of a
    node, and of the whole steps, the shortest time counts. Gradients, buffers and random states are as before afterwards.

    Args:
        call: gives the model's output. repeats: at least 1.
    """
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def step() -> None:
        for parameter in gradients:
            parameter.grad = None
        outputs = _differentiable(call())
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    plain = wall = float("inf")
    recorder = _Recorder()
    try:
        with torch.random.fork_rng():
            step()
            for _ in range(repeats):
                plain = min(plain, _timed(step))
                with executing(recorder):
                    wall = min(wall, _timed(step))
                recorder.end_step()
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return Profile(recorder.finish(repeats), plain, wall)


def _timed(step: Callable[[], None]) -> float:
    began = _clock()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _clock() - began


def _differentiable(output: Any) -> list[Tensor]:
    """What the backward of a step begins with: the 0-dim outputs that require a gradient, else all that do. Not those that are computed
    when they are read."""
    found = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and not isinstance(leaf, LazyOutput) and leaf.requires_grad]
    return [leaf for leaf in found if not leaf.dim()] or found
