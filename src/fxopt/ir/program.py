"""Program: a captured model as an immutable value.

A Program is (graph, slots, signature, facts, log). The graph is a flat fx graph of ATen and `fxopt::` ops: its
placeholders are the tensor leaves of the call, its `get_attr` nodes name state (parameters, buffers, constants) by the
original dotted name. A Program holds no parameter values: only names and shapes, so that old Programs cost nothing and
keep no weight alive. Values are looked up in the model when a Program runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import sympy
import torch
import torch.fx as fx

from fxopt.errors import CallError, CheckError
from fxopt.ir import text as texts
from fxopt.torch_private import pytree


@dataclass(frozen=True)
class Made:
    """How a slot that a pass introduced gets its first value.

    Attributes:
        by: name of the pass.
        init: `init(source)` is the value; `source` is the current value of the slot `source`, or None.
        item: if not None, the value is `init(source)[item]`: several slots are made by one computation.
        source: name of the slot the value is made from.
        replaces: True if `source` is not needed any more once all slots made from it exist (quantization).
        facts: what else the pass wants to be known of it (an adapter's rank and alpha, a format's name).
    """

    by: str
    init: Callable[[torch.Tensor | None], Any]
    source: str | None = None
    item: int | None = None
    replaces: bool = False
    facts: Any = None

    def value(self, source: torch.Tensor | None, memo: dict[Any, Any]) -> torch.Tensor:
        """The first value. `memo` keeps what several slots share; drop it when all of them are made."""
        if self.item is None:
            return self.init(source)
        key = self.init, self.source
        if key not in memo:
            memo[key] = self.init(source)
        return memo[key][self.item]


@dataclass(frozen=True)
class Slot:
    """One tensor of the state, by name. `made` is None for the model's own tensors."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str  # "parameter" | "buffer" | "constant"
    requires_grad: bool = False
    made: Made | None = None
    aliases: tuple[str, ...] = ()  # other names of the same tensor (tied weights)


@dataclass(frozen=True)
class Signature:
    """How a call becomes the flat inputs of the graph, and how its flat outputs become the return value.

    Attributes:
        in_spec: pytree of `(args, kwargs)`.
        leaves: for each leaf, None if it is a tensor (the next placeholder), else `(value,)`, a constant of the program.
        out_spec: pytree of the return value.
    """

    in_spec: pytree.TreeSpec
    leaves: tuple[tuple[Any] | None, ...]
    out_spec: pytree.TreeSpec

    def names(self) -> list[str]:
        """A readable name (`kwargs.labels`, `args[0]`) for each tensor leaf, in placeholder order."""
        dummy = pytree.tree_unflatten(list(range(len(self.leaves))), self.in_spec)
        found: dict[int, str] = {}
        for path, index in pytree.tree_flatten_with_path(dummy)[0]:
            text = "".join(str(key) for key in path[1:])
            found[index] = text.strip("[]'\"") if text.count("[") == 1 and "'" in text else f"{'args' if path[0].idx == 0 else 'kwargs'}{text}"
        return [found.get(i, f"leaf {i}") for i, leaf in enumerate(self.leaves) if leaf is None]


@dataclass(frozen=True)
class Rewrite:
    """One rewrite that happened: the rule (`name (file.py:line)`), the node it made, the module path, the source line."""

    rule: str
    node: str
    path: str = ""
    source: str = ""


@dataclass(frozen=True)
class Miss:
    """A place where a rule nearly fired: the rule, the node, and the reason in one sentence."""

    rule: str
    node: str
    reason: str
    path: str = ""
    source: str = ""


@dataclass(frozen=True)
class Record:
    """What one pass did: its text form, rewrites, near-misses, node counts before and after, and the time in ms."""

    text: str
    rewrites: tuple[Rewrite, ...] = ()
    misses: tuple[Miss, ...] = ()
    notes: tuple[str, ...] = ()
    before: int = 0
    after: int = 0
    ms: float = 0.0


