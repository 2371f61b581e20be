"""FusedOp: one operation that replaces a subgraph, and its registration with `torch.library`.

An op lives in one folder. Its plain PyTorch reference is the oracle of its tests and the source of
its match patterns; its ATen body is what runs where no better kernel is known; its fake
implementation gives shapes and strides to tracers. The backward is an op of its own, so that a
traced joint graph holds `fxopt.X_backward` as one node and a pass can see what it reads.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.library import Library, register_autograd, register_fake

from fxopt.errors import CheckError
from fxopt.torch_private import OpOverload

NAMESPACE = "fxopt"
# The registrations live as long as this object does.
_LIBRARY = Library(NAMESPACE, "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)


@dataclass(frozen=True)
class Kernel:
    """One `torch.library` operator.

    Args:
        schema: `name(arguments) -> results` in the torch schema language. A result that a `bool[]`
            argument switches off is None (an undefined tensor), as in ATen's own `*_backward`.
        body: plain ATen code; runs on every device that has no kernel of its own. It never writes
            to its inputs and returns no alias of them.
        fake: same arguments; returns tensors of the right shape, dtype and strides, from SymInts too.
        cuda: `"module:function"` of the CUDA kernel, imported at its first call (so that Triton is
            not needed elsewhere), or None while the ATen body serves CUDA as well.
        rows: positions of the arguments that hold rows (all dimensions but the last; statistics of rows lack that one), if rows do not
            meet: a result that holds rows is that of each row by itself, any other is the sum over the rows. None: nothing is said.
    """

    schema: str
    body: Callable
    fake: Callable
    cuda: str | None = None
    rows: frozenset[int] | None = None

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @property
    def overload(self) -> OpOverload:
        """`torch.ops.fxopt.<name>.default`: the target of the nodes in a graph."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


@dataclass(frozen=True)
class Bind:
    """In `Pattern.arguments`: what the match bound to this input or scalar of the pattern."""

    name: str


@dataclass(frozen=True)
class Apply:
    """In `Pattern.arguments`: what a function makes of some of the pattern's inputs.

    Args:
        fn: plain PyTorch, tensors to one tensor: views, casts, joins. It reads no sizes, so that it can
            be traced into a program whose sizes are not known.
        names: the inputs that it takes, in order.
    """

    fn: Callable[..., torch.Tensor]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Pattern:
    """One way in which programs write the op.

    Args:
        name: unique within the op; shown when a rule fires or narrowly misses.
        fn: plain function `fn(*tensors, *, **scalars)`; the scalars are keyword-only. It is traced
            with the examples below, and every literal that came from a scalar becomes a variable.
        inputs: tensor name to (shape, dtype) of an example, in the order of fn's parameters. All
            sizes within one pattern are distinct and occur nowhere else as a literal.
        scalars: scalar name to an example value that occurs nowhere else in the traced graph. A
            scalar may stand in several places (a slice's end and the next one's start) and in lists
            (a normalized shape); all must agree.
        arguments: op argument name to `Bind(name)`, `Apply(fn, names)` or a constant. Every op
            argument is named.
        output: which of the op's results replaces the pattern's result.
        check: given {name: bound tensor (real or fake) or scalar} under the names of `inputs` and
            `scalars`, says why the match must be refused, or None to accept it.
    """

    name: str
    fn: Callable
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    arguments: Mapping[str, object]
    scalars: Mapping[str, float | int] = field(default_factory=dict)
    output: int = 0
    check: Callable[[Mapping[str, object]], str | None] | None = None

    def examples(self) -> dict[str, torch.Tensor]:
        """Distinct example tensors by input name (the same tensor twice would alias in a trace)."""
        return {
            name: torch.rand(shape, dtype=dtype if dtype.is_complex else torch.float32).add(0.5).to(dtype)
            for name, (shape, dtype) in self.inputs.items()
        }

    def bind(self, bound: Mapping[str, object], apply: Callable = lambda fn, *inputs: fn(*inputs)) -> dict[str, object]:
        """The op's arguments by name, from what the match bound to inputs and scalars.

        Args:
            apply: calls the function of an `Apply`; a pass puts its operators into a graph instead.
        """
        found = {}
        for argument, value in self.arguments.items():
            if isinstance(value, Apply):
                found[argument] = apply(value.fn, *(bound[name] for name in value.names))
            else:
                found[argument] = bound[value.name] if isinstance(value, Bind) else value
        return found


