"""Patterns traced from plain functions, and the matcher that finds them in a graph.

A pattern is an ordinary function of tensors and scalars. Finding it at a node takes two steps:

1. The *sketch*, traced once in one dtype, is compared with the graph while looking through casts. Scalars of the pattern
   are variables here. What it finds are candidates: a program node for each input, a number for each scalar.
2. The *proof*: the function is traced again on exactly the types and scalars of a candidate, brought into canonical form
   like the program, and must then be the same expression, cast by cast, argument by argument, shape by shape.

So no literal is ever accepted because it looks like another, and one function serves every dtype and rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.index import called, full_arguments
from fxopt.ir.template import Sizes, Template, trace

aten = torch.ops.aten

CAST = aten.to.dtype
COMMUTATIVE = frozenset({aten.mul.Tensor, aten.add.Tensor, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.eq.Tensor, aten.ne.Tensor,
                         aten.maximum.default, aten.minimum.default})
_SIZES = ("size", "shape", "sizes")  # arguments that a sketch does not compare
# Another shape for the same elements in the same order: which of these it is says nothing that the shape of the result does not.
RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
                      aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims})
_TRAIL = None  # key of the operators matched so far, beside the names of inputs and scalars


@dataclass(frozen=True)
class Match:
    """A place in a graph that computes a pattern.

    Attributes:
        anchor: the node whose value is the pattern's result.
        inputs: for each pattern input, the node that plays it.
        scalars: for each pattern scalar, its number.
        nodes: the matched operators, `anchor` among them.
    """

    anchor: fx.Node
    inputs: Mapping[str, fx.Node]
    scalars: Mapping[str, Any]
    nodes: frozenset[fx.Node]


@dataclass(frozen=True)
class Near:
    """A place that is nearly a pattern: the node where it fails, why, how many operators fit, and which."""

    node: fx.Node
    reason: str
    score: int
    nodes: frozenset[fx.Node]


Accept = Callable[[Mapping[str, fx.Node], Mapping[str, Any]], str | None]


@dataclass
class Matcher:
    """Finds one function in graphs.

    Args:
        fn: the function, see `trace`.
        shapes: example shape of each input; shapes that differ in the pattern are different.
        scalars: example value of each scalar; each occurs nowhere else as a literal.
        dtypes: of the inputs that are not real floating-point numbers.
    """

    fn: Callable[..., torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    scalars: Mapping[str, Any] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        examples = {name: torch.zeros(shape, dtype=self.dtypes.get(name, torch.float32)) for name, shape in self.shapes.items()}
        self.sketch = trace(self.fn, examples, self.scalars)
        self.proofs: dict[Any, Template | None] = {}
        self.names = {node: name for name, node in self.sketch.inputs.items()}

    @property
    def target(self) -> Any:
        """What the last operator calls."""
        return self.sketch.output.target

    def ends(self, graph: fx.Graph) -> list[fx.Node]:
        """The nodes that may be the last operator, in the graph's order: from its table, as there are many patterns and most end nowhere."""
        targets = RESHAPES if self.target in RESHAPES else {self.target}
        return sorted(node for target in targets for node in graph.find_nodes(op="call_function", target=target, sort=False))

    def at(self, node: fx.Node, accept: Accept = lambda inputs, scalars: None) -> Match | Near | None:
        """The match whose last operator, but for a cast, is `node`; the nearest miss; or None if nothing is alike.

        Args:
            accept: says why a candidate must be refused, or None.
        """
        self.near: Near | None = None
        for env in self._walk(self.sketch.output, node, {_TRAIL: ()}):
            for inputs in _bindings(env, self.sketch.inputs):
                scalars = {name: env[name] for name in self.scalars if name in env}
                found = self._prove(node, inputs, scalars, accept, frozenset(env[_TRAIL]))
                if found is not None:
                    return found
        return self.near

    # -- the sketch ------------------------------------------------------------------------------------------------

    def _walk(self, pattern: Any, value: Any, env: dict[Any, Any], reader: fx.Node | None = None) -> Iterator[dict[Any, Any]]:
        """Every way to read `value`, an argument of `reader`, as `pattern`, given what is bound so far."""
        if isinstance(pattern, (list, tuple)):
            if isinstance(value, (list, tuple)) and len(pattern) == len(value):
                yield from self._all(list(zip(pattern, value)), env, reader)
            else:
                self._fail(env, reader, f"`{reader.name}` ({reader.target}) has {_shown(value)} where the pattern has {_shown(pattern)}")
        elif not isinstance(pattern, fx.Node):
            yield from self._literal(pattern, value, env, reader)
        elif pattern in self.names:
            if isinstance(value, fx.Node) and meta.tensor(value) is not None:
                name, base = self.names[pattern], strip(value)
                reads = env.get(name, ())
                if not reads or strip(reads[0]) is base:
                    yield {**env, name: (*reads, value)}
                else:
                    self._fail(env, value, f"the pattern reads {name} twice where this reads {meta.placed(strip(reads[0]))} and {meta.placed(base)}")
        elif isinstance(value, fx.Node):
            node = value if pattern.target is CAST else strip(value)
            if not _alike(node, pattern.target):
                if node.op == "call_function":
                    self._fail(env, node, f"`{node.name}` calls {node.target}, not {pattern.target}")
                return
            env = {**env, _TRAIL: (*env[_TRAIL], node)}
            wanted, given = _comparable(pattern), _comparable(node)
            if wanted.keys() != given.keys():
                self._fail(env, node, f"`{node.name}` differs in the argument {sorted(wanted.keys() ^ given.keys())[0]}")
                return
            for order in _orders(pattern, wanted, given):
                yield from self._all(order, env, node)

    def _all(self, pairs: list[tuple[Any, Any]], env: dict[Any, Any], reader: fx.Node | None) -> Iterator[dict[Any, Any]]:
        if not pairs:
            yield env
            return
        (pattern, value), *rest = pairs
        for found in self._walk(pattern, value, env, reader):
            yield from self._all(rest, found, reader)

    def _literal(self, pattern: Any, value: Any, env: dict[Any, Any], node: fx.Node | None) -> Iterator[dict[Any, Any]]:
        name = next((name for name, example in self.scalars.items() if type(example) is type(pattern) and example == pattern), None)
        if name is None:
            if _equal(pattern, value):
                yield env
            else:
                self._fail(env, node, f"`{node.name}` ({node.target}) has {_shown(value)} where the pattern has {_shown(pattern)}")
        elif not _number(value):
            self._fail(env, node, f"{name} is {_shown(value)}, not a number known at compile time")
        elif name not in env or env[name] == value:
            yield {**env, name: value}
        else:
            self._fail(env, node, f"{name} is {env[name]} in one place and {value} in another")

    def _fail(self, env: Mapping[Any, Any], node: fx.Node, reason: str) -> None:
        trail = frozenset(env[_TRAIL])
        if self.near is None or len(trail) > self.near.score:
            self.near = Near(node, reason, len(trail), trail)

    # -- the proof -------------------------------------------------------------------------------------------------

    def _prove(self, node: fx.Node, inputs: dict[str, fx.Node], scalars: dict[str, Any], accept: Accept,
               trail: frozenset[fx.Node]) -> Match | None:
        everything = self.sketch.size  # a candidate that the sketch accepts is nearer than any that it refuses
        reason = accept(inputs, scalars)
        if reason is not None:
            self._refuse(node, reason, everything, trail)
            return None
        sizes = Sizes()
        examples = {name: sizes.example(meta.tensor(source)) for name, source in inputs.items()}
        key = (tuple((tuple(t.shape), t.dtype) for t in examples.values()), tuple(sorted(scalars.items())))
        if key not in self.proofs:
            try:
                self.fn(*examples.values(), **scalars)
            except (RuntimeError, ValueError, TypeError, IndexError):
                self.proofs[key] = None
            else:
                self.proofs[key] = trace(self.fn, examples, scalars)
        proof = self.proofs[key]
        if proof is None:
            types = ", ".join(f"{name} {meta.describe(meta.value(source))}" for name, source in inputs.items())
            self._refuse(node, f"the pattern cannot be computed on inputs of these types: {types}", everything, trail)
            return None
        heads = [user for user in node.users if called(user, CAST)] if called(proof.output, CAST) and not called(node, CAST) else [node]
        bound = {proof.inputs[name]: source for name, source in inputs.items()}
        for head in heads or [node]:
            same = _Same(bound, sizes)
            if not same(proof.output, head):
                self._refuse(same.node or node, same.reason, everything, trail)
                continue
            outside = next(((inner, user) for inner in same.nodes if inner is not head for user in inner.users if user not in same.nodes), None)
            if outside is not None:
                self._refuse(outside[0], f"the inner value {meta.placed(outside[0])} is also read by {meta.placed(outside[1])}", everything + 1, trail)
                continue
            return Match(head, inputs, scalars, frozenset(same.nodes))
        return None

    def _refuse(self, node: fx.Node, reason: str, score: int, trail: frozenset[fx.Node]) -> None:
        if self.near is None or score > self.near.score:
            self.near = Near(node, reason, score, trail)


