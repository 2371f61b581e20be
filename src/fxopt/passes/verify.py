"""What a pass promised, checked on values: outputs, all gradients and all buffers of the program before and after.

How much may two runs differ that are equal in exact arithmetic? That depends on the program: the gradient of a bias in
front of a batch norm is zero, and what a run shows of it is rounding alone. So the allowed error is measured. The program
runs in fp64 (the truth), and in fp64 with every operation's result, and every gradient on the way back, moved by a
rounding or two of the operation's own dtype in a random direction. What these runs are off by, and what the program itself is
off by, is what rounding can do here; a pass may be off by a small factor of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from fxopt.errors import CheckError
from fxopt.ir import meta
from fxopt.ir.edit import random
from fxopt.ir.program import Program
from fxopt.kernels import tolerance
from fxopt.passes.base import Pass

SEED = 0
NOISY_RUNS = 8
ROUNDINGS = 2  # how many roundings of its own dtype one operation's result is moved by: a sum inside it has more than one
_LOW = {torch.float16, torch.bfloat16, torch.float32}
# Operations whose draws do not depend on the dtype: the same seed gives an fp64 run the same mask.
_SAME_DRAWS = {torch.ops.aten.dropout.default, torch.ops.aten.scaled_dot_product_attention.default}


@dataclass
class Draws:
    """Random tensors of a run by node name, so that a run in another dtype can take the same ones."""

    values: dict[str, Any] = field(default_factory=dict)
    replay: bool = False


class _Rounded(torch.autograd.Function):
    """Move every element by `eps` times its size, up or down at random; the same on the way back."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
        ctx.eps, ctx.generator = eps, generator
        return _moved(value, eps, generator)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _moved(grad, ctx.eps, ctx.generator), None, None


def _moved(value: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8).to(value.device, torch.float64) * 2 - 1
    return value * (1 + eps * signs)


