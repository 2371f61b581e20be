"""Equal blocks of a model are traced once: the later ones leave one node in the capture, which becomes a copy of the first.

A block is traced for real unless a block that was traced before it is its twin: the same structure (see `ir.twins`), called
with arguments that are the same to a trace (sizes, dtypes, flags, which of them are one tensor), and equal in every attribute
that the first block's code read. An attribute that differs is put aside while the first block is traced, so that its reads are
seen. Whatever the first block did besides computing its results (attributes set, arguments changed, writes into state,
values taken from outside its arguments) makes it no example for others.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
import torch.fx.traceback as fx_traceback
import torch.nn as nn

from fxopt.ir import meta, torch_patches
from fxopt.ir.copies import Copy, copy_in
from fxopt.ir.index import Flow, writes
from fxopt.ir.twins import Attribute, Twins, Unlike, contents, hooked, plain
from fxopt.torch_private import HigherOrderOperator, pytree

_LIBRARY = torch.library.Library("fxopt_capture", "FRAGMENT")
_RESULTS: dict[int, list[tuple[Any, ...]]] = {}  # by number of a stand-in: sizes, strides, dtype, gradient flag of its results
_NUMBERS = itertools.count()
_TAKES = "it takes a "


def _stand_in(given: list[torch.Tensor], number: int) -> list[torch.Tensor]:
    return [given[0].new_empty_strided(size, stride, dtype=dtype).requires_grad_(grad) for size, stride, dtype, grad in _RESULTS[number]]


def _seen(tensors: list[torch.Tensor], number: int) -> None:
    """A mark in the graph: the nodes that stand for these tensors here. (What does nothing to a tensor becomes its node.)"""


_LIBRARY.define("fxopt_block(Tensor[] given, int number) -> Tensor[]")
_LIBRARY.define("fxopt_seen(Tensor[] tensors, int number) -> ()")
for _key in ("Autograd", "CPU", "CUDA", "Meta"):
    _LIBRARY.impl("fxopt_block", _stand_in, _key)
    _LIBRARY.impl("fxopt_seen", _seen, _key)
BLOCK, SEEN = torch.ops.fxopt_capture.fxopt_block.default, torch.ops.fxopt_capture.fxopt_seen.default


@dataclass(eq=False)
class Arguments:
    """The arguments of one call of a block: leaves, and what the structure says."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any] = field(init=False)
    spec: Any = field(init=False)

    def __post_init__(self) -> None:
        self.leaves, self.spec = pytree.tree_flatten((self.args, self.kwargs))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The distinct tensors among the leaves, in order."""
        return list({id(x): x for x in self.leaves if isinstance(x, torch.Tensor)}.values())

    def signature(self) -> Any:
        """What the arguments are to a trace, now: sizes may have been fixed since the call.

        Raises:
            Unlike: for an argument of another kind than tensors, sizes and plain values.
        """
        numbers: dict[int, int] = {}
        found = []
        for leaf in self.leaves:
            if isinstance(leaf, torch.Tensor):
                found.append((meta.signature(leaf), type(leaf), leaf.requires_grad, numbers.setdefault(id(leaf), len(numbers))))
            elif isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                found.append((type(leaf), leaf.node.expr))
            elif plain(leaf):
                found.append((type(leaf), repr(leaf)))
            else:
                raise Unlike(f"{_TAKES}{type(leaf).__name__}")
        return self.spec, tuple(found), _modes()


def _modes() -> Any:
    return torch.is_grad_enabled(), tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))


def _mark() -> Any:
    return (fx_traceback.current_meta.get("custom") or {}).get("checkpoint")


@dataclass(eq=False)
class Example:
    """A block that was traced, and what it did.

    Attributes:
        watched: the attributes of its modules that some other block does not share; their reads were seen.
        read: those of them that its code read.
        flaw: why it is no example for others, if it is not.
        leaves: of its return value: ("result", i), ("argument", i) or ("value", constant).
    """

    path: str
    block: nn.Module
    arguments: Arguments
    mark: Any
    watched: set[Attribute]
    number: int  # of the mark of its arguments; the next one is of its arguments and results
    read: set[Attribute] = field(default_factory=set)
    flaw: str | None = None
    spec: Any = None
    leaves: list[tuple[str, Any]] = field(default_factory=list)
    results: list[torch.Tensor] = field(default_factory=list)

    def returned(self, value: Any) -> None:
        """Keep the structure of what the block returned.

        Raises:
            Unlike: if that is more than fresh tensors, arguments and plain values.
        """
        flat, self.spec = pytree.tree_flatten(value)
        given = self.arguments.tensors
        taken = {id(x): i for i, x in enumerate(given)}
        memory = {_memory(x) for x in (*given, *self.block.parameters(), *self.block.buffers())}
        for leaf in flat:
            if isinstance(leaf, torch.Tensor) and id(leaf) in taken:
                self.leaves.append(("argument", taken[id(leaf)]))
            elif isinstance(leaf, torch.Tensor):
                if _memory(leaf) in memory or type(leaf) is not type(given[0]) or leaf.device != given[0].device or leaf.layout is not torch.strided:
                    raise Unlike("it returns a view of an argument, of a parameter or of another result")
                memory.add(_memory(leaf))
                self.leaves.append(("result", len(self.results)))
                self.results.append(leaf)
            elif plain(leaf):
                self.leaves.append(("value", leaf))
            else:
                raise Unlike(f"it returns a {type(leaf).__name__}")
        if not self.results:
            raise Unlike("it computes no tensor")


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Standing:
    """A block that was not traced: its path, its example, and the checkpoint region that it was called in."""

    path: str
    example: Example
    mark: Any


class Blocks:
    """Which blocks of a model stand in for which during one capture.

    Attributes:
        standing: the blocks that were not traced, by the number of their node.
        alone: for each block that was traced although another one of its class had been, why.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], trace: torch_patches.CallTrace) -> None:
        self.model, self.trace = model, trace
        self.blocks = {path: model.get_submodule(path) for path in paths}
        self.forwards: dict[str, Any] = {}
        self.examples: list[Example] = []
        self.called: set[str] = set()
        self.standing: dict[int, Standing] = {}
        self.alone: dict[str, str] = {}
        self.modes = _modes()

    @property
    def objects(self) -> str:
        """A sentence if an argument that no trace can compare kept all blocks apart; else ""."""
        found = "" if self.standing else next((f"{path}: {why}" for path, why in self.alone.items() if why.startswith(_TAKES)), "")
        return found and (f"{len(self.blocks)} repeated blocks are traced one by one, which takes as much longer ({found}): leave it out in training "
                          "(a key-value cache: config.use_cache = False)")

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Within, the blocks' forwards trace once per kind."""
        for path, block in self.blocks.items():
            self.forwards[path] = block.__dict__.get("forward")
            original = block.forward
            block.__dict__["forward"] = self._forward(path, block, original)
        try:
            yield
        finally:
            for path, block in self.blocks.items():
                del block.__dict__["forward"]
                if self.forwards[path] is not None:
                    block.__dict__["forward"] = self.forwards[path]
            for number in self.standing:
                _RESULTS.pop(number, None)

    def _forward(self, path: str, block: nn.Module, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if path in self.called:  # a second call of one block
                self._flawed(path, "it is called more than once")
                return original(*args, **kwargs)
            self.called.add(path)
            arguments, reasons = Arguments(args, kwargs), []
            try:
                mine = arguments.signature()
                if _modes() != self.modes or not arguments.tensors:
                    raise Unlike("it is called where gradients or autocast differ, or without tensors")
                for example in reversed(self.examples):
                    if type(example.block) is type(block):
                        try:
                            self._compare(example, path, block, arguments, mine)
                        except Unlike as why:
                            reasons.append(f"unlike {example.path}: {why}")
                        else:
                            return self._stand(example, path, arguments)
                return self._trace(path, block, arguments, original)
            except Unlike as why:
                reasons.append(str(why))
                return original(*args, **kwargs)
            finally:
                if reasons:
                    self.alone[path] = "; ".join(reasons)

        return forward

    def _flawed(self, path: str, why: str) -> None:
        for example in self.examples:
            if example.path == path:
                example.flaw = why
        if any(path in (s.path, s.example.path) for s in self.standing.values()):
            raise Unlike(f"{path}: {why}")

    def _compare(self, example: Example, path: str, block: nn.Module, arguments: Arguments, mine: Any) -> None:
        if example.flaw is not None:
            raise Unlike(example.flaw)
        twins = Twins(example.block, block, self.trace.hooks, apart=frozenset({"forward"}))
        forwards = self.forwards[example.path], self.forwards[path]
        if not twins.equal(*forwards):
            raise Unlike("its forward was replaced")
        for module, name in twins.differing:
            if (module, name) not in example.watched or (module, name) in example.read:
                raise Unlike(f"{type(module).__name__}.{name} differs, and is read")
        if example.arguments.signature() != mine:
            raise Unlike("it is called with arguments of other kinds, sizes or dtypes")

    def _trace(self, path: str, block: nn.Module, arguments: Arguments, original: Any) -> Any:
        for module in block.modules():
            hooked(module, self.trace.hooks)
        example = Example(path, block, arguments, _mark(), self._apart(path, block), 2 * len(self.examples))
        before, sizes = contents(block), _symbols(arguments.tensors)
        versions = [t._version for t in arguments.tensors]
        SEEN(arguments.tensors, example.number)
        with torch_patches.put_aside(example.watched) as example.read:
            value = original(*arguments.args, **arguments.kwargs)
        try:
            again = Arguments(arguments.args, arguments.kwargs)
            if contents(block) != before:
                raise Unlike("it sets attributes")
            if again.spec != arguments.spec or [id(x) for x in again.leaves] != [id(x) for x in arguments.leaves]:
                raise Unlike("it changes its arguments")
            if [t._version for t in arguments.tensors] != versions:
                raise Unlike("it writes into its arguments")
            if _symbols(arguments.tensors) != sizes:
                raise Unlike("it makes sizes that depend on values")
            if _modes() != self.modes:
                raise Unlike("it changes the grad mode")
            example.returned(value)
            SEEN([*arguments.tensors, *example.results], example.number + 1)
        except Unlike as why:
            example.flaw = str(why)
        self.examples.append(example)
        return value

    def _apart(self, path: str, block: nn.Module) -> set[Attribute]:
        """The attributes of a block's modules that some other block may not share."""
        found: set[Attribute] = set()
        for other, module in self.blocks.items():
            if other != path and type(module) is type(block):
                with contextlib.suppress(Unlike):
                    found.update(Twins(block, module, self.trace.hooks, apart=frozenset({"forward"})).differing)
        return {(module, name) for module, name in found if name in vars(module) and not hasattr(type(module), name)}

    def _stand(self, example: Example, path: str, arguments: Arguments) -> Any:
        number = next(_NUMBERS)
        _RESULTS[number] = [(t.shape, t.stride(), t.dtype, t.requires_grad) for t in example.results]
        self.standing[number] = Standing(path, example, _mark())
        given = arguments.tensors
        results = BLOCK(given, number)
        known = {"result": results, "argument": given}
        return pytree.tree_unflatten([value if kind == "value" else known[kind][value] for kind, value in example.leaves], example.spec)

    # -- in the graph ----------------------------------------------------------------------------------------------------

    def write_out(self, graph: fx.Graph, names: Mapping[str, str]) -> fx.Graph:
        """The captured graph with a copy of its example in the place of every block that was not traced.

        Args:
            names: every name of a parameter or buffer to the one that the graph reads.

        Raises:
            Unlike: if an example did what cannot be copied.
        """
        found = {node.args[1]: node for node in graph.nodes if node.op == "call_function" and node.target is BLOCK}
        seen = {node.args[1]: node for node in graph.nodes if node.op == "call_function" and node.target is SEEN}
        if found.keys() != self.standing.keys():
            raise Unlike("a block that was not traced is not in the flat graph")
        bodies: dict[str, list[fx.Node]] = {s.example.path: [] for s in self.standing.values()}
        for node in graph.nodes:
            for path, _ in meta.provenance(node).stack:
                if path in bodies and node.target not in (BLOCK, SEEN):
                    bodies[path].append(node)
        copies, flow = {}, Flow(graph, {})
        for number, node in found.items():
            standing = self.standing[number]
            example, given = standing.example, node.args[0]
            if example.number not in seen or example.number + 1 not in seen:
                raise Unlike(f"{example.path}: it is not in the flat graph")
            first, last = (list(seen[n].args[0]) for n in (example.number, example.number + 1))
            body = dict.fromkeys(bodies[example.path])
            if len(set(first)) < len(first) or len(first) != len(given) or any(r not in body for r in last[len(first):]):
                raise Unlike(f"{example.path}: its arguments and results are not apart")
            values = dict(zip(first, given))
            for inner in body:
                _check(inner, body, values, example.path, flow)
            copies[node] = Copy(list(body), values, last[len(first):], {now: then for now, then in zip(given, last) if then in body},
                                _renamed(self.blocks[example.path], example.path, self.blocks[standing.path], standing.path, names),
                                (example.path, standing.path), (example.mark, standing.mark))
        return copy_in(graph, copies, drop=set(seen.values()))


def _symbols(tensors: list[torch.Tensor]) -> Any:
    """How many sizes that depend on values the capture has made."""
    mode = next((t.fake_mode for t in tensors if hasattr(t, "fake_mode")), None)
    env = getattr(mode, "shape_env", None)
    return None if env is None else len(getattr(env, "pending_fresh_unbacked_symbols", ())), str(getattr(env, "unbacked_symint_counter", None))


def _renamed(a: nn.Module, first: str, b: nn.Module, second: str, names: Mapping[str, str]) -> dict[str, str]:
    """The names of a block's state to those of its twin; Unlike if they are not tied in the same way."""
    found: dict[str, str] = {}
    for name, _ in (*a.named_parameters(remove_duplicate=False), *a.named_buffers(remove_duplicate=False)):
        old, new = names[f"{first}.{name}"], names[f"{second}.{name}"]
        if found.setdefault(old, new) != new:
            raise Unlike(f"{second}: its weights are tied in another way")
    return found


def _check(node: fx.Node, body: Mapping[fx.Node, Any], values: Mapping[fx.Node, Any], path: str, flow: Flow) -> None:
    """Raise Unlike if a node of an example cannot be copied."""
    for source in node.all_input_nodes:
        if source in body or source in values or source.op == "get_attr" or not meta.tensors(source):
            continue  # what is outside and no tensor is a size: the same one to both
        raise Unlike(f"{path}: {node.name} reads {source.name}, which is none of its arguments")
    if isinstance(node.target, HigherOrderOperator):
        raise Unlike(f"{path}: it calls {node.target}")
    if any(root not in body for source in writes(node) for root in flow.roots[source]):
        raise Unlike(f"{path}: {node.name} writes into state or into an argument")