def _alike(node: fx.Node, target: Any) -> bool:
    """Whether a node calls the target, or what is the same but for the shape of the result, which is compared by itself."""
    return called(node, *RESHAPES) if target in RESHAPES else called(node, target)


def strip(node: fx.Node) -> fx.Node:
    """The value before all casts."""
    while called(node, CAST):
        node = node.args[0]
    return node


def _bindings(env: Mapping[Any, Any], inputs: Mapping[str, Any]) -> Iterator[dict[str, fx.Node]]:
    """For each input the value before its casts or, if all its readers read one node, that node."""
    options = []
    for name in inputs:
        reads = env[name]
        found = [strip(reads[0])]
        if reads[0] is not found[0] and all(read is reads[0] for read in reads):
            found.append(reads[0])
        options.append(found)
    for chosen in itertools.product(*options):
        yield dict(zip(inputs, chosen))


def _comparable(node: fx.Node) -> dict[str, Any]:
    """Arguments for a sketch: by name, dimensions counted from the end, sizes left out."""
    if node.target in RESHAPES:
        return {"self": node.args[0]}
    return {name: value for name, value in full_arguments(node).items() if name not in _SIZES}


def _orders(node: fx.Node, wanted: dict[str, Any], given: dict[str, Any]) -> Iterator[list[tuple[Any, Any]]]:
    """Pairs of arguments to compare, in each order that means the same; operators before inputs and numbers."""
    pairs = [(wanted[name], given[name]) for name in wanted]
    yield sorted(pairs, key=_literal_first)
    if node.target in COMMUTATIVE and "self" in wanted and "other" in wanted:
        swapped = {**given, "self": given["other"], "other": given["self"]}
        yield sorted(((wanted[name], swapped[name]) for name in wanted), key=_literal_first)


