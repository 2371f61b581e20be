"""A random program from a plan: a graph of ATen operations with fake values, its state, and inputs of any size."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.program import Program, Signature, Slot
from fxopt.torch_private import composites_on_symbols

aten = torch.ops.aten
WIDTH, VOCABULARY, IGNORED = 8, 13, -100
SIZE = (3, 5)


@dataclass(frozen=True)
class Plan:
    """A random program as data.

    Attributes:
        steps: (kind, a, b, option): what is computed, of which earlier values (counted from the newest, modulo how many there are),
            in which spelling.
        head: which loss; "none": the value itself.
        dtype: "float32" or "bfloat16".
        dynamic: batch size and length are symbolic.
        ids: the input is token ids, else floats.
        seed: of state and inputs.
        dropped: numbers of nodes whose first argument of the same kind stands for them (a failure made smaller).
    """

    steps: tuple[tuple[str, int, int, int], ...]
    head: str = "none"
    dtype: str = "float32"
    dynamic: bool = True
    ids: bool = False
    seed: int = 0
    dropped: tuple[int, ...] = ()

    def json(self) -> str:
        """As JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, text: str) -> Plan:
        """From JSON text."""
        body = json.loads(text)
        return cls(**{**body, "steps": tuple((str(kind), a, b, option) for kind, a, b, option in body["steps"]), "dropped": tuple(body["dropped"])})


@dataclass(frozen=True)
class Built:
    """A program with its state and a call."""

    program: Program
    state: dict[str, torch.Tensor]
    inputs: tuple[torch.Tensor, ...]


# One mode and one set of symbols for all programs: what an operation gives for a kind of arguments is asked once.
_ENV = ShapeEnv()
_MODE = FakeTensorMode(shape_env=_ENV)
_FAKES: dict[Any, Any] = {}
_INPUTS: dict[Any, torch.Tensor] = {}


class Builder:
    """Makes nodes, parameters and inputs of one program."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.graph = plan, fx.Graph()
        self.dtype = getattr(torch, plan.dtype)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.slots: dict[str, Slot] = {}
        self.state: dict[str, torch.Tensor] = {}
        self.reads: dict[str, fx.Node] = {}
        self.path = ""
        self.inputs = [self._input("x", (*SIZE,) if plan.ids else (*SIZE, WIDTH), torch.int64 if plan.ids else self.dtype),
                       self._input("mask", SIZE, torch.int64), self._input("labels", SIZE, torch.int64)]

    def _input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        node = self.graph.placeholder(name)
        key = (shape, dtype, self.plan.dynamic)
        if key not in _INPUTS:
            like = torch.zeros(shape, dtype=dtype)
            if self.plan.dynamic:
                first = next((value for (other, _, dynamic), value in _INPUTS.items() if dynamic), None)
                if first is None:
                    _INPUTS[key] = _MODE.from_tensor(like, symbolic_context=StatelessSymbolicContext(dynamic_sizes=[
                        DimDynamic.DYNAMIC if dim < 2 else DimDynamic.STATIC for dim in range(len(shape))]))
                else:  # the same symbols for all inputs
                    with _MODE:
                        _INPUTS[key] = torch.empty((*first.shape[:2], *shape[2:]), dtype=dtype)
            else:
                _INPUTS[key] = _MODE.from_tensor(like, static_shapes=True)
        return self.stamp(node, _INPUTS[key])

    def stamp(self, node: fx.Node, value: Any) -> fx.Node:
        """Give a node its fake value and its place."""
        node.meta["val"] = value
        node.meta[meta.PROVENANCE] = meta.Provenance(self.path, ((self.path, "Step"),), "fuzz.py:1")
        return node

    def parameter(self, name: str, *shape: int, scale: float = 1.0, mean: float = 0.0, kind: str = "parameter") -> fx.Node:
        """A node that reads a parameter or buffer of the present step."""
        full = f"{self.path}.{name}"
        if full not in self.reads:
            self.state[full] = (torch.randn(shape, generator=self.generator) * scale + mean).to(self.dtype)
            self.slots[full] = Slot(full, shape, self.dtype, kind, kind == "parameter")
            node = self.graph.create_node("get_attr", full, (), {})
            key = ("state", shape, self.dtype)
            if key not in _FAKES:
                _FAKES[key] = _MODE.from_tensor(self.state[full], static_shapes=True)
            self.reads[full] = self.stamp(node, _FAKES[key])
        return self.reads[full]

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call node."""
        node = self.graph.call_function(target, args, kwargs)
        fake = pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (args, kwargs))
        key = (target, pytree.tree_structure(fake), *map(meta.signature, pytree.tree_leaves(fake)))
        if key not in _FAKES:
            with _MODE, torch.no_grad(), composites_on_symbols():
                _FAKES[key] = target(*fake[0], **fake[1])
        return self.stamp(node, _FAKES[key])

    def size(self, x: fx.Node, dim: int) -> Any:
        """A size: a node if it is symbolic."""
        found = x.meta["val"].shape[dim]
        return self(aten.sym_size.int, x, dim) if isinstance(found, torch.SymInt) and not found.node.expr.is_Integer else int(found)


