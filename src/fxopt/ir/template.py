"""Templates: plain functions as canonical graphs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, copy_graph, effectful
from fxopt.ir.index import static
from fxopt.ir.normal import normalize
from fxopt.ir.program import Program, Signature
from fxopt.torch_private import FakeTensorMode, make_fx, pytree

# Distinct stand-ins for dynamic sizes: primes, larger than the static sizes they could be mistaken for.
_PRIMES = (7919, 7927, 7933, 7937, 7949, 7951, 7963, 7993, 8009, 8011, 8017, 8039)
_NOTHING = pytree.tree_structure(())


@dataclass(frozen=True)
class Template:
    """A traced function: its input nodes by name, its result, and how many operators it takes."""

    inputs: Mapping[str, fx.Node]
    output: fx.Node
    size: int


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtypes as written: passes may run inside the caller's autocast region."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def trace(fn: Callable[..., torch.Tensor], inputs: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> Template:
    """The canonical graph of `fn(*inputs, **scalars)`.

    Args:
        fn: takes the tensors in order and the scalars by keyword; returns one tensor; draws no random numbers.
        inputs: distinct tensors by name; only shapes and dtypes matter.
    """
    mode = FakeTensorMode()  # no memory, whatever the sizes
    with mode:  # rows are contiguous, as reading pairs as complex numbers needs
        examples = [torch.empty(value.shape, dtype=value.dtype) for value in inputs.values()]
    # layer_norm says in an argument whether cuDNN may be used; torch.export, which captured the program, switches it off
    with without_autocast(), torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        traced = make_fx(lambda *tensors: (fn(*tensors, **scalars),), pre_dispatch=True)(*examples)
    graph, _ = copy_graph(traced.graph)
    program = Program(graph, {}, Signature(_NOTHING, (), _NOTHING), mode)
    edit = Edit(program, by="pattern")
    while normalize(edit):
        pass
    nodes = edit.nodes
    holders = [node for node in nodes if node.op == "placeholder"]
    result = nodes[-1].args[0][0]
    bad = [node for node in nodes[:-1] if node.op != "placeholder" and effectful(node)]
    if bad or len(holders) != len(inputs) or not isinstance(result, fx.Node):
        raise PassError(f"{fn.__name__} is no pattern: it must compute one tensor from its inputs", where=str(bad[0].target) if bad else None,
                        do="write it without in-place and random operators")
    return Template(dict(zip(inputs, holders)), result, sum(node.op == "call_function" for node in nodes))


def emit(edit: Edit, fn: Callable[..., torch.Tensor], inputs: Sequence[fx.Node | float], like: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """Put the operators of `fn(*inputs)` into a graph, in front of `like`. Returns the result and what was made.

    Args:
        inputs: nodes, and numbers that stay what they are.

    Raises:
        PassError: `fn` reads a size that is not known.
    """
    sizes = Sizes()
    nodes = [each for each in inputs if isinstance(each, fx.Node)]
    examples = (sizes.example(meta.tensor(each)) if isinstance(each, fx.Node) else each for each in inputs)
    template = _template(fn, tuple((tuple(each.shape), each.dtype) if isinstance(each, torch.Tensor) else each for each in examples))
    env = dict(zip(template.inputs.values(), nodes))
    made: list[fx.Node] = []
    for node in template.output.graph.nodes:
        if node.op != "call_function":
            continue
        if any(type(item) is int and item in sizes.known.values() for item in pytree.tree_leaves((node.args, node.kwargs))):
            raise PassError(f"{fn.__name__} reads a size", do="write it without")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = edit.call(node.target, tuple(args), dict(kwargs), like=like)
        made.append(env[node])
    return env[template.output], made


@functools.cache
def _template(fn: Callable[..., torch.Tensor], inputs: tuple[tuple[tuple[int, ...], torch.dtype] | float, ...]) -> Template:
    """`fn` of tensors of these types, and of these numbers."""

    def of_tensors(*tensors: torch.Tensor) -> torch.Tensor:
        rest = iter(tensors)
        return fn(*(next(rest) if isinstance(each, tuple) else each for each in inputs))

    of_tensors.__name__ = fn.__name__
    types = [each for each in inputs if isinstance(each, tuple)]
    return trace(of_tensors, {str(i): torch.empty(shape, dtype=dtype, device="meta") for i, (shape, dtype) in enumerate(types)}, {})


class Sizes:
    """Stand-ins for dynamic sizes: equal expressions get equal numbers."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def number(self, size: Any) -> int | None:
        """The stand-in of a size; None if it is dynamic and does not occur in an input."""
        fixed = static(size)
        return self.known.get(str(size)) if fixed is None else fixed

    def example(self, val: torch.Tensor) -> torch.Tensor:
        """A meta tensor of the same rank, dtype and static sizes."""
        for size in val.shape:
            if static(size) is None and str(size) not in self.known:
                if len(self.known) == len(_PRIMES):
                    raise PassError(f"a pattern input has more than {len(_PRIMES)} dynamic sizes")
                self.known[str(size)] = _PRIMES[len(self.known)]
        return torch.empty([self.number(size) for size in val.shape], dtype=val.dtype, device="meta")