def _literal_first(pair: tuple[Any, Any]) -> int:
    """Operators first: an input accepts anything, so it should be asked last."""
    pattern = pair[0]
    return 0 if isinstance(pattern, fx.Node) and pattern.op == "call_function" else 1


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(a: Any, b: Any) -> bool:
    if _number(a) and _number(b):
        return a == b
    return type(a) is type(b) and a == b


def _shown(value: Any) -> str:
    return f"`{value.name}`" if isinstance(value, fx.Node) else repr(value)


class _Same:
    """Whether a program node computes exactly the expression of a template node."""

    def __init__(self, bound: Mapping[fx.Node, fx.Node], sizes: Sizes) -> None:
        self.bound, self.sizes = bound, sizes
        self.nodes: dict[fx.Node, None] = {}
        self.done: dict[tuple[fx.Node, fx.Node], bool] = {}
        self.node: fx.Node | None = None
        self.reason = "the types or the casts differ"

    def __call__(self, pattern: Any, value: Any) -> bool:
        if isinstance(pattern, (list, tuple)):
            return isinstance(value, (list, tuple)) and len(pattern) == len(value) and all(self(p, v) for p, v in zip(pattern, value))
        if not isinstance(pattern, fx.Node):
            if isinstance(value, fx.Node):
                return _number(pattern) and isinstance(meta.value(value), (int, torch.SymInt)) and self.sizes.number(meta.value(value)) == pattern
            return _equal(pattern, value)
        if pattern in self.bound:
            return self.bound[pattern] is value
        if not isinstance(value, fx.Node):
            return False
        known = self.done.get((pattern, value))
        if known is None:
            before = dict(self.nodes)
            self.nodes[value] = None
            known = self.done[pattern, value] = self._node(pattern, value)
            if not known:
                self.nodes = before
        return known

    def _node(self, pattern: fx.Node, node: fx.Node) -> bool:
        if not _alike(node, pattern.target):
            return self._no(node, f"`{node.name}` is {_said(node)} where the pattern, in these types, has {_said(pattern)}")
        wanted, given = (_comparable(each) if each.target in RESHAPES else full_arguments(each) for each in (pattern, node))
        same = wanted.keys() == given.keys() and any(all(self(p, v) for p, v in order) for order in _orders(pattern, wanted, given))
        if not same:
            return self._no(node, self._other_argument(node, wanted, given))
        a, b = meta.tensor(pattern), meta.tensor(node)
        if a is not None and (b is None or a.dtype != b.dtype):
            return self._no(node, f"`{node.name}` is {meta.describe(meta.value(node))} where the pattern, on these inputs, gives {str(a.dtype).removeprefix('torch.')}")
        if a is not None and [int(size) for size in a.shape] != [self.sizes.number(size) for size in b.shape]:
            return self._no(node, f"`{node.name}` is {meta.describe(meta.value(node))}, another shape than the pattern gives on these inputs")
        return True

    def _other_argument(self, node: fx.Node, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> str:
        """Which argument of a node is not the pattern's."""
        if wanted.keys() != given.keys():
            return f"`{node.name}` differs in the argument {sorted(wanted.keys() ^ given.keys())[0]}"
        name = next((name for name in wanted if not self(wanted[name], given[name])), next(iter(wanted)))
        if name in _SIZES:  # the pattern's are stand-ins, which would say nothing
            return f"`{node.name}` ({node.target}) has other sizes than the pattern, on these inputs"
        played = next((value for key, value in self.bound.items() if key is wanted[name]), None)
        there = meta.placed(played) if played is not None else _said(wanted[name]) if isinstance(wanted[name], fx.Node) else _shown(wanted[name])
        return f"`{node.name}` ({node.target}) takes {_shown(given[name])} as {name} where the pattern, in these types, has {there}"

    def _no(self, node: fx.Node, reason: str) -> bool:
        if self.node is None:
            self.node, self.reason = node, reason
        return False


def _said(node: fx.Node) -> str:
    if called(node, CAST):
        return f"a cast to {str(node.args[1]).removeprefix('torch.')}"
    return f"{node.target}" if node.op == "call_function" else f"an input ({node.name})"

