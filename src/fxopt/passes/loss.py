"""loss: language-model head and cross entropy as one op that never holds the logits."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, effectful, rule_here
from fxopt.ir.index import Flow, arguments, called, static
from fxopt.ir.program import Lazy
from fxopt.kernels.catalog import linear_cross_entropy
from fxopt.passes.base import Pass, Promise

aten = torch.ops.aten

_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}
_FLATTENING = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)


@dataclass(frozen=True)
class Loss(Pass):
    """head and cross entropy without the logits in memory

    Rewrites linear [-> scale] [-> softcap] -> flatten -> cross entropy. Rows whose label is ignored never reach the
    head. Logits that the model also returns stay in the graph, as an output that is computed when the caller reads it.

    Args:
        chunk: rows whose logits exist at once; 0 lets the kernel choose.
        logits: what becomes of logits that the model returns: "lazy" computes them when the caller reads them, "keep"
            leaves such a head as it is.
    """

    chunk: int = 0
    logits: Literal["lazy", "keep"] = "lazy"

    name: ClassVar[str] = "loss"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    establishes: ClassVar[frozenset[str]] = frozenset({"fused loss"})
    promise: ClassVar[Promise] = Promise(values="tolerance")

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise PassError(f"loss: chunk must be at least 0, got {self.chunk}")

    def run(self, edit: Edit) -> None:
        """Try every cross entropy in the graph."""
        flow = Flow(edit.graph, edit.slots)
        for node in edit.nodes:
            if not called(node, aten.cross_entropy_loss.default):
                continue
            reason = self._rewrite(edit, flow, node)
            if reason is not None:
                edit.missed("head and loss", node, reason)

    def _rewrite(self, edit: Edit, flow: Flow, loss: fx.Node) -> str | None:
        given = arguments(loss)
        logits, target = given["self"], given["target"]
        if "weight" in given:
            return "the classes are weighted"
        if meta.tensor(target).is_floating_point() or meta.tensor(logits).dim() != 2:
            return "the target is not one class for each row of logits"
        head = read_head(logits)
        if isinstance(head, str):
            return head
        classes, width = meta.tensor(head.linear).shape[-1], meta.tensor(head.hidden).shape[-1]
        if static(classes) is None or static(width) is None or static(classes) < static(width):
            return f"the logits are {classes} wide and the hidden state {width}: there is nothing to save"
        if any(flow.roots[node] & flow.written for node in (*head.chain, *head.linear.all_input_nodes)):
            return "a tensor of the head is written in place"
        lazy = outputs_of(edit, head, loss)
        if isinstance(lazy, str):
            return lazy
        if lazy and self.logits == "keep":
            return "the model returns the logits, and they are to be kept"
        dtype = meta.tensor(head.linear).dtype  # under autocast this is not the inputs' dtype: cast as autocast does
        hidden, weight, bias = (_cast(edit, x, dtype, loss) for x in (head.rows(edit, loss), head.weight, head.bias))
        if bias is not None and meta.tensor(bias).dim() > 1:
            bias = edit.call(aten.reshape.default, (bias, [classes]), like=loss)
        mask = [trains and edit.source.grad for trains in (_trains(edit, head.hidden), _trains(edit, head.weight), _trains(edit, head.bias))]
        call = edit.call(linear_cross_entropy.overload, (
            hidden, weight, bias, target, given.get("ignore_index", -100), _REDUCTIONS[given.get("reduction", 1)],
            given.get("label_smoothing", 0.0), head.softcap, head.scale, 0.0, self.chunk, -1, mask, [False] * 3), like=loss)
        new = _cast(edit, edit.call(operator.getitem, (call, 0), like=loss), meta.tensor(loss).dtype, loss)
        edit.replace(loss, new, rule=rule_here("head and loss"))
        transposed = [x for x in head.linear.all_input_nodes if x.op == "call_function" and x is not head.hidden]
        for node in (loss, *head.chain, *transposed):
            if not node.users:
                edit.erase(node)
        for index in lazy:
            edit.facts.add(Lazy(index, edit.outputs[index].name))
        return None


@dataclass
class Head:
    """A head read backwards from the loss.

    Attributes:
        linear: the node of the product. hidden, weight [classes, width], bias [classes] or [1, classes]: its inputs.
        scale, softcap: `softcap * tanh(scale * logits / softcap)`; softcap 0.0 for none.
        chain: the nodes from the loss to the linear, nearest to the loss first.
        shaping: those of them that select or flatten rows.
    """

    linear: fx.Node
    hidden: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    scale: float = 1.0
    softcap: float = 0.0
    chain: list[fx.Node] = field(default_factory=list)
    shaping: list[fx.Node] = field(default_factory=list)

    def rows(self, edit: Edit, like: fx.Node) -> fx.Node:
        """The rows of `hidden` that the loss sees, [rows, width]: what was done to the logits, done before the head."""
        x, width = self.hidden, static(meta.tensor(self.hidden).shape[-1])
        for node in reversed(self.shaping):
            if called(node, aten.slice.Tensor):
                x = edit.call(node.target, (x, *node.args[1:]), like=like)
            elif called(node, aten.flatten.using_ints):
                x = edit.call(node.target, (x, *node.args[1:]), like=like)
            else:
                x = edit.call(aten.reshape.default, (x, [*node.args[1][:-1], width]), like=like)
        return x


def read_head(node: fx.Node) -> Head | str:
    """The head whose logits `node` [rows, classes] holds, or why there is none."""
    chain: list[fx.Node] = []
    shaping: list[fx.Node] = []
    scale, softcap = 1.0, 0.0
    after = 1.0  # factors seen so far, on the loss's side of a tanh
    capped: fx.Node | None = None
    late: fx.Node | None = None  # a bias that is added to the product
    classes = meta.tensor(node).shape[-1]
    while True:
        chain.append(node)
        x = node.args[0] if node.args else None
        if called(node, aten.to.dtype):
            if meta.tensor(x).dtype.itemsize > meta.tensor(node).dtype.itemsize:
                return f"`{node.name}` narrows the logits to {meta.tensor(node).dtype}"
        elif called(node, *_FLATTENING):
            if not meta.same_size(meta.tensor(x).shape[-1], classes):
                return f"`{node.name}` mixes rows and classes"
            shaping.append(node)
        elif called(node, aten.slice.Tensor):
            if node.args[1] in (-1, meta.tensor(node).dim() - 1):
                return f"`{node.name}` selects some of the classes"
            shaping.append(node)
        elif called(node, aten.mul.Tensor, aten.div.Tensor) and _number(node.args[1]) and len(node.args) == 2 and not node.kwargs:
            after *= node.args[1] if node.target is aten.mul.Tensor else 1.0 / node.args[1]
        elif called(node, aten.tanh.default):
            if capped is not None or after <= 0:
                return f"`{node.name}` is a second tanh, or the cap is not positive"
            capped, softcap, after = node, after, 1.0
        elif called(node, aten.add.Tensor) and (added := _added(node)) is not None:
            x, late = added
            if not called(x, aten.linear.default) or len(x.args) > 2:
                return f"`{node.name}` adds to what is not a linear head without bias"
        elif not called(node, aten.contiguous.default, aten.alias.default):
            break
        node = x
    scale = after * softcap if capped is not None else after
    if called(node, aten.linear.default):
        parts = (*node.args, None)[:3]
    elif called(node, aten.matmul.default, aten.mm.default) and called(node.args[1], *_TRANSPOSES) and meta.tensor(node.args[1]).dim() == 2:
        parts = (node.args[0], node.args[1].args[0], None)
    else:
        return f"the logits come from `{node.name}` ({node.target if node.op == 'call_function' else node.op}), not from a linear head"
    hidden, weight, bias = parts
    return Head(node, hidden, weight, bias if late is None else late, scale, softcap, chain, shaping)


def _added(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(logits, bias) of a sum of logits with one number per class, [classes] or [1, ..., classes]."""
    if len(node.args) != 2 or node.kwargs or not all(isinstance(x, fx.Node) for x in node.args):
        return None
    for x, bias in (node.args, reversed(node.args)):
        val = meta.tensor(bias)
        if val.dim() and val.dtype == meta.tensor(x).dtype and meta.same_shape(meta.tensor(x), meta.tensor(node)) and all(static(size) == 1 for size in val.shape[:-1]) and meta.same_size(val.shape[-1], meta.tensor(node).shape[-1]):
            return x, bias
    return None