@dataclass(frozen=True)
class Case:
    """One drawn call of an op, for tests and bench rows.

    Args:
        args: positional arguments of the forward op; tensors do not require grad yet. A list of tensors lies open: one
            entry for each of its tensors, and `lists` says which.
        grads: positions in args whose gradient is asked for.
        expanded: pass a stride-0 grad_output, as `out.sum().backward()` does.
        seed: of the grad_output.
        lists: (start, stop) ranges of args that the op takes as one list each; in order, an empty one as (i, i).
        fixed: positions of tensors that stay fp32 where the rest of an fp32 case is cast (averages, scales, tables).
    """

    args: tuple
    grads: tuple[int, ...] = ()
    expanded: bool = False
    seed: int = 0
    lists: tuple[tuple[int, int], ...] = ()
    fixed: tuple[int, ...] = ()

    def packed(self, args: Sequence[object] | None = None) -> list[object]:
        """The arguments as the op takes them: `args` (default: the case's own) with the lists closed."""
        rest = list(self.args if args is None else args)
        for start, stop in reversed(self.lists):
            rest[start:stop] = [rest[start:stop]]
        return rest


@dataclass(frozen=True)
class FusedOp:
    """An operation with a reference, an ATen body, a backward and the patterns that it replaces.

    Args:
        forward: the operator that graphs hold.
        reference: same arguments as forward; plain, differentiable PyTorch written as models write
            it; returns the tuple of forward's first `outputs` results.
        outputs: how many leading results of forward carry a gradient (a negative number counts from the end, for an op
            that returns a list). The rest are kept for backward (statistics) and are marked non-differentiable.
        backward: the gradient operator, or None where nothing is differentiable.
        setup_context: `(ctx, inputs, output)`: saves what `vjp` needs, as little as possible.
        vjp: `(ctx, *grads of the first outputs)` to one gradient per forward argument; calls
            `backward.overload`. A grad is None where the output was not used.
        patterns: the ways in which programs write this op.
    """

    forward: Kernel
    reference: Callable
    outputs: int = 1
    backward: Kernel | None = None
    setup_context: Callable | None = None
    vjp: Callable | None = None
    patterns: Sequence[Pattern] = ()

    @property
    def name(self) -> str:
        return self.forward.name

    @property
    def folder(self) -> str:
        """The package of the op; `<folder>.cases` holds its test inputs (it needs hypothesis)."""
        return self.forward.body.__module__.rpartition(".")[0]

    @property
    def doc(self) -> str:
        """The contract of the op: the docstring of its body."""
        return self.forward.body.__doc__ or ""

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def overload(self) -> OpOverload:
        return self.forward.overload

    def __call__(self, *args: object) -> tuple[torch.Tensor, ...]:
        """Call the op; the first `outputs` results, always as a tuple."""
        result = self.overload(*args)
        return (result if isinstance(result, (tuple, list)) else (result,))[: self.outputs]


def register(op: FusedOp) -> FusedOp:
    """Define the op and its backward in the `fxopt` namespace. Returns the op."""
    for kernel in op.kernels:
        _define(kernel)
    if op.backward is None:
        _refuse_gradient(op.forward.name, "it has no derivative")
        return op
    _refuse_gradient(op.backward.name, "second derivatives are not implemented")

    def setup_context(ctx, inputs, output):
        results = output if isinstance(output, (tuple, list)) else (output,)
        kept = [result for result in results[op.outputs :] if result is not None]
        if kept:
            ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        op.setup_context(ctx, inputs, output)

    def vjp(ctx, *grads):
        every = grads[0] if isinstance(grads[0], list) else grads
        return op.vjp(ctx, *every[: op.outputs])

    register_autograd(f"{NAMESPACE}::{op.name}", vjp, setup_context=setup_context, lib=_LIBRARY)
    return op


def _define(kernel: Kernel) -> None:
    _LIBRARY.define(kernel.schema, tags=_TAGS)
    # One body for every device; a device with a kernel of its own has its own key above it.
    _LIBRARY.impl(kernel.name, _below_autocast(kernel.body), "CompositeExplicitAutograd")
    if kernel.cuda is not None:
        _LIBRARY.impl(kernel.name, _load_on_first_call(kernel.cuda), "CUDA")
    register_fake(f"{NAMESPACE}::{kernel.name}", kernel.fake, lib=_LIBRARY)


def _below_autocast(body: Callable) -> Callable:
    """The body with autocast off: an op says itself in which dtypes it computes."""

    @functools.wraps(body)
    def run(*args):
        device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return body(*args)
        with torch.autocast(device, enabled=False):
            return body(*args)

    return run


def _load_on_first_call(place: str) -> Callable:
    module, _, function = place.partition(":")
    loaded: list[Callable] = []

    def call(*args):
        if not loaded:
            loaded.append(getattr(importlib.import_module(module), function))
        return loaded[0](*args)

    return call


def _refuse_gradient(name: str, why: str) -> None:
    def refuse(ctx, *grads):
        raise CheckError(
            f"a gradient through fxopt::{name} was asked for, but {why}",
            do="detach its inputs, or keep the plain PyTorch form of this computation",
        )

    register_autograd(f"{NAMESPACE}::{name}", refuse, lib=_LIBRARY)
