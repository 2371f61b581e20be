"""How the values of a graph depend on the samples of a batch.

The samples lie along the first dimension of the inputs. Going forward through the graph, each value is found to be one of:

* `Free`: the same whatever the batch is;
* `Rows`: one dimension holds the samples, and what stands at a sample depends on that sample alone;
* `Total`: a sum over the samples of what each gives by itself, divided by the denominators in `terms`;
* `Counted`: another function of such sums, all of them of inputs alone;
* `Mixed`: samples meet in it in another way, first at `node`.

Where nothing is known of an operator, its value is `Mixed`: what is said of the other four is proven from the operators alone.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import mutates, random
from fxopt.ir.index import Flow, full_arguments
from fxopt.ir.program import Slot
from fxopt.torch_private import OpOverload


@dataclass(frozen=True)
class Free:
    """The same for every batch. data: no parameter and no random number is in it. grad: a trainable parameter is."""

    data: bool = True
    grad: bool = False


@dataclass(frozen=True)
class Rows:
    """Dimension `dim` (from the end) has the size over * batch * under and runs through the samples.

    Attributes:
        data: no parameter and no random number is in it.
        index: the value at sample i is i.
        by: a node, of inputs alone, that all elements are divided by.
        order: a node that sorts, in whose order the rows of all samples are; None for their own.
    """

    dim: int
    over: Any = 1
    under: Any = 1
    data: bool = True
    index: bool = False
    by: fx.Node | None = None
    order: fx.Node | None = None


@dataclass(frozen=True)
class Order:
    """Numbers about the order in which `sort` puts rows, see `ir.sample_order`. each: a permutation is divided by it."""

    sort: fx.Node | None
    role: str
    each: int = 1


@dataclass(frozen=True)
class Total:
    """A sum of terms, each a sum over the samples divided by its denominator.

    A denominator is None (1), a node that computes it, a node of a loss that takes its own mean over labels, or a size (an int or a
    sympy expression). `CONSTANT` stands for a term that is the same for every batch.
    """

    terms: frozenset[Any]
    data: bool = True


@dataclass(frozen=True)
class Counted:
    """A function of sums over the samples, of inputs alone."""


@dataclass(frozen=True)
class Mixed:
    """Samples meet at `node`; `reason` is a sentence about it."""

    node: fx.Node
    reason: str


State = Free | Rows | Order | Total | Counted | Mixed
CONSTANT = "constant"
FILLED = frozenset({"full", "full_like", "new_full", "scalar_tensor", "fill"})
# Operators that leave the number of a sample as it is, or look it up.
PLACED = frozenset({"to", "_to_copy", "clone", "contiguous", "alias", "detach", "view", "reshape", "unsqueeze", "squeeze", "flatten", "expand", "expand_as", "permute",
                    "transpose", "index"})


def expression(size: Any) -> Any:
    """A size as an int or a sympy expression."""
    if isinstance(size, torch.SymInt):
        size = size.node.expr
    return size if isinstance(size, sympy.Basic) and not size.is_Integer else int(size)


@functools.lru_cache(maxsize=4096)
def ratio(a: Any, b: Any) -> Any | None:
    """a / b if it is a whole number or a polynomial with such coefficients, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    found = sympy.cancel(sympy.sympify(a) / b)
    if found.is_Integer:
        return int(found)
    if sympy.denom(found) != 1:
        return None
    return found


def through(sizes: Sequence[Any], inner: Any, batch: Any) -> tuple[int, Any, Any] | None:
    """(dim, over, under) of the dimension that the samples lie in, if samples follow each other at `inner` elements."""
    after = [1]
    for size in reversed(sizes):
        after.append(after[-1] * size)
    for dim in range(-len(sizes), 0):
        under = ratio(inner, after[-dim - 1])
        over = None if under is None else ratio(sizes[dim], batch * under)
        if over is not None and over != 0:
            return dim, over, under
    return None


def equal_sizes(inputs: Sequence[torch.Tensor | None]) -> dict[sympy.Symbol, Any]:
    """Sizes of the inputs that have names of their own though they are the same: those of first dimensions that were equal in the call that
    was captured, and those of the others. The program need not hold for calls in which they are not: see `Denominator.measure`."""
    known: dict[Any, Any] = {}
    found: dict[sympy.Symbol, Any] = {}
    sizes = [(dim == 0, size) for x in inputs if x is not None for dim, size in enumerate(x.shape)]
    for leading, size in sizes:
        if isinstance(expression(size), int):
            known[leading, int(expression(size))] = sympy.Integer(expression(size))
    for leading, size in sorted(sizes, key=lambda each: not each[0]):
        symbol = expression(size)
        if isinstance(symbol, sympy.Symbol) and symbol not in found and size.node.hint is not None:
            found[symbol] = known.setdefault((leading, size.node.hint), symbol)
    return found


