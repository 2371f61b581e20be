"""Adapters on stacks of matrices [experts, ., .], of which each row of x meets one: W_e becomes W_e + scale B_e A_e.

Programs multiply by such a weight in a few ways, all of which are a product with some of its matrices: all of them in a batch,
those that an index chooses for each row, one that a number chooses, or each one with its own group of rows. The same
operations on the factors give the low-rank product, from the low side: (x A_e^T) B_e^T. No B_e A_e is formed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.passes import linears
from fxopt.passes.adapters.site import Config, Site, factor, stacked_kaiming, zeros

aten = torch.ops.aten

_PRODUCTS = (aten.bmm.default, aten.matmul.default, aten.mm.default)
_CHOICES = (aten.index.Tensor, aten.index_select.default, aten.select.int)


@dataclass(frozen=True)
class Product:
    """A product with matrices of a stack.

    Attributes:
        name: slot of the stack. chain: the nodes between the stack and the product, first the stack's reader.
        x: the activation's position among the node's arguments; weight: the operand's.
        transposed: the stack is [experts, in, out], else [experts, out, in].
        left: the product is W x, else x W.
    """

    name: str
    chain: tuple[fx.Node, ...]
    x: int
    weight: int
    transposed: bool
    left: bool


def read(node: fx.Node, parameters: Set[str]) -> Product | None:
    """The product with a stack that a node is, or None."""
    if node.op != "call_function":
        return None
    if node.target in _PRODUCTS:
        candidates = [(1, 0, False), (0, 1, True)]  # (weight, x, whether the weight stands on the left)
    elif node.target is aten.addmm.default and not node.kwargs:
        candidates = [(2, 1, False), (1, 2, True)]
    elif node.target is aten.linear.default or _grouped(node):
        candidates = [(1, 0, False)]
    else:
        return None
    for weight, x, left in candidates:
        found = _chain(node.args[weight], parameters)
        if found is not None and isinstance(node.args[x], fx.Node):
            name, chain = found
            swapped = sum(_swaps(each) for each in chain) % 2 == 1
            # x W reads W as [in, out], a linear and W x as [out, in]; a swap on the way turns that around
            transposed = swapped == (left or node.target is aten.linear.default)
            return Product(name, chain, x, weight, transposed, left)
    return None


def find(node: fx.Node, parameters: Set[str]) -> Site | None:
    """The product with a stack of matrices that a node is, if the stack is one of the parameters."""
    found = read(node, parameters)
    return None if found is None else Site(node, found.name, "experts", found.chain, found.transposed)


def rewrite(edit: Edit, site: Site, config: Config) -> None:
    """y becomes y + scale (x A_e^T) B_e^T, by the operations that made y of x and W_e."""
    node, call = site.node, functools.partial(edit.call, like=site.node)
    product = read(node, {site.name})
    assert product is not None
    if config.variant == "dora" or config.dropout:
        asked = "variant=dora" if config.variant == "dora" else f"dropout={config.dropout:g}"
        raise PassError(f"lora: {site.name} is a stack of experts, whose adapters take no {asked.partition('=')[0] if config.dropout else 'DoRA'}",
                        where=str(meta.provenance(node)), do=f"leave it out of targets, or take {asked} out; another adapter can have other settings")
    experts, *sizes = edit.slots[site.name].shape
    fan_in, fan_out = sizes if product.transposed else reversed(sizes)
    a = factor(edit, site, config, "a", (experts, config.rank, fan_in), stacked_kaiming, product.transposed)
    b = factor(edit, site, config, "b", (experts, fan_out, config.rank), zeros, product.transposed)
    dtype = meta.tensor(node).dtype
    first, second = (_chosen(call, linears.cast(edit, each, dtype, node), product.chain) for each in (a, b))
    x = linears.cast(edit, node.args[product.x], dtype, node)
    if product.left:
        low = _multiply(call, node, second, _multiply(call, node, first, x))
    elif node.target is aten.linear.default:
        low = _multiply(call, node, _multiply(call, node, x, first), second)
    else:
        first, second = (call(aten.transpose.int, (each, -2, -1)) for each in (first, second))
        low = _multiply(call, node, _multiply(call, node, x, first), second)
    base = call(node.target, node.args, dict(node.kwargs))
    edit.replace(node, call(aten.add.Tensor, (base, call(aten.mul.Tensor, (low, config.scale)))), rule=rule_here("lora"))
    edit.erase(node)


def _grouped(node: fx.Node) -> bool:
    """A product of groups of rows with one matrix each: x [rows, in], W [experts, in, out], the groups' ends."""
    name = str(node.target)
    return name.endswith((".grouped_mm_fallback.default", "._grouped_mm.default")) and meta.tensor(node.args[0]).dim() == 2 and not node.kwargs


def _chain(operand: Any, parameters: Set[str]) -> tuple[str, tuple[fx.Node, ...]] | None:
    """(name of the stack, the nodes that lead from it to the operand), if that is where the operand comes from."""
    chain: list[fx.Node] = []
    while isinstance(operand, fx.Node) and operand.op == "call_function":
        if not (_swaps(operand) or _chooses(operand)):
            return None
        chain.insert(0, operand)
        operand = operand.args[0]
    if not isinstance(operand, fx.Node) or operand.op != "get_attr" or operand.target not in parameters or meta.tensor(operand).dim() != 3:
        return None
    return str(operand.target), tuple(chain)


def _swaps(node: fx.Node) -> bool:
    """Whether a node swaps its last two dimensions and nothing else."""
    if node.target is aten.transpose.int:
        dims = meta.tensor(node).dim()
        return {each % dims for each in node.args[1:3]} == {dims - 1, dims - 2}
    return node.target in (aten.t.default, aten.mT.default)


def _chooses(node: fx.Node) -> bool:
    """Whether a node takes some matrices out of a stack, by their place in its first dimension."""
    if node.target not in _CHOICES or meta.tensor(node.args[0]).dim() != 3:
        return False
    if node.target is aten.index.Tensor:
        return len(node.args[1]) == 1 and not meta.tensor(node.args[1][0]).is_floating_point()
    return node.args[1] in (0, -3)


def _chosen(call: Callable[..., fx.Node], stack: fx.Node, chain: tuple[fx.Node, ...]) -> fx.Node:
    """What the chain chooses, of another stack of as many matrices; not transposed."""
    for node in chain:
        if not _swaps(node):
            stack = call(node.target, (stack, *node.args[1:]))
    return stack


def _multiply(call: Callable[..., fx.Node], node: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node:
    """The node's product of other operands, without its bias."""
    if node.target is aten.addmm.default:
        return call(aten.mm.default, (left, right))
    rest = node.args[2:3] if _grouped(node) else ()
    return call(node.target, (left, right, *rest))
