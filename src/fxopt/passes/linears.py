"""Linear-like nodes, found by dataflow: a product of an activation with one parameter, however it is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b (`transposed`: y = x W + b).

    Attributes:
        node: the node whose value is y.
        x: the activation, [..., in].
        weight: the `get_attr` node of the parameter, [out, in] or [in, out].
        bias: the bias node, or None.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool

    @property
    def name(self) -> str:
        """The weight's slot."""
        return str(self.weight.target)

    @property
    def features(self) -> tuple[int, int]:
        """(in, out)."""
        rows, columns = (int(s) for s in meta.value(self.weight).shape)
        return (rows, columns) if self.transposed else (columns, rows)


def read(node: fx.Node) -> Linear | None:
    """The linear that a node is, or None."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        weight = node.args[1]
        return _linear(node, node.args[0], weight, node.args[2] if len(node.args) > 2 else None, False)
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
        return _linear(node, x, *_untransposed(weight), bias)
    if node.target in (aten.matmul.default, aten.mm.default):
        x, weight = node.args
        return _linear(node, x, *_untransposed(weight), None)
    return None


def _untransposed(weight: Any) -> tuple[Any, bool]:
    """(the parameter, whether the product reads it as [in, out])."""
    if isinstance(weight, fx.Node) and weight.op == "call_function":
        swaps = weight.target is aten.t.default or (weight.target is aten.transpose.int and {a % 2 for a in weight.args[1:]} == {0, 1})
        swaps = swaps or weight.target is aten.numpy_T.default or (weight.target is aten.permute.default and list(weight.args[1]) == [1, 0])
        if swaps:
            return weight.args[0], False
    return weight, True


def _linear(node: fx.Node, x: Any, weight: Any, a: Any, b: Any) -> Linear | None:
    transposed, bias = (b, a) if isinstance(b, bool) else (a, b)
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node) and weight.op == "get_attr"):
        return None
    value, activation = meta.tensor(weight), meta.tensor(x)
    if value is None or value.dim() != 2 or activation is None or activation.dim() < 2 or x.op == "get_attr":
        return None
    if bias is not None and (not isinstance(bias, fx.Node) or meta.tensor(bias) is None or meta.tensor(bias).dim() != 1):
        return None
    return Linear(node, x, weight, bias, transposed)


def find(nodes: Iterable[fx.Node], parameters: set[str]) -> list[Linear]:
    """All linear-like nodes whose weight is one of the parameters, in order."""
    found = [read(node) for node in nodes]
    return [linear for linear in found if linear is not None and linear.name in parameters]


def others(edit: Edit, name: str, linears: Iterable[Linear]) -> list[fx.Node]:
    """Readers of a parameter that are not linear-like (a tied embedding, a weight norm)."""
    mine = {linear.node for linear in linears}
    readers: list[fx.Node] = []
    for node in edit.nodes:
        if node.op == "get_attr" and node.target == name:
            for user in node.users:
                direct = user in mine
                through = bool(user.users) and all(u in mine and not adds(u, user) for u in user.users) and isinstance(meta.value(user), torch.Tensor)
                if not direct and not through:
                    readers.append(user)
    return readers


def adds(product: fx.Node, node: fx.Node) -> bool:
    """Whether a linear, or what a pass made of it, adds the node as its bias (a row of its own weight, perhaps)."""
    linear = read(product)
    if linear is not None:
        return linear.bias is node
    return any(isinstance(arg, (list, tuple)) and node in arg for arg in product.args[4:5])  # the biases of `lora_linear`


def head(edit: Edit, linears: list[Linear], products: Iterable[fx.Node] = ()) -> str | None:
    """The weight of the output head: the last linear, if everything that any other product computes goes through it.

    `products`: nodes that were linears before a pass rewrote them.
    """
    if not linears:
        return None
    last = linears[-1]
    rest = {linear.node for linear in linears if linear.name != last.name} | set(products)
    if not rest:
        return None
    # each output that the last linear reaches, looked at alone: hidden states or caches beside the logits do not matter
    for out in next(reversed(edit.nodes)).all_input_nodes:
        if last.node in _ancestors(out, None) and rest & _ancestors(out, last.node):
            return None
    return last.name


def _ancestors(node: fx.Node, without: fx.Node | None) -> set[fx.Node]:
    """Everything that a node is computed from, not looking behind `without`."""
    reached: set[fx.Node] = set()
    stack = [node]
    while stack:
        found = stack.pop()
        if found not in reached and found is not without:
            reached.add(found)
            stack.extend(found.all_input_nodes)
    return reached


def cast(edit: Edit, node: fx.Node | None, dtype: torch.dtype, like: fx.Node) -> fx.Node | None:
    """The node's value in a dtype. Needed where the program was captured under autocast, which casts inside the linear."""
    found = meta.tensor(node)
    if node is None or found is None or found.dtype == dtype:
        return node
    return edit.call(aten.to.dtype, (node, dtype), like=like)


def uncast(node: fx.Node) -> fx.Node:
    """What a cast node casts."""
    return uncast(node.args[0]) if node.op == "call_function" and node.target is aten.to.dtype else node


def module_of(name: str) -> tuple[str, str]:
    """(module path, leaf) of a parameter's name."""
    path, _, leaf = name.rpartition(".")
    return path, leaf