class _Run(fx.Interpreter):
    """Interpret a program: in its own dtypes, or in fp64, or in fp64 with the roundings of its own dtypes put back by `noise`."""

    def __init__(self, program: Program, state: Mapping[str, torch.Tensor], double: bool, draws: Draws, noise: torch.Generator | None = None) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=True, graph=program.graph)
        self.program, self.state, self.double, self.draws, self.noise = program, state, double, draws, noise

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.state:
            return self.state[target]
        value = self.program.constants[target]
        return upcast(value) if self.double and isinstance(value, torch.Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        made = self.run_exactly(n)
        if not self.double or n.op != "call_function":
            return made
        if isinstance(n.target, torch._ops.OpOverload) and _aliases(n.target):
            if not _casts(n):
                return made
            made = made.clone()  # in fp64 the cast is none and would share memory that the program copies
        if self.noise is None:
            return made
        kinds = iter(pytree.tree_leaves(n.meta.get("val")))
        return pytree.tree_map(lambda out: self.rounded(out, next(kinds, None)), made)

    def rounded(self, out: Any, fake: Any) -> Any:
        if isinstance(out, torch.Tensor) and out.dtype is torch.float64 and isinstance(fake, torch.Tensor) and fake.dtype in _LOW:
            return _Rounded.apply(out, ROUNDINGS * torch.finfo(fake.dtype).eps, self.noise)
        return out

    def run_exactly(self, n: fx.Node) -> Any:
        if n.op != "call_function" or not random(n) or n.target in _SAME_DRAWS or not isinstance(n.target, torch._ops.OpOverload):
            return super().run_node(n)
        if self.draws.replay and n.name in self.draws.values:
            drawn = upcast(self.draws.values[n.name])
            if not n.target._schema.is_mutable:
                return drawn
            into = self.fetch_args_kwargs_from_env(n)[0][0]
            return into.copy_(drawn)
        made = super().run_node(n)
        if isinstance(made, torch.Tensor):
            self.draws.values[n.name] = made.detach().clone()
        return made

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.double:
            if target is torch.ops.aten._assert_tensor_metadata.default:
                return None  # it asserts the dtypes that this run replaces
            args, kwargs = pytree.tree_map(lambda a: torch.float64 if isinstance(a, torch.dtype) and a in _LOW else a, (args, kwargs))
        return super().call_function(target, args, kwargs)


def _aliases(target: torch._ops.OpOverload) -> bool:
    """Whether an operation returns memory it was given: a view, or a write in place. Neither rounds by itself."""
    return any(result.alias_info is not None for result in target._schema.returns)


def _casts(node: fx.Node) -> bool:
    """Whether the node's value has another dtype than its first argument."""
    source, made = meta.tensor(node.args[0]) if node.args else None, meta.tensor(node)
    return source is not None and made is not None and source.dtype != made.dtype


def upcast(value: torch.Tensor) -> torch.Tensor:
    """A float tensor in fp64; any other as it is."""
    if value.is_complex():
        return value.to(torch.complex128)
    return value.double() if value.dtype in _LOW else value


def values(program: Program, inputs: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor], *, double: bool = False,
           draws: Draws | None = None, noise: int | None = None, scalars: bool = False) -> dict[str, torch.Tensor]:
    """Everything a step shows, by name: `output 0`, `gradient of w`, `gradient of input x`, `buffer b`.

    The gradients are those of the sum of all float outputs, each times a fixed random tensor. The random state is reset
    to a fixed seed before and restored after; `inputs` and `state` are not changed.

    Args:
        double: compute every float in fp64: the reference.
        draws: random tensors recorded by an earlier run, or to be recorded here.
        noise: with `double`, put roundings back in random directions, by this seed.
        scalars: leave out outputs that have dimensions (see `Promise.outputs`).
    """
    take = upcast if double else (lambda value: value)
    held = {name: take(value.detach()).clone().requires_grad_(name in program.slots and program.trainable(name)) for name, value in state.items()}
    given = [take(value.detach()).clone().requires_grad_(value.requires_grad) for value in inputs]
    default = torch.get_default_dtype()
    generator = None if noise is None else torch.Generator().manual_seed(noise)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(SEED)
        torch.set_default_dtype(torch.float64 if double else default)
        try:
            outputs = _Run(program, held, double, draws or Draws(), generator).run(*given)
            outputs = [None if scalars and isinstance(out, torch.Tensor) and out.dim() else out for out in outputs]
        finally:
            torch.set_default_dtype(default)
        seeds = []
        for i, out in enumerate(outputs):
            if isinstance(out, torch.Tensor) and out.requires_grad:
                seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED + i), dtype=torch.float64) if out.dim() else torch.ones((), dtype=torch.float64)
                seeds.append((out, seed.to(out.device, out.dtype)))
        leaves = {f"gradient of {name}": value for name, value in held.items() if value.requires_grad}
        leaves |= {f"gradient of input {node.name}": value for node, value in zip(program.placeholders, given) if value.requires_grad}
        grads = torch.autograd.grad([out for out, _ in seeds], list(leaves.values()), [seed for _, seed in seeds], allow_unused=True) if seeds and leaves else ()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs) if isinstance(out, torch.Tensor)}
    found |= {name: grad for name, grad in zip(leaves, grads) if grad is not None}
    found |= {f"buffer {name}": value.detach() for name, value in held.items() if name in program.slots and program.slots[name].kind == "buffer"}
    return found


