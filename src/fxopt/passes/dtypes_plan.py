"""A dtype for each node of a program: what the operators ask for, what the ranges forbid, and the fewest casts between."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, mutates
from fxopt.ir.index import Flow, called
from fxopt.kernels import catalog
from fxopt.passes import dtypes, dtypes_cut
from fxopt.passes.dtypes import FREE, NARROW, PRODUCT, STATISTIC, WIDE, dtype_of
from fxopt.torch_private import OpOverload

aten = torch.ops.aten
# What a cast costs beside the bytes that it moves: starting a kernel takes about as long as moving so many.
LAUNCH = 1 << 16
_GATHERS = (aten.embedding.default, catalog.lora_embedding.overload, catalog.dequantize.overload)
_CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass
class Plan:
    """Which nodes compute in `to`.

    Attributes:
        to: the dtype.
        narrow: the nodes that read and make it. The others read and make what they did.
        mixed: sums in the program's dtype that read what is added in either dtype, with that operand: adding widens in the same kernel.
        dropped: casts of the program that become reads of a value in `to`.
        saturated: values that are cast with saturation.
        reasons: for nodes that `to` was refused for other reasons than their kind, the reason.
        casts: how many values the cut casts.
    """

    to: torch.dtype
    narrow: set[fx.Node] = field(default_factory=set)
    mixed: dict[fx.Node, fx.Node] = field(default_factory=dict)
    dropped: set[fx.Node] = field(default_factory=set)
    saturated: set[fx.Node] = field(default_factory=set)
    reasons: dict[fx.Node, str] = field(default_factory=dict)
    casts: int = 0


def explicit_cast(node: fx.Node) -> bool:
    """Whether a node does nothing but cast one float dtype of 16 or 32 bits to another."""
    if not called(node, *_CASTS) or dtype_of(node) is None or dtype_of(node.args[0]) in (None, dtype_of(node)):
        return False
    return called(node, aten.to.dtype) and len(node.args) == 2 and not node.kwargs or called(node, aten._to_copy.default) and set(node.kwargs) == {"dtype"}


def plan(edit: Edit, to: torch.dtype, *, outside: Mapping[str, str], inputs_beyond: Collection[str] = (), without: Mapping[Any, str] | None = None) -> Plan:
    """Choose.

    Args:
        outside: values (by node name) that do not fit into `to`, with the reason: no node reads or makes them in `to`.
        inputs_beyond: names of inputs that hold numbers beyond `to`'s range, as additive masks do.
        without: operators that have no kernel for `to`, with what was said.
    """
    return _Planner(edit, to, outside, inputs_beyond, without or {}).plan()


class _Planner:
    def __init__(self, edit: Edit, to: torch.dtype, outside: Mapping[str, str], inputs_beyond: Collection[str], without: Mapping[Any, str]) -> None:
        self.edit, self.to, self.without = edit, to, without
        self.sources = NARROW if to == torch.float32 else (torch.float32,)
        self.flow = Flow(edit.graph, edit.slots)
        self.learned = dtypes.learned(edit)
        self.huge = dtypes.huge(edit, to, self.learned, inputs_beyond) if to != torch.float32 else set()
        names = {node.name: node for node in edit.nodes}
        self.outside = {names[name]: why for name, why in outside.items() if name in names and names[name] not in self.huge}
        self.written = {node for node, roots in self.flow.roots.items() if roots & self.flow.written}
        self.shared = self._shared()
        self.found = Plan(to, saturated=self.huge)

    def plan(self) -> Plan:
        """Fix what is not free, and cut."""
        nodes = [node for node in self.edit.nodes if node.op == "call_function"]
        able = {node for node in nodes if self._able(node)}
        for node in nodes:  # an item is in the dtype of its tuple
            if node in able and self._unit(node) not in able:
                able.discard(node)
        if self.to == torch.float32:
            fixed = {node: True for node in able if dtypes.rule(node).kind is not FREE}
        else:
            fixed = self._fixed(able)
        values = self._values(able, fixed)
        labels = dtypes_cut.choose({**fixed, True: True, False: False}, values)
        self.found.casts = dtypes_cut.casts(labels, values)
        for node in able:
            if labels.get(self._unit(node), True):
                (self.found.dropped if explicit_cast(node) else self.found.narrow).add(node)
        return self.found

    def _shared(self) -> set[fx.Node]:
        """What outputs share memory with: inputs, state, other outputs. Behind a cast they would not."""
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        for out in dict.fromkeys(out for out in self.edit.outputs if isinstance(out, fx.Node)):
            roots = self.flow.roots[out]
            found |= {root for root in roots if root.op != "call_function" or root in seen}
            seen |= roots
        return found

    def _unit(self, node: fx.Node) -> fx.Node:
        """The node that chooses for this one."""
        while node.target is operator.getitem:
            node = node.args[0]
        return node

    def _able(self, node: fx.Node) -> bool:
        """Whether a node can compute in `to` at all."""
        rule, target = dtypes.rule(node), node.target
        if self.flow.roots[node] & self.shared:
            return False
        if explicit_cast(node):
            return self.to == torch.float32 or dtype_of(node) == self.to
        read = {dtype_of(each) for each, follows in dtypes.operands(node) if follows}
        made = {t.dtype for t in meta.tensors(node) if t.is_floating_point() or t.is_complex()}
        known = {*self.sources, self.to}
        if not read <= known or not made <= known or not (read | made) & set(self.sources):
            return False
        reads_written = any(each in self.written for each, follows in dtypes.operands(node) if follows)
        if reads_written or node in self.written or mutates(node) and rule.kind is not STATISTIC:
            if rule.kind is PRODUCT:  # a cast is a copy: it would be of the moment when it is made
                self.found.reasons[node] = "it shares memory that the program writes in place"
            return False
        if self.to == torch.float32:  # what works in 16 bits works in 32
            if rule.own and target.namespace == "aten" and any(dtype_of(each) in NARROW for each, follows in dtypes.operands(node) if not follows):
                return False  # but for a norm whose averages are in 16 bits: torch reads wider averages than values, not narrower
            plain = isinstance(target, OpOverload) and "dtype" not in node.kwargs and not called(node, *_GATHERS)
            return (plain and bool(read)) or (rule.kind is not WIDE)
        if rule.kind is WIDE or node not in self.learned or rule.result and any(t.dim() == 0 for t in meta.tensors(node)):
            return False  # a number (a loss, a temperature) costs nothing in fp32
        if target in self.without:
            self.found.reasons[node] = f"{target} has no kernel for {_short(self.to)} here: {self.without[target]}"
            return False
        largest = torch.finfo(self.to).max
        if any(isinstance(n, float) and largest < abs(n) < math.inf for n in (*node.args, *node.kwargs.values())):
            return False
        return rule.kind is PRODUCT or not any(each in self.huge for each in node.all_input_nodes)

    def _fixed(self, able: set[fx.Node]) -> dict[fx.Node, bool]:
        """What may not choose: products are narrow, what reads or makes a value that does not fit is not, nor are residual streams."""
        fixed: dict[fx.Node, bool] = {}
        for node, why in self.outside.items():
            if node.op == "call_function" and dtypes.rule(node).kind is not WIDE and not any(t.dim() == 0 for t in meta.tensors(node)):
                self.found.reasons[node] = why
        for node in able:
            why = self.outside.get(node) if dtypes.rule(node).result else None
            if why is None:
                beyond = next((each for each, follows in dtypes.operands(node) if follows and each in self.outside), None)
                why = None if beyond is None else f"it reads `{beyond.name}`: {self.outside[beyond]}"
            if why is not None:
                self.found.reasons[node] = why
                fixed[self._unit(node)] = False
        products = {node for node in able if dtypes.rule(node).kind is PRODUCT and node not in fixed}
        fixed |= dict.fromkeys((*products, *(node for node in able if explicit_cast(node))), True)
        natural = dtypes.naturally(self.edit, self.to, products.__contains__)
        sums = dtypes.residual_sums(self.edit)
        for node in able - fixed.keys() - natural:
            if dtypes.rule(node).kind is STATISTIC or node in sums:
                fixed[node] = False
                if called(node, *dtypes.PROMOTING) and sums[node] is not self._stream(node, sums) and meta.tensor(sums[node]).dim() > 0:
                    self.found.mixed[node] = sums[node]
        return fixed

    @staticmethod
    def _stream(node: fx.Node, sums: Mapping[fx.Node, fx.Node]) -> Any:
        """What is added to."""
        return node.args[1] if node.args[0] is sums[node] else node.args[0]

    def _values(self, able: set[fx.Node], fixed: Mapping[fx.Node, bool]) -> list[dtypes_cut.Value]:
        """The values that may have to be cast, with who makes and reads them; nodes that cannot choose as True and False."""
        readers: dict[fx.Node, list[Any]] = {}
        for node in self.edit.nodes:
            if node.op == "output":
                for each in node.all_input_nodes:
                    readers.setdefault(each, []).append(self._as_is(each))
                continue
            if node.op != "call_function":
                continue
            for each, follows in dtypes.operands(node):
                if self.found.mixed.get(node) is each:
                    continue  # either dtype will do
                readers.setdefault(each, []).append(self._unit(node) if follows and node in able else self._as_is(each))
        found = []
        for value, members in readers.items():
            if dtype_of(value) is None:
                continue
            makes = self._unit(value) if value in able and dtypes.rule(self._unit(value)).result else self._as_is(value)
            size = bytes_of(value, 1)
            found.append(dtypes_cut.Value((makes, *members), LAUNCH + size * (dtype_of(value).itemsize + self.to.itemsize)))
        return found

    def _as_is(self, value: fx.Node) -> bool:
        """What a reader that changes nothing wants of a value."""
        return dtype_of(value) == self.to


def bytes_of(node: fx.Node, itemsize: int | None = None) -> int:
    """The size of a node's tensors in bytes; of symbolic sizes under the sizes of the capture."""
    total = 0
    for t in meta.tensors(node):
        count = math.prod((size.node.hint or 1) if isinstance(size, torch.SymInt) and size.node.has_hint() else 1 if isinstance(size, torch.SymInt) else size
                          for size in t.shape)
        total += count * (t.element_size() if itemsize is None else itemsize)
    return total


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- putting it into the graph ---------------------------------------------------------------------------------------------


