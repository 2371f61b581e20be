"""A step of a program, interpreted: in its own dtypes, in fp64 (the truth), or in fp64 with its own roundings put back at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import random
from fxopt.ir.facts import Stored
from fxopt.ir.program import Program
from fxopt.torch_private import OpOverload, pytree

SEED = 0
ROUNDINGS = 2  # how many roundings of its own dtype one operation's result is moved by: a sum inside it has more than one
_LOW = {torch.float16, torch.bfloat16, torch.float32}
# Operations whose draws do not depend on the dtype: the same seed gives an fp64 run the same mask.
_SAME_DRAWS = {torch.ops.aten.dropout.default, torch.ops.aten.scaled_dot_product_attention.default}


@dataclass
class Draws:
    """What a run leaves behind beside values.

    Attributes:
        values: its random tensors by node name, so that a run in another dtype can take the same ones (`replay`).
        shared: for each output that is a tensor, the inputs, state and earlier outputs whose memory it shares.
    """

    values: dict[str, Any] = field(default_factory=dict)
    replay: bool = False
    shared: tuple[tuple[str, ...], ...] = ()


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


class _Run:
    """Interpret a program: in its own dtypes, or in fp64, or in fp64 with the roundings of its own dtypes put back by `noise`.

    A loop of its own: `fx.Interpreter` takes twice the time of small operations, and a certificate interprets hundreds of times.
    """

    def __init__(self, program: Program, state: Mapping[str, torch.Tensor], double: bool, draws: Draws, noise: torch.Generator | None = None, fine: bool = False) -> None:
        self.program, self.state, self.double, self.draws, self.noise, self.fine = program, state, double, draws, noise, fine

    def run(self, inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
        """The flat outputs. A value is let go behind its last reader."""
        nodes = self.program.nodes
        over: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(nodes):
            last = [source for source in node.all_input_nodes if source not in seen]
            seen.update(last)
            over[node] = last if node in seen or node.op == "output" else [*last, node]
        env: dict[Any, Any] = {}
        given = iter(inputs)
        for node in nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                env[node] = self.read(str(node.target))
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            else:
                env[node] = self.call(node, *fx.node.map_aggregate((node.args, node.kwargs), lambda a: self.argument(env, a)))
            for source in over[node]:
                del env[source]
        raise AssertionError("a graph without an output")

    def argument(self, env: Mapping[Any, Any], value: Any) -> Any:
        """An argument's value; in fp64, dtypes are fp64."""
        if isinstance(value, fx.Node):
            return env[value]
        return torch.float64 if self.double and isinstance(value, torch.dtype) and value in _LOW else value

    def read(self, name: str) -> Any:
        """A slot's or a constant's value."""
        if name in self.state:
            return self.state[name]
        value = self.program.constants[name]
        return upcast(value) if self.double and isinstance(value, torch.Tensor) else value

    def call(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a call, with its roundings where they are wanted."""
        made = self.called(n, args, kwargs)
        if not self.double:
            return made
        if isinstance(n.target, OpOverload) and _aliases(n.target):
            if not _casts(n):
                return made
            made = made.clone()  # in fp64 the cast is none and would share memory that the program copies
        if self.noise is None:
            return made
        kinds = iter(pytree.tree_leaves(n.meta.get("val")))
        return pytree.tree_map(lambda out: self.rounded(out, next(kinds, None)), made)

    def rounded(self, out: Any, fake: Any) -> Any:
        if isinstance(out, torch.Tensor) and out.dtype is torch.float64 and isinstance(fake, torch.Tensor) and fake.dtype in _LOW:
            return _Rounded.apply(out, ROUNDINGS * torch.finfo(torch.float64 if self.fine else fake.dtype).eps, self.noise)
        return out

    def called(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a call; what it draws, as it was drawn before."""
        if self.double and n.target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # it asserts the dtypes that this run replaces
        if self.noise is not None and n.target is torch.ops.aten.scaled_dot_product_attention.default and not random(n):
            return self.attention(*args, **kwargs)
        if not random(n) or n.target in _SAME_DRAWS or not isinstance(n.target, OpOverload):
            return n.target(*args, **kwargs)
        if self.draws.replay and n.name in self.draws.values:
            drawn = upcast(self.draws.values[n.name])
            if not n.target._schema.is_mutable:
                return drawn
            return args[0].copy_(drawn)
        made = n.target(*args, **kwargs)
        if isinstance(made, torch.Tensor):
            self.draws.values[n.name] = made.detach().clone()
        return made

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None, dropout: float = 0.0,
                  causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> torch.Tensor:
        """Scaled dot product attention, written out, with what kernels round inside.

        With P the weights and O = PV, the gradient of the scores is P (dP - sum(dO O)): two sums, in fp32 at least, that are equal where a weight is 1.
        What is left of them is their rounding: it grows with dO O, not with the gradient, so no noise on results shows it, and kernels are
        exact on nine in ten such calls by luck (bf16, heads of 4). Here the second sum is the gradient of the logarithm of the sum of exponentials, and moved.
        """
        if enable_gqa:
            key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
        empty = (scores == float("-inf")).all(-1, keepdim=True)
        scores = scores.masked_fill(empty, 0.0)
        total = scores.logsumexp(-1, keepdim=True)
        moved = _Rounded.apply(total, ROUNDINGS * torch.finfo(torch.float64 if self.fine else torch.float32).eps, self.noise)
        return (scores - (total.detach() + moved - moved.detach())).exp().masked_fill(empty, 0.0) @ value


def _aliases(target: OpOverload) -> bool:
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
           draws: Draws | None = None, noise: int | None = None, fine: bool = False, scalars: bool = False,
           derive: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None) -> dict[str, torch.Tensor]:
    """Everything a step shows, by name: `output 0`, `gradient of w`, `gradient of input x`, `buffer b`.

    The gradients are those of the sum of all float outputs, each times a fixed random tensor. The random state is reset
    to a fixed seed before and restored after; `inputs` and `state` are not changed.

    Args:
        double: compute every float in fp64: the reference.
        draws: random tensors recorded by an earlier run, or to be recorded here.
        noise: with `double`, put roundings back in random directions, by this seed. fine: fp64's roundings, not those of the program's dtypes.
        scalars: leave out outputs that have dimensions (see `Promise.outputs`).
        derive: computes some of the state from the rest, differentiably: `state` then has values for what it is computed from too, and
            gradients are those of that.
    """
    draws = draws or Draws()
    take = upcast if double else (lambda value: value)
    held = {name: (value.detach() if _stored(program, name) else take(value.detach())).clone().requires_grad_(_learns(program, name, value, derive is not None)) for name, value in state.items()}
    given = [take(value.detach()).clone().requires_grad_(value.requires_grad) for value in inputs]
    default = torch.get_default_dtype()
    generator = None if noise is None else torch.Generator().manual_seed(noise)
    with torch.random.fork_rng(), torch.enable_grad():
        _seed()
        torch.set_default_dtype(torch.float64 if double else default)
        try:
            state = held if derive is None else {**held, **derive(held)}
            outputs = _Run(program, state, double, draws, generator, fine).run(given)
            if not double:
                draws.shared = _shared(program, outputs, given, state)
            outputs = [None if scalars and isinstance(out, torch.Tensor) and out.dim() else out for out in outputs]
        finally:
            torch.set_default_dtype(default)
        return _shown(program, outputs, given, held)


