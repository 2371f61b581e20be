"""Run a Region: one `autograd.Function` over the forward and backward graphs of its joint graph."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import sympy
import torch
import torch.fx as fx

from fxopt.errors import DifferentiatedTwice, LowerError
from fxopt.ir import joint as joints
from fxopt.ir import meta
from fxopt.ir.compress import Compressed
from fxopt.ir.edit import effectful
from fxopt.ir.offload import Offloaded
from fxopt.ir.partition import Policy, Split, split
from fxopt.ir.regions import Region, differentiable_outputs, influences
from fxopt.ir.reuse import reuse
from fxopt.ir.tiling import Tiling
from fxopt.kernels.catalog import CATALOG
from fxopt.runtime.offload import send

log = logging.getLogger("fxopt")
_FUSED = {op.forward.overload: op for op in CATALOG}
_OPERANDS = {kernel.overload: kernel.rows for op in CATALOG for kernel in op.kernels if kernel.rows is not None}


class _References(fx.Interpreter):
    """Runs a graph with the references of fused ops, which are plain torch: the gradients of the ops themselves have no gradients."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = _FUSED.get(target)
        return super().call_function(target, args, kwargs) if op is None else op.reference(*args, **kwargs)


_executors: list[Callable[[fx.GraphModule, Sequence[Any], Any, str], Any]] = []


@contextlib.contextmanager
def executing(executor: Callable[[fx.GraphModule, Sequence[Any], Any, str], Any]) -> Iterator[None]:
    """Inside, the graphs of regions are run by `executor(graph, arguments, runner, "forward" or "backward")`, in all threads."""
    _executors.append(executor)
    try:
        yield
    finally:
        _executors.remove(executor)


_TWICE: ContextVar[bool] = ContextVar("differentiated twice", default=False)


@contextlib.contextmanager
def differentiable_twice() -> Iterator[None]:
    """Programs that are called inside run operator by operator, fused ops as plain torch: slower, but their gradients can be differentiated again,
    as a penalty of gradients and a layer that asks autograd for derivatives do. The backward may come after it."""
    token = _TWICE.set(True)
    try:
        yield
    finally:
        _TWICE.reset(token)


def _execute(graph: fx.GraphModule, args: Sequence[Any], runner: RegionRunner, direction: str) -> Any:
    return _executors[-1](graph, args, runner, direction) if _executors else graph(*args)


class Compiled:
    """A region's graphs for one pattern of arguments that require a gradient."""

    def __init__(self, split_: Split, differentiable: tuple[bool, ...]) -> None:
        self.split, self.differentiable = split_, differentiable

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        return self