def rewrite(edit: Edit, chosen: Plan, blocks: Collection[str]) -> list[fx.Node]:
    """Give every node operands in the dtype that the plan says; returns the casts that were made, one for each value and dtype.

    Args:
        blocks: module paths of repeated blocks: a cast that readers of one block share is made in that block, one that several blocks
            share where its value is made.

    Raises:
        PassError: an operator refuses its dtypes; names the node and its place.
    """
    return _Rewriter(edit, chosen, blocks).rewrite()


class _Rewriter:
    def __init__(self, edit: Edit, chosen: Plan, blocks: Collection[str]) -> None:
        self.edit, self.plan, self.blocks = edit, chosen, blocks
        self.was = {node: dtype_of(node) for node in edit.nodes}
        self.instead: dict[fx.Node, fx.Node] = {}  # a dropped cast: the value that is read for it
        self.versions: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.made: list[fx.Node] = []

    def rewrite(self) -> list[fx.Node]:
        for node in self.edit.nodes:
            if node in self.plan.dropped:
                self.instead[node] = self._version(node.args[0], self.plan.to, node)
            elif node.op == "output":
                found = {each: self._version(each, self.was[each], node) for each in node.all_input_nodes if self.was[each] is not None}
                outputs = fx.node.map_arg(node.args, lambda each, found=found: found.get(each, each))
                self.edit.set_args(node, outputs)
            elif node.op == "call_function":
                self._give(node)
        self.edit.dead()
        left = set(self.edit.nodes)
        return [node for node in self.made if node in left]

    def _give(self, node: fx.Node) -> None:
        narrow = node in self.plan.narrow
        args, kwargs = dtypes.with_operands(node, functools.partial(self._wanted, node, narrow))
        if narrow or (args, kwargs) != (node.args, node.kwargs):
            self.edit.set_args(node, args, kwargs)
        if narrow:
            dtypes.retyped(self.edit, node)

    def _wanted(self, node: fx.Node, narrow: bool, operand: fx.Node, follows: bool) -> fx.Node:
        if self.plan.mixed.get(node) is operand:
            return self.instead.get(operand, operand)
        return self._version(operand, self.plan.to if narrow and follows else self.was[operand], node)

    def _version(self, value: fx.Node, dtype: torch.dtype, reader: fx.Node) -> fx.Node:
        """The value in a dtype, for a node that reads it."""
        value = self.instead.get(value, value)
        if dtype_of(value) == dtype:
            return value
        found = self.versions.get((value, dtype))
        if found is None:
            like = reader if value.op != "call_function" else self._place(value, reader)
            source = value
            if value in self.plan.saturated and dtype in NARROW:
                source = self.edit.call(aten.clamp.default, (value, torch.finfo(dtype).min, torch.finfo(dtype).max), like=like, before=reader)
            found = self.edit.call(aten.to.dtype, (source, dtype), like=like, before=reader)
            self.made.append(found)
            self.versions[value, dtype] = found
        return found

    def _place(self, value: fx.Node, reader: fx.Node) -> fx.Node:
        """Whose module a cast belongs to."""
        if reader.op == "output":
            return value
        inside = {self._block(user) for user in value.users if user.op != "output"}
        return reader if len(inside) == 1 else value

    def _block(self, node: fx.Node) -> str | None:
        return next((path for path, _ in meta.provenance(node).stack if path in self.blocks), None)