class Samples:
    """The state of every node of a graph. `new` nodes can be added with `visit`.

    Args:
        graph: its placeholders are the inputs; those whose first dimension is the batch hold samples.
        slots, trainable: of the program.
    """

    def __init__(self, graph: fx.Graph, slots: Mapping[str, Slot], trainable: Callable[[str], bool], rules: dict[str, Callable[..., State]],
                 ordered: Callable[[Samples, fx.Node], State | None]) -> None:
        inputs = [meta.tensor(node) for node in graph.nodes if node.op == "placeholder"]
        self.equal = equal_sizes(inputs)
        self.known: dict[Any, Any] = {}
        first = [self.size(x.shape[0]) for x in inputs if x is not None and x.dim() > 0]
        self.batch = max(first, key=first.count) if first else None  # what most inputs have first; the first input's, of several
        self.slots, self.trainable, self.rules, self.ordered = slots, trainable, rules, ordered
        self.keys: dict[fx.Node, Rows] = {}
        self.symbols = set() if self.batch is None or isinstance(self.batch, int) else self.batch.free_symbols
        self.flow = Flow(graph, slots)
        self.dirty: set[fx.Node] = set()
        self.states: dict[fx.Node, State] = {}
        for node in list(graph.nodes):
            if node.op != "output":
                self.visit(node)

    def __getitem__(self, node: Any) -> State:
        return self.states[node] if isinstance(node, fx.Node) else Free()

    def visit(self, node: fx.Node) -> State:
        """Find the state of a node whose arguments are known."""
        found = self._state(node)
        if self.flow.roots.get(node, frozenset()) & self.flow.written and isinstance(found, Free | Rows | Total):
            found = replace(found, data=False)  # the graph of a count follows values, not writes
        if node.op == "call_function" and mutates(node) and isinstance(found, Rows | Total | Counted | Free):
            into = node.all_input_nodes[0]
            if _shape(self.states[into]) != _shape(found):
                self.dirty |= self.flow.roots[into]
                found = Mixed(node, "it writes what depends on the samples into something else")
        self.states[node] = found
        return found

    def size(self, size: Any) -> Any:
        """A size as an int or an expression, in which sizes of the inputs that are equal have one name."""
        found = expression(size)
        if isinstance(found, int):
            return found
        if found not in self.known:
            self.known[found] = expression(found.xreplace(self.equal))
        return self.known[found]

    def same_size(self, a: Any, b: Any) -> bool:
        """Whether two sizes are equal by structure."""
        return self.size(a) == self.size(b) or not isinstance(self.size(a), int) and sympy.expand(sympy.sympify(self.size(a)) - self.size(b)) == 0

    def elements(self, sizes: Iterable[Any]) -> Any:
        """The product of sizes."""
        found: Any = 1
        for size in sizes:
            found = found * self.size(size)
        return found

    def holds_batch(self, size: Any) -> bool:
        """Whether a size grows with the batch; for a batch of fixed size nothing does."""
        size = self.size(size)
        return not isinstance(size, int) and bool(size.free_symbols & self.symbols)

    def spread(self, node: fx.Node, data: bool, index: bool = False) -> State:
        """The state of a value that is made without samples, for its shape."""
        val = meta.tensor(node)
        if val is None:
            return Free(data)
        dims = [dim for dim in range(-val.dim(), 0) if self.holds_batch(val.shape[dim])]
        if not dims:
            return Free(data)
        if len(dims) > 1 or self.size(val.shape[dims[0]]) != self.batch:
            return Mixed(node, "a size of it is made of the number of samples")
        return Rows(dims[0], data=data, index=index)

    def reshaped(self, node: fx.Node, source: fx.Node, state: Rows) -> State:
        """After an operator that leaves all elements in their order."""
        shape = meta.tensor(source).shape
        inner = state.under * self.elements(shape[state.dim + 1:] if state.dim != -1 else ())
        found = through([self.size(size) for size in meta.tensor(node).shape], inner, self.batch)
        if found is None:
            return Mixed(node, "it puts several samples into one dimension in another order")
        return replace(state, dim=found[0], over=found[1], under=found[2])

    # -- one node ----------------------------------------------------------------------------------------------------

    def _state(self, node: fx.Node) -> State:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            slot = self.slots.get(str(node.target))
            parameter = slot is not None and slot.kind == "parameter"
            return Free(not parameter, parameter and self.trainable(str(node.target)))
        sources = node.all_input_nodes
        for source in sources:
            if isinstance(self.states[source], Mixed):
                return self.states[source]
        if self.dirty and any(self.flow.roots.get(source, frozenset()) & self.dirty for source in sources):
            return Mixed(node, "it reads memory that was written with what depends on other samples")
        val = meta.value(node)
        if not isinstance(val, (torch.Tensor, tuple, list)):
            return self._number(node, val)
        name = operator_name(node)
        if node.target is operator.getitem:
            return self._item(node)
        if name == "broadcast_tensors":
            return Free()  # the items are what counts
        states = [self.states[source] for source in sources if isinstance(meta.value(source), (torch.Tensor, tuple, list))]
        rule = self.rule(node)
        counted = rule is self.rules["pointwise"] and any(not isinstance(self.states[source], Free) for source in sources)
        if name != "arange" and not counted and all(isinstance(state, Free) for state in states):
            if name in FILLED and any(isinstance(arg, fx.Node) and not isinstance(self.states[arg], Free) for arg in node.args[-1:]):
                return Mixed(node, "the number of samples is made a value")
            data = all(state.data for state in states) and not random(node)
            made = self.spread(node, data)
            return replace(made, grad=any(state.grad for state in states)) if isinstance(made, Free) else made
        found = self.ordered(self, node)
        if found is not None:
            return found
        if rule is None:
            return Mixed(node, f"whether `{name}` keeps samples apart is not known")
        if any(isinstance(state, Rows) and state.index for state in states) and name not in PLACED:
            return Mixed(node, "it depends on the place of a sample in the batch")
        return rule(self, node, full_arguments(node))

    def rule(self, node: fx.Node) -> Callable[..., State] | None:
        """The rule for a node's operator."""
        pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
        return self.rules.get(operator_name(node), self.rules["pointwise"] if pointwise else None)

    def _item(self, node: fx.Node) -> State:
        source, index = node.args[:2]
        state = self.states[source]
        if isinstance(state, Order) and state.role == "sorted":
            return replace(state, role="permutation" if index else "key")
        if operator_name(source) != "broadcast_tensors":
            return self.states[source]
        own = self[source.args[0][index]]
        return self.spread(node, own.data) if isinstance(own, Free) else own

    def _input(self, node: fx.Node) -> State:
        val = meta.tensor(node)
        if val is None or val.dim() == 0 or self.size(val.shape[0]) != self.batch:
            return Free()
        return Rows(-val.dim())

    def _number(self, node: fx.Node, val: Any) -> State:
        """The state of a size, or of a number that is read out of a tensor."""
        if not isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            tensors = [s for s in node.all_input_nodes if isinstance(meta.value(s), torch.Tensor)]
            known = val is not None or all(isinstance(self.states[s], Free) for s in tensors)
            return Free() if known else Mixed(node, "a number is read out of the samples")
        found = sympy.sympify(self.size(val)) if isinstance(val, torch.SymInt) else val.node.expr.xreplace(self.equal)
        if any(not isinstance(self.states[s], Free) for s in node.all_input_nodes if isinstance(meta.value(s), torch.Tensor)) and not sizing(node):
            return Mixed(node, "a number is read out of the samples")
        if not found.free_symbols & self.symbols:
            return Free()
        part = ratio(found, self.batch) if isinstance(val, torch.SymInt) else None
        if part is not None and not sympy.sympify(part).free_symbols & self.symbols:
            return Total(frozenset({None}))
        return Counted()


def _shape(state: State) -> Any:
    """What a write must leave as it is."""
    return (type(state), *(getattr(state, name, None) for name in ("dim", "over", "under", "by", "order", "terms")))


def sizing(node: fx.Node) -> bool:
    """Whether a node reads the shape of a tensor alone."""
    return operator_name(node) in ("sym_size", "sym_numel", "sym_stride", "sym_storage_offset")


def operator_name(node: fx.Node) -> str:
    """The operator's name without namespace, overload and the underscore of those that write."""
    if not isinstance(node.target, OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    name = node.target._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