@dataclass(frozen=True)
class Assumption:
    """Something that must hold of an input at call time for the program to be right: every element is non-zero.

    `leaf` is the placeholder's name. The caller checks it before running; a call that breaks it takes the program
    that was made without it.
    """

    leaf: str

    def holds(self, value: torch.Tensor) -> bool:
        """Whether `value` meets the assumption (one reduction; one synchronization on a GPU)."""
        return bool(value.all())

    def said(self, name: str) -> str:
        """The assumption in words; `name` is what the caller calls the input."""
        return f"every element of {self.leaf} ({name}) is non-zero"


@dataclass(frozen=True)
class AtMost(Assumption):
    """Dimension `dim` of the input is no longer than `size`."""

    dim: int
    size: int

    def holds(self, value: torch.Tensor) -> bool:
        """Whether `value` meets the assumption; reads no element."""
        return value.shape[self.dim] <= self.size

    def said(self, name: str) -> str:
        """The assumption in words."""
        return f"dimension {self.dim} of {self.leaf} ({name}) is at most {self.size}"


@dataclass(frozen=True)
class Lazy:
    """A fact: flat output number `index`, the value of node `node`, is only worth computing if the caller reads it."""

    index: int
    node: str


@dataclass(frozen=True, eq=False)
class Sample:
    """The values of one call, for passes that measure: one tensor per placeholder, and state by slot name."""

    inputs: Sequence[torch.Tensor]
    state: Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Program:
    """An immutable graph with its state names, call signature, facts and history. See the module's docstring."""

    graph: fx.Graph
    slots: Mapping[str, Slot]
    signature: Signature
    fake_mode: Any
    constants: Mapping[str, Any] = field(default_factory=dict)
    facts: frozenset[Any] = frozenset()
    assumptions: tuple[Assumption, ...] = ()
    frozen: frozenset[str] = frozenset()
    log: tuple[Record, ...] = ()
    parent: Program | None = None
    training: bool = True
    grad: bool = True  # captured with gradients enabled
    fakes: dict[Any, Any] = field(default_factory=dict, repr=False)  # what operations give for kinds of arguments, asked once for all versions

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", MappingProxyType(dict(self.slots)))
        object.__setattr__(self, "constants", MappingProxyType(dict(self.constants)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # a value: copies share it

    def replace(self, **changes: Any) -> Program:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def text(self, *, fold: bool = False) -> str:
        """The program as text that reads like Python. `fold` prints equal repeated blocks once."""
        return texts.text(self, fold=fold)

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes in order. Do not edit them: see `ir.edit`."""
        return list(self.graph.nodes)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The tensor inputs, in the order of the call's tensor leaves."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> list[Any]:
        """The flat outputs: nodes or constants."""
        last = self.graph.output_node()
        return list(last.args[0])

    def history(self) -> Iterator[Program]:
        """This program and those it was made from, newest first."""
        program: Program | None = self
        while program is not None:
            yield program
            program = program.parent

    def trainable(self, name: str) -> bool:
        """Whether the slot takes a gradient in this program."""
        return self.slots[name].requires_grad and name not in self.frozen

    def run(self, inputs: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[Any]:
        """Interpret the graph op by op, with autograd as in eager. The reference that every lowering is compared with.

        Args:
            inputs: one tensor per placeholder.
            state: a value for every slot that the graph reads.
        """
        if len(inputs) != len(self.placeholders):
            raise CallError(f"the program takes {len(self.placeholders)} tensors, got {len(inputs)}", where=str(self.signature.names()))
        missing = [node.target for node in self.graph.nodes if node.op == "get_attr" and node.target not in state and node.target not in self.constants]
        if missing:
            raise CheckError(f"no value for state {missing[0]!r}", do="pass the state of the model the program was captured from")
        return _Interpreter(self, state).run(*inputs)

    def watch(self, sample: Sample, see: Callable[[fx.Node, Any, Mapping[fx.Node, Any]], None]) -> None:
        """Run on a sample without gradients; `see(node, value, values of the nodes it reads)` after each node. Random state is
        put back."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            _Interpreter(self, sample.state, see).run(*sample.inputs)


class _Interpreter(fx.Interpreter):
    def __init__(self, program: Program, state: Mapping[str, torch.Tensor], see: Callable[..., None] | None = None) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=True, graph=program.graph)
        self.program, self.state, self.see = program, state, see

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.see is not None:
            self.see(n, value, self.env)
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = self.state.get(target)
        return found if found is not None else self.program.constants[target]


class ShapeGuards:
    """Which concrete input sizes a captured graph covers: symbols bound from the inputs, then the recorded guards.

    torch.export assumes (0/1 specialization) that a dynamic size is >= 2. `check` separates the three cases:
    covered, covered except that a size is 0 or 1 ("edge": right in practice, to be proven by one comparison), not covered.
    """

    def __init__(self, examples: Sequence[torch.Tensor], shape_env: Any) -> None:
        self.shapes = [[_expr(size) for size in example.shape] for example in examples]
        self.env = shape_env
        self.seen: dict[tuple[tuple[int, ...], ...], str] = {}
        self.counted = -1

    def check(self, shapes: tuple[tuple[int, ...], ...]) -> str:
        """"ok", "edge" or a sentence that says which size does not fit."""
        if self.env is not None and self.counted != len(self.env.guards):
            self.seen.clear()
            self.counted = len(self.env.guards)
        known = self.seen.get(shapes)
        if known is None:
            known = self.seen[shapes] = self._check(shapes)
        return known

    def bind(self, shapes: tuple[tuple[int, ...], ...]) -> dict[sympy.Symbol, int]:
        """What the symbols of the input sizes stand for in a call with inputs of these shapes."""
        bound: dict[sympy.Symbol, int] = {}
        for wanted, got in zip(self.shapes, shapes):
            bound.update((expr, size) for expr, size in zip(wanted, got) if isinstance(expr, sympy.Symbol))
        return bound

    def sizes(self, shape: Sequence[Any], shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        """The concrete value of a symbolic shape, for a call with inputs of these shapes."""
        bound = self.bind(shapes)
        return tuple(int(sympy.sympify(_expr(size)).subs(bound)) for size in shape)

    def _check(self, shapes: tuple[tuple[int, ...], ...]) -> str:
        bound: dict[sympy.Symbol, int] = {}
        rest: list[tuple[sympy.Expr, int, str]] = []
        for i, (wanted, got) in enumerate(zip(self.shapes, shapes)):
            for dim, (expr, size) in enumerate(zip(wanted, got)):
                if isinstance(expr, sympy.Symbol) and expr not in bound:
                    bound[expr] = size
                else:
                    rest.append((expr, size, f"size {size} at dimension {dim} of input {i}"))
        for expr, size, place in rest:
            if sympy.sympify(expr).subs(bound) != size:
                return f"{place}: the graph was specialized to {expr}"
        edge = False
        for symbol, size in bound.items():
            low, high = _range(self.env, symbol)
            if size > high:
                return f"size {size}: at most {high} was captured"
            if size < low:
                if size in (0, 1) and low <= 2:
                    edge = True
                else:
                    return f"size {size}: at least {low} was captured"
        if self.env is not None and not edge:
            for guard in self.env.guards:
                verdict = guard.expr.subs({**self.env.replacements, **bound}).subs(bound)
                if verdict == sympy.false:
                    return f"the captured graph needs {guard.expr}"
        return "edge" if edge else "ok"


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _range(env: Any, symbol: sympy.Symbol) -> tuple[int, float]:
    found = env.var_to_range.get(symbol) if env is not None else None
    if found is None:
        return 0, float("inf")
    return int(found.lower), int(found.upper) if isinstance(found.upper, sympy.Integer) else float("inf")