def outputs_of(edit: Edit, head: Head, loss: fx.Node) -> list[int] | str:
    """Which outputs read the logits; or, if the loss itself does by another way, why the logits must be computed."""
    inside = {*head.chain, loss}
    seen: dict[fx.Node, None] = {}
    waiting = [user for node in head.chain for user in node.users if user not in inside]
    after_loss = _after(loss)
    while waiting:
        node = waiting.pop()
        if node.op == "output" or node in seen:
            continue
        seen[node] = None
        if effectful(node):
            return f"the logits are also read by `{node.name}`, which must run"
        if node in after_loss:
            return f"the logits also reach the loss through `{next(iter(seen)).name}`"
        waiting += node.users
    found = []
    for index, value in enumerate(edit.outputs):
        if isinstance(value, fx.Node) and (value in seen or value in head.chain):
            found.append(index)
    return found


def _after(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


def _cast(edit: Edit, node: fx.Node | None, dtype: torch.dtype, like: fx.Node) -> fx.Node | None:
    if node is None or meta.tensor(node).dtype == dtype:
        return node
    return edit.call(aten.to.dtype, (node, dtype), like=like)


def _trains(edit: Edit, node: fx.Node | None) -> bool:
    """Whether the node's value takes a gradient, given what is frozen so far."""
    seen: set[fx.Node] = set()
    waiting = [node] if node is not None else []
    while waiting:
        node = waiting.pop()
        if node in seen or called(node, aten.detach.default):
            continue
        seen.add(node)
        val = meta.tensor(node)
        floating = val is not None and val.is_floating_point()
        if node.op == "placeholder" and floating and val.requires_grad:
            return True
        if node.op == "get_attr" and node.target in edit.slots and edit.trainable(node.target):
            return True
        waiting += node.all_input_nodes
    return False
