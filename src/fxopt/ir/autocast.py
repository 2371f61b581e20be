"""What autocast does to one operator: found by running it on fake values, not from lists of operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.torch_private import HigherOrderOperator, OpOverload, TorchDispatchMode, composites_on_symbols, pytree

aten = torch.ops.aten


@dataclass(frozen=True)
class State:
    """Autocast on one device: to a dtype, or off (None)."""

    device: str
    dtype: torch.dtype | None

    @classmethod
    def now(cls, device: str) -> State:
        """The caller's."""
        return cls(device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    @classmethod
    def of(cls, region: fx.Node) -> State:
        """Inside a `wrap_with_autocast` region."""
        device, dtype, enabled = region.args[:3]
        return cls(device, (torch.get_autocast_dtype(device) if dtype is None else dtype) if enabled else None)

    def on(self) -> Any:
        """A context in which it holds."""
        return torch.autocast(self.device, self.dtype, enabled=self.dtype is not None, cache_enabled=False)


Casts = Mapping[fx.Node, torch.dtype]


@dataclass
class Casting:
    """What becomes of operators that leave an autocast region.

    Args:
        inner: autocast inside the region.
        outer: autocast where the operators will run.
        fake_mode: of the nodes' values.
    """

    inner: State
    outer: State
    fake_mode: Any
    known: dict[Any, tuple[torch.dtype | None, ...] | None] = field(default_factory=dict)

    def casts(self, node: fx.Node) -> Casts | None:
        """The casts that `inner` puts in front of a node's arguments; with them the node does in `outer` what it did in
        `inner`. None if no casts of its arguments make it so."""
        if node.op != "call_function":
            return {}
        if not isinstance(node.target, OpOverload):
            return None if isinstance(node.target, HigherOrderOperator) else {}
        sources = [source for source in node.all_input_nodes if meta.tensor(source) is not None]
        if not sources or not meta.tensors(node):
            return {}
        shown = fx.node.map_arg((node.args, node.kwargs), lambda source: meta.signature(meta.value(source)))
        key = (node.target, repr(shown))
        if key not in self.known:
            self.known[key] = self._find(node, sources)
        found = self.known[key]
        return None if found is None else {source: dtype for source, dtype in zip(sources, found) if dtype is not None}

    def _find(self, node: fx.Node, sources: list[fx.Node]) -> tuple[torch.dtype | None, ...] | None:
        with self.fake_mode:
            given = [torch.empty_like(meta.tensor(source)) for source in sources]
        off = State(self.inner.device, None)
        inside, casts = self._run(node, sources, given, self.inner)
        if inside is None:
            return None
        if inside == self._run(node, sources, given, off)[0]:
            casts = {}
        dtypes = tuple(casts.get(i) for i in range(len(given)))
        with self.fake_mode:
            cast = [value if dtype is None else value.to(dtype) for value, dtype in zip(given, dtypes)]
        plain = self._run(node, sources, cast, off)[0]
        without = [event for event in inside if not (event[0] is aten._to_copy.default and event[1] in casts)]
        if plain is None:
            return None
        same = [event[0::2] for event in plain] == [event[0::2] for event in without] and plain == self._run(node, sources, cast, self.outer)[0]
        return dtypes if same else None

    def _run(self, node: fx.Node, sources: list[fx.Node], given: list[torch.Tensor], state: State) -> tuple[list[Any] | None, dict[int, torch.dtype]]:
        env = dict(zip(sources, given))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: env[source] if source in env else meta.value(source))
        seen = _Seen({id(value): i for i, value in enumerate(given)})
        with self.fake_mode, torch.no_grad(), composites_on_symbols(), state.on(), seen:
            try:
                node.target(*args, **kwargs)
            except (RuntimeError, TypeError):  # attention refuses inputs of several dtypes, where autocast would cast them
                return None, {}
        return seen.events, seen.casts


class _Seen(TorchDispatchMode):
    """Operators as they run: what, on which of the given tensors (if it is a cast), results of which dtypes."""

    def __init__(self, given: Mapping[int, int]) -> None:
        super().__init__()
        self.given = given
        self.events: list[Any] = []
        self.casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return out  # questions that autocast asks
        place = self.given.get(id(args[0])) if args else None
        if func is aten._to_copy.default and place is not None:
            self.casts[place] = out.dtype
        self.events.append((func, place, tuple(leaf.dtype for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor))))
        return out