def build(plan: Plan, kinds: dict[str, Callable[[Builder, fx.Node, fx.Node, int], fx.Node]], heads: dict[str, Callable[[Builder, fx.Node, fx.Node], list[fx.Node]]]) -> Built:
    """The program of a plan."""
    b = Builder(plan)
    x, mask, labels = b.inputs
    b.path = "embed"
    if plan.ids:
        x = b(aten.embedding.default, b.parameter("weight", VOCABULARY, WIDTH), x)
    found = [x]
    for i, (kind, first, second, option) in enumerate(plan.steps):
        b.path = f"steps.{i}"
        found.append(kinds[kind](b, found[-1 - first % len(found)], found[-1 - second % len(found)], option))
    b.path = "head"
    outputs = [*heads[plan.head](b, found[-1], labels), found[len(found) // 2]]
    # an output is no input or parameter itself: the caller gets a tensor of its own, as from a capture
    outputs = [b(aten.mul.Tensor, out, 1.0) if out.op != "call_function" else out for out in outputs]
    b.graph.output((outputs))
    for node in [n for n in b.graph.nodes if n.op == "get_attr"][::-1]:
        list(b.graph.nodes)[len(b.inputs) - 1].append(node)
    out_spec = pytree.tree_structure(tuple(range(len(outputs))))
    signature = Signature(pytree.tree_structure(((0, 0, 0), {})), (None,) * 3, out_spec)
    b.graph.lint()
    program = Program(b.graph, b.slots, signature, _MODE, fakes=_FAKES)
    if plan.dropped:
        program = dropped(program, plan.dropped)
    return Built(program, b.state, values(plan))


def dropped(program: Program, numbers: tuple[int, ...]) -> Program:
    """The program without some nodes: an argument of the same kind stands for each."""
    edit = Edit(program, "smaller")
    calls = [node for node in edit.nodes if node.op == "call_function"]
    for number in numbers:
        node = calls[number]
        stand = standing_for(node)
        if stand is not None:
            edit.replace(node, stand)
    edit.dead()
    return edit.finish("smaller").replace(log=(), parent=None)


def standing_for(node: fx.Node) -> fx.Node | None:
    """The first argument with the value's shape and dtype."""
    val = meta.tensor(node)
    return next((each for each in node.all_input_nodes if val is not None and (other := meta.tensor(each)) is not None and other.dtype == val.dtype
                 and meta.same_shape(other, val)), None)


def values(plan: Plan, batch: int = SIZE[0], length: int = SIZE[1]) -> tuple[torch.Tensor, ...]:
    """A call of some size."""
    generator = torch.Generator().manual_seed(1000 + plan.seed)
    x = torch.randint(0, VOCABULARY, (batch, length), generator=generator) if plan.ids else torch.randn(batch, length, WIDTH, generator=generator)
    if not plan.ids:
        x = x.to(getattr(torch, plan.dtype)).requires_grad_(plan.seed % 2 == 0)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if plan.seed % 3:
        mask[0, length // 2 + 1:] = 0
    labels = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.3] = IGNORED
    labels.masked_fill_(mask == 0, IGNORED)
    labels[-1, -1] = 1
    return x, mask, labels


def drawn(seed: int, kinds: list[str], heads: list[str]) -> Plan:
    """Plan number `seed`."""
    rng = random.Random(seed)
    steps = tuple((rng.choice(kinds), rng.randint(0, 3), rng.randint(0, 3), rng.randint(0, 23)) for _ in range(rng.randint(1, 6)))
    return Plan(steps, rng.choice(heads), rng.choice(("float32", "float32", "bfloat16")), rng.random() < 0.6, rng.random() < 0.5, seed)