def bound_values(program: Program, run: Callable[[list[torch.Tensor]], Sequence[Any]], inputs: Sequence[torch.Tensor], live: Mapping[str, torch.Tensor], *,
                 scalars: bool = False) -> dict[str, torch.Tensor]:
    """What `values` shows, of something else that computes the program: `run(inputs)` gives its flat outputs and reads the tensors `live`.

    Buffers and random state are put back.
    """
    given = [value.detach().clone().contiguous().requires_grad_(value.requires_grad) for value in inputs]
    kept = {name: live[name].detach().clone() for name, slot in program.slots.items() if slot.kind == "buffer" and name in live}
    with torch.random.fork_rng(), torch.enable_grad():
        _seed()
        try:
            outputs = [None if scalars and isinstance(out, torch.Tensor) and out.dim() else out for out in run(given)]
            found = _shown(program, outputs, given, live)
            return {name: value.clone() for name, value in found.items()}
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    live[name].copy_(value)


def _shown(program: Program, outputs: Sequence[Any], given: Sequence[torch.Tensor], held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs, gradients and buffers by name, see `values`."""
    seeds = []
    for i, out in enumerate(outputs):
        if isinstance(out, torch.Tensor) and out.requires_grad:
            seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(SEED + i), dtype=torch.float64) if out.dim() else torch.ones((), dtype=torch.float64)
            seeds.append((out, seed.to(out.device, out.dtype)))
    leaves = {f"gradient of {name}": value for name, value in held.items() if value.requires_grad}
    leaves |= {f"gradient of input {node.name}": value for node, value in zip(program.placeholders, given) if value.requires_grad}
    grads = torch.autograd.grad([out for out, _ in seeds], list(leaves.values()), [seed for _, seed in seeds], allow_unused=True) if seeds and leaves else ()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs) if isinstance(out, torch.Tensor)}
    found |= {name: grad.to_dense() if grad.is_sparse else grad for name, grad in zip(leaves, grads) if grad is not None}
    found |= {f"buffer {name}": value.detach() for name, value in held.items() if name in program.slots and program.slots[name].kind == "buffer"}
    return found


def _seed() -> None:
    """As torch.manual_seed, which takes 2 ms where there is no GPU: it keeps the call, with its stack, for when there will be one."""
    torch.default_generator.manual_seed(SEED)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(SEED)


def _stored(program: Program, name: str) -> bool:
    """Whether a tensor is part of a quantized weight: it keeps its dtype, and what it stands for is computed in fp64."""
    slot = program.slots.get(name)
    return slot is not None and slot.made is not None and isinstance(slot.made.facts, Stored)


def _learns(program: Program, name: str, value: torch.Tensor, derived: bool) -> bool:
    """Whether a gradient is taken. What other state is derived from is no slot of the program."""
    return program.trainable(name) if name in program.slots else derived and value.is_floating_point() and name not in program.constants


def _shared(program: Program, outputs: Sequence[Any], given: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    """See `Draws.shared`."""
    known: dict[int, list[str]] = {}
    for name, value in (*((f"input {node.name}", value) for node, value in zip(program.placeholders, given)), *((f"state {name}", t) for name, t in state.items())):
        known.setdefault(value.untyped_storage().data_ptr(), []).append(name)
    found = []
    for i, out in enumerate(outputs):
        if isinstance(out, torch.Tensor):
            same = known.setdefault(out.untyped_storage().data_ptr(), [])
            found.append(tuple(same) if out.numel() else ())
            same.append(f"output {i}")
    return tuple(found)


def materialize(program: Program, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with first values for the slots that passes introduced."""
    known, memo = dict(state), {}
    with torch.random.fork_rng(), torch.no_grad():
        _seed()
        for name, slot in program.slots.items():
            if name not in known and slot.made is not None:
                known[name] = slot.made.value(known.get(slot.made.source) if slot.made.source is not None else None, memo)
    return known
