"""The only file that mutates an fx graph. A pass edits a copy; `finish` returns a new Program and lints it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx as fx

from fxopt.errors import CheckError
from fxopt.ir import meta
from fxopt.ir.facts import Installed
from fxopt.ir.program import Assumption, Miss, Program, Record, Rewrite, Sample, Slot
from fxopt.torch_private import HigherOrderOperator, OpOverload, composites_on_symbols, pytree


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph with the same node names, and the map from old to new nodes."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, lambda arg: mapping[arg])
        mapping[node].meta = dict(node.meta)
    return new, mapping


def read_state(graph: fx.Graph, placeholder: fx.Node, target: str) -> fx.Node:
    """Turn a lifted parameter's placeholder into a `get_attr` node that reads `target`."""
    with graph.inserting_before(placeholder):
        new = graph.create_node("get_attr", target, (), {})
    new.meta = dict(placeholder.meta)
    placeholder.replace_all_uses_with(new)
    graph.erase_node(placeholder)
    return new


def inputs_first(graph: fx.Graph, inputs: list[fx.Node]) -> None:
    """Put the placeholders before everything else, in the given order."""
    for node in reversed(inputs):
        first = next(iter(graph.nodes))
        if first is not node:
            first.prepend(node)


def build_region(body: list[fx.Node], inputs: list[fx.Node], state: list[str], outputs: list[fx.Node],
                 program: Program) -> tuple[fx.Graph, dict[str, Any]]:
    """A graph of its own from some nodes of a program: placeholders for `inputs`, then for `state`; a tuple of `outputs`.

    Subgraphs that higher-order ops call stay attributes; they are returned by name.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    by_name: dict[str, fx.Node] = {}
    modules: dict[str, Any] = {}
    for node in inputs:
        env[node] = graph.placeholder(f"value_{len(env)}")
        env[node].meta = dict(node.meta)
    reads = {node.target: node for node in body if node.op == "get_attr"}
    for name in list(state):
        if isinstance(program.constants.get(name), torch.nn.Module):
            state.remove(name)
            continue
        by_name[name] = graph.placeholder(f"state_{len(by_name)}")
        by_name[name].meta = dict(reads[name].meta)
    for node in body:
        if node.op == "get_attr":
            if node.target in by_name:
                env[node] = by_name[node.target]
                continue
            flat = node.target.replace(".", "_")
            modules[flat] = program.constants[node.target]
            env[node] = graph.create_node("get_attr", flat, (), {})
            continue
        env[node] = graph.node_copy(node, lambda arg: env[arg])
        env[node].meta = dict(node.meta)
    graph.output(tuple(env[node] for node in outputs))
    graph.lint()
    return graph, modules


def rule_here(name: str, depth: int = 1) -> str:
    """`name (file.py:line)` of the caller: the key under which a rewrite is reported."""
    frame = inspect.currentframe()
    for _ in range(depth):
        frame = frame.f_back if frame is not None else None
    if frame is None:
        return name
    return f"{name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


class Edit:
    """One pass's edit of one Program.

    Use `call` and `state` to make nodes, `replace` to redirect uses, `missed` and `note` to say what did not happen.
    """

    def __init__(self, program: Program, by: str, sample: Sample | None = None, fuel: int | None = None) -> None:
        self.source, self.by, self.sample, self.fuel = program, by, sample, fuel
        self.graph, self.mapping = copy_graph(program.graph)
        self.slots: dict[str, Slot] = dict(program.slots)
        self.facts = set(program.facts)
        self.assumptions = list(program.assumptions)
        self.frozen = set(program.frozen)
        self.rewrites: list[Rewrite] = []
        self.misses: list[Miss] = []
        self.notes: list[str] = []
        self.values = program.fakes

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes of the copy, in order."""
        return list(self.graph.nodes)

    @property
    def outputs(self) -> list[Any]:
        """The flat outputs as edited so far: nodes or constants."""
        return list(self.graph.output_node().args[0])

    @property
    def spent(self) -> bool:
        """Whether so many rewrites were recorded as the edit may make: a pass with several sites asks before each, so that a wrong
        one can be found by halving."""
        return self.fuel is not None and len(self.rewrites) >= self.fuel

    @property
    def installed(self) -> Installed:
        """What the model carries already, brought by earlier programs or loaded; empty for a plain model."""
        return next((fact for fact in self.facts if isinstance(fact, Installed)), Installed())

    def trainable(self, name: str) -> bool:
        """Whether the slot takes a gradient, as edited so far."""
        return self.slots[name].requires_grad and name not in self.frozen

    # -- making nodes ----------------------------------------------------------------------------------------------

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, like: fx.Node,
             before: fx.Node | None = None) -> fx.Node:
        """A new call node, placed before `before` (default: before `like`), with `like`'s provenance and a fake value."""
        with self.graph.inserting_before(before or like):
            node = self.graph.call_function(target, args, kwargs or {})
        self._stamp(node, like)
        node.meta["val"] = self.fake(target, args, kwargs)
        return node

    def fake(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """The fake value of a call, without gradients."""
        fake = pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (args, kwargs or {}))
        key = (target, pytree.tree_structure(fake), *map(meta.signature, pytree.tree_leaves(fake)))
        if key not in self.values:  # equal layers ask the same question many times; a fake run with symbolic sizes takes 2 ms
            env = self.source.fake_mode.shape_env
            # A comparison of sizes that this run makes (for strides) must not fix sizes for whoever uses the same symbols.
            with env.suppress_guards() if env is not None else contextlib.nullcontext(), self.source.fake_mode, torch.no_grad(), composites_on_symbols():
                self.values[key] = target(*fake[0], **fake[1])
        return self.values[key]

    def retype(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give a node arguments of other dtypes; its fake value, whose dtype may change, is made anew. The caller sees to its readers."""
        node.args, node.kwargs = args, kwargs
        self._stamp(node, node)
        node.meta["val"] = self.fake(node.target, args, kwargs)

    def item(self, node: fx.Node, index: int, *, like: fx.Node) -> fx.Node:
        """`node[index]` of a node whose value is a tuple, placed right behind it."""
        return self.call(operator.getitem, (node, index), like=like, before=node.next)

    def state(self, slot: Slot, *, like: fx.Node) -> fx.Node:
        """A `get_attr` node that reads a slot; declares the slot if it is new."""
        known = self.slots.get(slot.name)
        if known is not None and (known.shape, known.dtype) != (slot.shape, slot.dtype):
            raise CheckError(f"state {slot.name!r} exists already with another shape or dtype", where=self.by)
        if known is None:
            self.slots[slot.name] = slot
        first = next(iter(self.graph.nodes))
        while first.op == "placeholder":
            first = first.next
        with self.graph.inserting_before(first):
            node = self.graph.create_node("get_attr", slot.name, (), {})
        self._stamp(node, like)
        with self.source.fake_mode:
            node.meta["val"] = torch.empty(slot.shape, dtype=slot.dtype, device=self.device(like))
        return node

    def device(self, node: fx.Node) -> torch.device:
        """The device of a node's first tensor."""
        found = meta.tensors(node)
        return found[0].device if found else torch.device("cpu")

    def _stamp(self, node: fx.Node, like: fx.Node) -> None:
        was = meta.provenance(like)
        if "custom" in like.meta:  # the mark of a checkpointed region
            node.meta["custom"] = like.meta["custom"]
        node.meta[meta.PROVENANCE] = meta.Provenance(was.path, was.stack, was.source, was.code,
                                                     (*[p for p in was.passes if p != self.by], self.by), was.checkpoint)

    # -- changing --------------------------------------------------------------------------------------------------

    def replace(self, old: fx.Node, new: fx.Node, *, rule: str | None = None, unless: Callable[[fx.Node], bool] | None = None) -> None:
        """Every use of `old` (unless `unless(user)`) now reads `new`. With `rule`, the rewrite is recorded under it."""
        a, b = old.meta.get("val"), new.meta.get("val")
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and (a.dtype != b.dtype or a.dim() != b.dim()):
            raise CheckError(f"a rewrite by {self.by} changes {meta.describe(a)} into {meta.describe(b)}", where=f"{old.name}: {meta.provenance(old)}")
        for user in list(old.users):
            if user is new or (unless is not None and unless(user)):
                continue
            user.replace_input_with(old, new)
        if rule is not None:
            self.rewrote(rule, new, old)

    def move_after(self, node: fx.Node, anchor: fx.Node) -> None:
        """Move a node right behind `anchor`."""
        anchor.append(node)

    def move_before(self, node: fx.Node, anchor: fx.Node) -> None:
        """Move a node right before `anchor`."""
        anchor.prepend(node)

    def set_target(self, node: fx.Node, target: Any) -> None:
        """Change what a node calls."""
        node.target = target

    def set_args(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Change a node's arguments."""
        node.args, node.kwargs = args, node.kwargs if kwargs is None else kwargs

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nobody reads."""
        self.graph.erase_node(node)

    def freeze(self, names: Iterable[str]) -> None:
        """These slots take no gradient from here on (their tensors get `requires_grad=False` when installed)."""
        self.frozen.update(names)

    def assume(self, assumption: Assumption) -> None:
        """The program is right only for calls that meet the assumption."""
        if assumption not in self.assumptions:
            self.assumptions.append(assumption)

    def dead(self) -> int:
        """Erase pure nodes that nobody reads, and slots' reads with them. Returns how many."""
        count = 0
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op in ("call_function", "get_attr") and not effectful(node):
                self.graph.erase_node(node)
                count += 1
        return count

    # -- reporting -------------------------------------------------------------------------------------------------

    def rewrote(self, rule: str, node: fx.Node, old: fx.Node | None = None) -> None:
        """Record a rewrite that made `node`, at the place of `old`."""
        where = meta.provenance(old or node)
        self.rewrites.append(Rewrite(rule, node.name, where.path, where.source))

    def moved(self, old: fx.Node, new: fx.Node) -> None:
        """What was recorded of `old` is of `new`, which does its work from now on (two fused ops that became one)."""
        self.rewrites = [dataclasses.replace(each, node=new.name) if each.node == old.name else each for each in self.rewrites]

    def missed(self, rule: str, node: fx.Node, reason: str) -> None:
        """Record that a rule did not fire at a node, and why."""
        where = meta.provenance(node)
        self.misses.append(Miss(rule, node.name, reason, where.path, where.source))

    def note(self, text: str) -> None:
        """Record a sentence about the whole pass."""
        self.notes.append(text)

    def finish(self, text: str, ms: float = 0.0) -> Program:
        """The new Program: linted, with slots that nobody reads any more dropped from the graph's view."""
        self.graph.lint()
        record = Record(text, tuple(self.rewrites), tuple(self.misses), tuple(self.notes), len(self.source.graph.nodes), len(self.graph.nodes), ms)
        return self.source.replace(graph=self.graph, slots=self.slots, facts=frozenset(self.facts), assumptions=tuple(self.assumptions),
                                   frozen=frozenset(self.frozen), log=(*self.source.log, record), parent=self.source)


_RANDOM = torch.Tag.nondeterministic_seeded


def random(node: fx.Node) -> bool:
    """Whether the node consumes random numbers."""
    target = node.target
    if not isinstance(target, OpOverload):
        return isinstance(target, HigherOrderOperator)
    if target is torch.ops.aten.dropout.default:
        return bool(node.args[2]) and node.args[1] != 0
    for index, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":  # attention draws random numbers only if it drops something
            given = node.args[index] if index < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return given != 0.0
    return _RANDOM in target.tags


def mutates(node: fx.Node) -> bool:
    """Whether the node writes into one of its arguments."""
    target = node.target
    if target in (torch.ops.aten.batch_norm.default, torch.ops.aten._batch_norm_impl_index.default):
        return bool(node.args[5])
    return isinstance(target, OpOverload) and target._schema.is_mutable


def effectful(node: fx.Node) -> bool:
    """Whether removing the node, or running it twice, could be seen: it writes, draws random numbers, or asserts."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr":
        return False
    return node.is_impure(impure_random=False) or random(node) or mutates(node)  # attention draws nothing without dropout, whatever its tag says