def materialize(program: Program, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with first values for the slots that passes introduced."""
    known, memo = dict(state), {}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(SEED)
        for name, slot in program.slots.items():
            if name not in known and slot.made is not None:
                known[name] = slot.made.value(known.get(slot.made.source) if slot.made.source is not None else None, memo)
    return known


def _drawn(program: Program) -> list[str]:
    """What the program's random operations draw, in order."""
    return [f"{node.target} {meta.describe(meta.value(node))}" for node in program.nodes if node.op == "call_function" and random(node)]


def check(pass_: Pass, before: Program, after: Program, inputs: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor]) -> str:
    """Compare a step of `before` and of `after`; return a note on what was found.

    Args:
        inputs: one tensor per placeholder.
        state: a value for every slot of `before` and of `after` (see `materialize`).

    Raises:
        CheckError: naming the tensor that differs most, and by how much.
    """
    for assumption in after.assumptions:
        names = [node.name for node in after.placeholders]
        if assumption not in before.assumptions and assumption.leaf in names and not assumption.holds(inputs[names.index(assumption.leaf)]):
            return f"values not compared: the given {assumption.leaf} does not meet the pass's assumption"
    if pass_.promise.values == "bounded":
        return "values not compared: the pass promises an approximation"
    if pass_.promise.random == "declared" and _drawn(before) != _drawn(after):
        return "values not compared: the pass draws random numbers of its own, and the others come out differently"
    draws, scalars = Draws(), pass_.promise.outputs == "declared"
    old = values(before, inputs, state, draws=draws, scalars=scalars)
    new = values(after, inputs, state, scalars=scalars)
    shared = [name for name in old if name in new]
    lost = [name for name in old if name not in new and not (name.startswith("gradient of ") and pass_.promise.gradients == "declared")]
    if lost:
        raise CheckError(f"{lost[0]} is gone", where=f"after {pass_}")
    if pass_.promise.values in ("exact", "same"):
        for name in shared:
            if not torch.equal(old[name], new[name]) and not _both_nan(old[name], new[name]):
                raise CheckError(f"{name} is not bitwise equal: {_difference(old[name], new[name])}", where=f"after {pass_}",
                                 do=f"this is a bug of {pass_.name}: it promises exactly equal values")
        return f"values compared: {len(shared)} tensors bitwise equal"
    draws.replay = True
    truth = values(before, inputs, state, double=True, draws=draws, scalars=scalars)
    spread: dict[str, float] = {}
    ratios: dict[str, float] = {}
    # one run is now and then exact by luck: before a pass is blamed, see what rounding can do, by ever more runs
    for errors in _rounding(before, inputs, state, old, truth, draws, scalars):
        for name, error in errors.items():
            spread[name] = max(spread.get(name, 0.0), error)
        ratios = {name: excess(new[name], old[name], truth[name], spread[name]) for name in shared}
        if all(ratio <= 1.0 for ratio in ratios.values()):
            break
    name = max(ratios, key=lambda name: (ratios[name] != ratios[name], ratios[name]), default="")
    if name and not ratios[name] <= 1.0:
        raise CheckError(f"{name} differs: {_difference(old[name], new[name])}, {ratios[name]:.3g} times what rounding explains",
                         where=f"after {pass_}", do=f"this is a bug of {pass_.name}, or its promise should be 'bounded'")
    return f"values compared: {len(shared)} tensors" + (f", worst {name} at {ratios[name]:.2g} of the allowed error" if name else "")


def _rounding(program: Program, inputs: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor],
              truth: Mapping[str, torch.Tensor], draws: Draws, scalars: bool) -> Iterator[dict[str, float]]:
    """How far from fp64 the program's values are by rounding alone: its own, those with noise, those on nearby inputs and state."""
    yield {name: _error(own[name], truth[name]) for name in own}
    for i in range(NOISY_RUNS):
        noisy = values(program, inputs, state, double=True, draws=draws, noise=SEED + i, scalars=scalars)
        yield {name: _error(noisy[name], truth[name]) for name in own}
    generator = torch.Generator().manual_seed(SEED)

    def near(value: torch.Tensor) -> torch.Tensor:
        if value.dtype not in _LOW:
            return value
        return tolerance.nearby(value.detach().cpu(), generator).to(value.device).requires_grad_(value.requires_grad)

    for _ in range(tolerance.NEARBY):
        moved, held = [near(value) for value in inputs], {name: near(value) for name, value in state.items()}
        eager = values(program, moved, held, scalars=scalars)
        exact = values(program, moved, held, double=True, draws=draws, scalars=scalars)
        yield {name: _error(eager[name], exact[name]) for name in eager.keys() & exact.keys()}


def _error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest finite difference; 0 for tensors that hold no floats."""
    if value.shape != truth.shape or not (value.is_floating_point() or value.is_complex()):
        return 0.0
    error = (upcast(value) - upcast(truth)).abs()
    error = error[error.isfinite()]
    return float(error.max()) if error.numel() else 0.0


def excess(got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, spread: float) -> float:
    """The largest error of `got` against `truth`, as a multiple of the allowed one (`kernels.tolerance`, `spread` for eager's error).

    Integers must be equal to eager's, and elements that are not finite must be where eager's are.
    """
    if got.shape != eager.shape or got.dtype != eager.dtype:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    if not (got.is_floating_point() or got.is_complex()):
        return 0.0 if torch.equal(got, eager) else float("inf")
    finite = eager.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return float("inf")
    exact = upcast(truth)[finite]
    if exact.numel() == 0:
        return 0.0
    unit = torch.finfo(got.dtype)
    allowed = tolerance.EAGER * spread + tolerance.ULPS * unit.eps * exact.abs() + unit.tiny
    return float(((upcast(got)[finite] - exact).abs() / allowed).max())


def _both_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """How much two tensors differ, in words."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}"
    gap = (a.double() - b.double()).abs()
    at = int(gap.flatten().nan_to_num(float("inf")).argmax())
    return f"{a.flatten()[at].item():.6g} became {b.flatten()[at].item():.6g} at element {at} of {a.numel()}"