class RegionRunner:
    """Compiles a region when it is first run, and runs it. Equal regions (same key) share one runner.

    Args:
        region: the region; any of the equal ones.
        quiet: indices of outputs that are returned to the user beside a scalar loss. They are compiled as if nobody
            differentiates them; if somebody does, the region's backward is recomputed with them once, the event is
            logged, and from then on they are part of the plan.
    """

    def __init__(self, region: Region, fake_mode: Any, quiet: Sequence[int] = ()) -> None:
        self.region, self.fake_mode = region, fake_mode
        random = any(effectful(n) for n in region.graph.nodes if n.op == "call_function")
        self.quiet: frozenset[int] = frozenset() if random else frozenset(quiet)
        self.joints: dict[Any, tuple[joints.Joint, tuple[bool, ...]]] = {}
        self.compiled: dict[Any, Compiled] = {}
        self.influences = influences(region)
        self.untraced = ""
        self.fixed: dict[tuple[int, int], Any] = {}  # sizes that tracing the backward fixed, by (argument, dimension)
        self.inference = fx.GraphModule(dict(region.modules), region.graph)

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionRunner:
        return self

    def joint(self, requires_grad: tuple[bool, ...], autocast: torch.dtype | None = None) -> tuple[joints.Joint, tuple[bool, ...]]:
        """The joint graph for arguments of which these require a gradient, traced under the caller's autocast state, and for each
        output of the region whether it requires one."""
        key = requires_grad, self.quiet, autocast
        if key not in self.joints:
            only = [i for i in range(len(self.region.outputs)) if i not in self.quiet] if self.quiet else None
            before = self._sizes()
            traced = joints.trace(self.region, requires_grad, self.fake_mode, only=only)
            after = self._sizes()
            self.fixed.update((place, size) for place, size in after.items() if size != before[place])
            possible = differentiable_outputs(self.region, requires_grad)
            self.joints[key] = traced, tuple(d or (i in self.quiet and possible[i]) for i, d in enumerate(traced.differentiable))
        return self.joints[key]

    def traceable(self, requires_grad: tuple[bool, ...], autocast: torch.dtype | None) -> bool:
        """Whether there is a joint graph. If an operator's backward cannot be traced, the region runs operator by operator, by ordinary
        autograd: `untraced` says why, and the log, once."""
        if not self.untraced:
            try:
                self.joint(requires_grad, autocast)
            except LowerError as error:
                place = self.region.path or "what lies between the blocks"
                self.untraced = f"{place} runs operator by operator, with all that eager code saves: {error.what}"
                log.warning("fxopt: %s", self.untraced)
        return not self.untraced

    def _sizes(self) -> dict[tuple[int, int], Any]:
        """What the trace knows of each size of each argument, by (argument, dimension): a symbol, an expression or a number."""
        shapes = ((i, meta.value(node)) for i, node in enumerate(n for n in self.region.graph.nodes if n.op == "placeholder"))
        return {(i, d): sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)
                for i, value in shapes if isinstance(value, torch.Tensor) for d, size in enumerate(value.shape)}

    def covers(self, args: Sequence[Any]) -> bool:
        """Whether the graphs hold for arguments of these sizes. The backward of some operators fixes a size when it is traced (that of a
        cumulative product does), which the forward, and so the guards of a program that has not run, know nothing of."""
        if not self.fixed:
            return True
        bound = {size: args[i].shape[d] for (i, d), size in self._sizes().items() if size.is_Symbol}
        return all(size.subs(bound) == args[i].shape[d] for (i, d), size in self.fixed.items())

    def compile(self, requires_grad: tuple[bool, ...], autocast: torch.dtype | None, policy: Policy) -> Compiled:
        """The graphs for arguments of which these require a gradient, with the saved values that the policy chooses."""
        key = requires_grad, self.quiet, autocast, policy
        found = self.compiled.get(key)
        if found is None and isinstance(policy, Offloaded):  # the base's graphs
            base = self.compile(requires_grad, autocast, policy.base)
            found = self.compiled[key] = Compiled(policy.apply(base.split), base.differentiable)
        if found is None:
            traced, differentiable = self.joint(requires_grad, autocast)
            plan = split(traced, policy)
            if isinstance(policy, (Tiling, Compressed)):
                plan = policy.apply(plan, _OPERANDS)
            for graph in (plan.forward, plan.backward):
                if graph is not None:
                    reuse(graph)
            found = self.compiled[key] = Compiled(plan, differentiable)
        return found

    def __call__(self, args: Sequence[Any], policy: Policy) -> tuple[Any, ...]:
        """The region's outputs. `args` are its inputs and state, in order; `policy` chooses what is saved for the backward."""
        requires_grad = tuple(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        if not torch.is_grad_enabled() or not any(requires_grad):
            return self._infer(args)
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if _TWICE.get():
            return tuple(_References(self.inference).run(*args))
        if not self.traceable(requires_grad, autocast):
            return tuple(_execute(self.inference, args, self, "forward"))
        compiled = self.compile(requires_grad, autocast, policy)
        if not self.covers(args):
            return tuple(_execute(self.inference, args, self, "forward"))  # operator by operator, by ordinary autograd: slower, and right for all sizes
        # a joint graph holds its casts: running it under autocast would cast again
        with torch.autocast(device, enabled=False) if autocast is not None else contextlib.nullcontext():
            out = _RegionFunction.apply(self, compiled, *args)
        return out if isinstance(out, tuple) else (out,)

    def _infer(self, args: Sequence[Any]) -> tuple[Any, ...]:
        with torch.no_grad():
            return tuple(_execute(self.inference, args, self, "forward"))

    def gradients_eagerly(self, args: Sequence[Any], tangents: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Gradients of all outputs by running the region again under ordinary autograd. The slow way, always right."""
        leaves = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
        with torch.enable_grad():
            outs = self.inference(*leaves)
        pairs = [(o, t) for o, t in zip(outs, tangents) if t is not None and o.requires_grad]
        wanted = [i for i, a in enumerate(leaves) if isinstance(a, torch.Tensor) and a.requires_grad]
        grads = torch.autograd.grad([o for o, _ in pairs], [leaves[i] for i in wanted], [t for _, t in pairs], allow_unused=True)
        found: list[torch.Tensor | None] = [None] * len(args)
        for i, grad in zip(wanted, grads):
            found[i] = grad
        return found


class _RegionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, runner: RegionRunner, compiled: Compiled, *args: Any) -> tuple[Any, ...]:  # type: ignore[override]
        plan = compiled.split
        results = _execute(plan.forward, args, runner, "forward")
        outs = tuple(results[: plan.n_outputs])
        at = plan.n_outputs + len(plan.mutated)
        saved = list(results[at:])
        for index, new in zip(plan.mutated, results[plan.n_outputs: at]):
            for k, value in enumerate(saved):
                if value is args[index]:
                    saved[k] = value.clone()  # the backward wants the value from before the write
            args[index].copy_(new)
        ctx.runner, ctx.compiled = runner, compiled
        ctx.packet, ctx.away = send(saved, plan.offloaded)
        for k in ctx.away:
            saved[k] = None
        ctx.plain = [None if isinstance(v, torch.Tensor) else (v,) for v in saved]
        keep = [v for v in saved if isinstance(v, torch.Tensor)]
        ctx.n_saved = len(keep)
        if runner.quiet:
            ctx.arguments = [None if isinstance(a, torch.Tensor) else (a,) for a in args]
            keep += [a for a in args if isinstance(a, torch.Tensor)]
        ctx.save_for_backward(*keep)
        ctx.n_args = len(args)
        ctx.layouts = [(o.shape, o.stride(), o.dtype, o.device) if isinstance(o, torch.Tensor) else None for o in outs]
        ctx.set_materialize_grads(False)
        fixed = [o for o, differentiable in zip(outs, compiled.differentiable) if isinstance(o, torch.Tensor) and not differentiable]
        ctx.mark_non_differentiable(*fixed)
        return outs

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # `once_differentiable` would give gradients that silently depend on nothing
            raise DifferentiatedTwice("gradients of an optimized program are to be differentiated again (create_graph=True)",
                                      where=ctx.runner.region.path or "a region between the blocks",
                                      do="call the model inside `with fxopt.differentiable_twice():`: its graphs then run operator by operator under autograd")
        plan = ctx.compiled.split
        tensors = ctx.saved_tensors
        unplanned = [i for i, t in enumerate(tangents) if t is not None and i not in plan.tangents and i in ctx.runner.quiet]
        if unplanned:
            log.warning("fxopt: the gradient of output %s of %s is used; the region is planned again with it", unplanned,
                        ctx.runner.region.path or "a region between the blocks")
            given = iter(tensors[ctx.n_saved:])
            args = [next(given) if a is None else a[0] for a in ctx.arguments]
            ctx.runner.quiet = frozenset(i for i in ctx.runner.quiet if i not in unplanned)
            return (None, None, *ctx.runner.gradients_eagerly(args, tangents))
        if plan.backward is None or all(tangents[i] is None for i in plan.tangents):
            return (None,) * (2 + ctx.n_args)
        values = iter(tensors[: ctx.n_saved])
        saved = [next(values) if p is None else p[0] for p in ctx.plain]
        if ctx.packet is not None:
            for k, value in zip(ctx.away, ctx.packet.take()):
                saved[k] = value
        del tensors, values
        wanted = [_as_traced(tangents[i], ctx.layouts[i]) for i in plan.tangents]
        grads = _execute(plan.backward, (*saved, *wanted), ctx.runner, "backward")
        found: list[Any] = [None] * ctx.n_args
        given = {i for i, t in enumerate(tangents) if t is not None}
        for index, grad in zip(plan.wanted, grads):
            if ctx.runner.influences[index] & given:  # else there is no gradient, which is not a gradient of zeros
                found[index] = grad
        return (None, None, *found)


def _as_traced(tangent: torch.Tensor | None, layout: Any) -> torch.Tensor:
    """The tangent with the strides that the backward was traced with (those of the output); zeros for a missing one."""
    if layout is None:
        raise LowerError("an output that is not a tensor received a gradient")
    shape, stride, dtype, device = layout
    if tangent is None:
        return torch.zeros(shape, dtype=dtype, device=device).as_strided(shape, stride) if len(shape) == 0 else _like(shape, stride, dtype, device).zero_()
    if tangent.stride() == stride:
        return tangent
    return _like(shape, stride, tangent.dtype, device).copy_(tangent)


def _like(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)
