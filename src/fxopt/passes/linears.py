"""Linear-like nodes, found by dataflow: a product of an activation with one parameter, in the forms that `_product` names."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.part import part_of
from fxopt.torch_private import pytree

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default)
_PRODUCTS = {aten.linear.default: (0, 1), aten.addmm.default: (1, 2), aten.addmv.default: (1, 2), aten.baddbmm.default: (1, 2),
             **dict.fromkeys((aten.mm.default, aten.matmul.default, aten.bmm.default, aten.mv.default, aten.inner.default, aten.tensordot.default), (0, 1))}
_ASSERT = aten._assert_tensor_metadata.default


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b (`transposed`: y = x W + b), computed in the dtype of y.

    Attributes:
        node: the node whose value is y.
        x: the activation, [..., in].
        weight: the `get_attr` node of the parameter, [out, in] or [in, out].
        bias: the bias node, or None.
        chain: the nodes between the parameter and the product: transposes, and casts. W cast to the dtype of y at once is what they make.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    chain: tuple[fx.Node, ...] = ()

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
    found = _product(node)
    return found if found is not None and _why_not(found) is None else None


def _product(node: fx.Node) -> Linear | None:
    """The product with a parameter that a node is, whatever dtypes its weight passes through."""
    if node.op != "call_function":
        return None
    bias: Any = None
    turned = False
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
    elif node.target in (aten.matmul.default, aten.mm.default):
        x, weight = node.args
    elif node.target is aten.einsum.default and (found := _contraction(node)) is not None:
        x, weight, turned = found
    else:
        return None
    source, chain = _source(weight)
    if source is None or _source(x)[0] is not None:
        return None
    value, activation = meta.tensor(source), meta.tensor(x)
    if value is None or value.dim() != 2 or not value.is_floating_point() or activation is None or activation.dim() < 2:
        return None
    if bias is not None and (not isinstance(bias, fx.Node) or meta.tensor(bias) is None or meta.tensor(bias).dim() != 1):
        return None
    swaps = sum(map(_swaps, chain)) + (node.target is aten.linear.default or turned)
    return Linear(node, x, source, bias, swaps % 2 == 0, chain)


def _contraction(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(x, weight, whether the weight is [out, in]) of an einsum that is a linear: "...i,io->...o" or "...i,oi->...o", in any letters."""
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    terms, arrow, out = equation.partition("->")
    if not arrow or len(operands) != 2 or terms.count(",") != 1:
        return None
    pairs = list(zip(terms.split(","), operands))
    for (letters, x), (sides, weight) in (pairs, pairs[::-1]):
        kept, inner, plain = letters[:-1], letters[-1:], letters.replace("...", "")
        if _source(weight)[0] is None or len(sides) != 2 or len(set(sides)) != 2 or inner not in sides or len(set(plain)) != len(plain):
            continue
        other = sides.replace(inner, "")
        if other.isalpha() and inner.isalpha() and other not in letters and out == kept + other and meta.value(weight).shape[sides.index(inner)] == meta.value(x).shape[-1]:
            return x, weight, sides[1] == inner
    return None


def _source(operand: Any) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """(the `get_attr` that an operand comes from, the transposes and casts between the two); None if it comes from elsewhere."""
    chain: list[fx.Node] = []
    while isinstance(operand, fx.Node) and (_swaps(operand) or casts(operand)):
        chain.insert(0, operand)
        operand = operand.args[0]
    return (operand, tuple(chain)) if isinstance(operand, fx.Node) and operand.op == "get_attr" else (None, ())


def _swaps(node: fx.Node) -> bool:
    """Whether a node transposes a matrix."""
    if node.op != "call_function":
        return False
    if node.target is aten.transpose.int:
        return meta.tensor(node).dim() == 2 and {a % 2 for a in node.args[1:]} == {0, 1}
    return node.target in (aten.t.default, aten.numpy_T.default) or node.target is aten.permute.default and list(node.args[1]) == [1, 0]


def casts(node: fx.Node) -> bool:
    """Whether a node is a tensor in another dtype, on the same device."""
    if node.op != "call_function" or node.target not in _CASTS or meta.tensor(node.args[0]) is None:
        return False
    return meta.tensor(node).device == meta.tensor(node.args[0]).device


def _exact(dtypes: Sequence[torch.dtype]) -> bool:
    """Whether a value that goes through these dtypes, one after the other, is what one cast from the first to the last makes of it.

    So it is if nothing is rounded before it is in the last dtype: each step on the way is into a dtype that holds all values of
    the one before, or into the last one, which later ones then hold.
    """
    last = dtypes[-1]
    return all(dtype.is_floating_point for dtype in dtypes) and all(b == last or torch.promote_types(a, b) == b for a, b in itertools.pairwise(dtypes))


def _why_not(product: Linear) -> str | None:
    """Why the weight, cast at once to the dtype of the product, is not what the product reads; None if it is."""
    dtypes = [meta.tensor(node).dtype for node in (product.weight, *product.chain, product.node)]
    if _exact(dtypes):
        return None
    steps = [str(dtype).removeprefix("torch.") for dtype, _ in itertools.groupby(dtypes)]
    return f"is rounded on the way to {product.node.name} ({' to '.join(steps)}), which no cast of it to {steps[-1]} does"


def find(nodes: Iterable[fx.Node], parameters: Collection[str]) -> list[Linear]:
    """All linear-like nodes whose weight is one of the parameters, in order."""
    found = [read(node) for node in nodes]
    return [linear for linear in found if linear is not None and linear.name in parameters]


def by_weight(nodes: Iterable[fx.Node]) -> dict[str, list[fx.Node]]:
    """All products with a parameter or another tensor of the state, by its name; also those that are no linears because of their dtypes."""
    found: dict[str, list[fx.Node]] = {}
    for node in nodes:
        product = _product(node)
        if product is not None:
            found.setdefault(product.name, []).append(node)
    return found


def near(nodes: Iterable[fx.Node], parameters: Collection[str]) -> Iterable[tuple[str, fx.Node, str]]:
    """(parameter, node, reason) of what looks like a linear and is not read as one."""
    for node in nodes:
        product = _product(node)
        if product is not None and product.name in parameters and (reason := _why_not(product)) is not None:
            yield product.name, node, reason
        if node.op == "call_function" and node.target is torch.ops.higher_order.wrap_with_autocast:
            for source in {_source(arg)[0] for arg in node.args}:
                if source is not None and source.target in parameters and meta.tensor(source) is not None and meta.tensor(source).dim() == 2:
                    yield str(source.target), node, "is read in an autocast region inside another one that casts otherwise, which passes do not see into"


def unread(nodes: Iterable[fx.Node], parameters: Collection[str]) -> Iterable[tuple[str, fx.Node, str]]:
    """(parameter, node, reason) of each product with what is computed of a matrix among the parameters (and of no input), if it is no linear."""
    made: dict[fx.Node, dict[str, fx.Node]] = {}  # of each tensor that no input reaches, the matrices that it is computed of
    for node in nodes:
        value = meta.tensor(node)
        if node.op == "get_attr":
            wide = node.target in parameters and value is not None and value.dim() >= 2 and value.is_floating_point()
            made[node] = {str(node.target): node} if wide else {}
        if node.op != "call_function":
            continue
        behind = [each for each in node.all_input_nodes if meta.tensors(each)]
        if behind and all(each in made for each in behind):
            made[node] = {name: source for each in behind for name, source in made[each].items()}
        if node.target is aten.einsum.default:
            operands = node.args[1]
        elif node.target in _PRODUCTS:
            operands = [node.args[place] for place in _PRODUCTS[node.target] if place < len(node.args)]
        else:
            continue
        if _product(node) is None:
            for operand, name in dict.fromkeys((each, name) for each in operands for name in made.get(each, ())):
                through = "" if operand.op == "get_attr" else f" through {operand.name}"
                yield name, node, f"is multiplied by {node.name}{through}, which is not read as a linear"


def without_asserts(edit: Edit) -> None:
    """Erase the asserts of dtypes that a capture puts beside casts of the state. They hold, and would go on reading what a pass replaces."""
    for node in edit.nodes:
        if node.op == "call_function" and node.target is _ASSERT and _source(node.args[0])[0] is not None:
            edit.erase(node)


def adds(product: fx.Node, node: fx.Node) -> bool:
    """Whether a linear, or what a pass made of it, adds the node as its bias (a row of its own weight, perhaps)."""
    linear = read(product)
    if linear is not None:
        return linear.bias is node
    return any(isinstance(arg, (list, tuple)) and node in arg for arg in product.args[4:5])  # the biases of `lora_linear`


# -- the output head -------------------------------------------------------------------------------------------------------


def heads(edit: Edit, products: Mapping[str, Collection[fx.Node]]) -> dict[str, str]:
    """The weights of output heads, each with the reason in words.

    A head is the last product on every way to one of the outputs: no product reads what it computes, and whatever another product
    computes reaches that output (logits, a loss) through it alone. Other outputs (hidden states, caches) do not matter. The only
    weight of a program is no head.

    Args:
        products: for each weight, all nodes that multiply with it: linears, and what passes made of them. Also weights that are no
            candidates of the caller's, such as a head that is trained whole: without them, the product before would look like the last.
    """
    owner = {node: name for name, nodes in products.items() for node in nodes}
    part = part_of(edit.facts)
    if part is not None and not part.last:
        return {}
    if len(products) < 2:
        alone = part is not None and not part.first
        return {name: "everything that the model computes goes through it alone" for name in products} if alone else {}
    behind: dict[fx.Node, set[str]] = {}  # of each node, the weights that something behind it is multiplied with (two are enough)
    for node in reversed(edit.nodes):
        found = behind[node] = set()
        for user in node.users:
            for name in (*behind[user], *((owner[user],) if user in owner else ())):
                if len(found) < 2:
                    found.add(name)
    outputs = edit.graph.output_node().all_input_nodes
    chosen: dict[str, str] = {}
    for name, nodes in products.items():
        if any(behind[node] - {name} for node in nodes):
            continue
        rest = {node for other, mine in products.items() if other != name for node in mine}
        last = [out for out in outputs if not _ancestors(out).isdisjoint(nodes) and rest.isdisjoint(_ancestors(out, nodes)) and not rest.isdisjoint(_ancestors(out))]
        if last:
            chosen[name] = f"what other linears compute reaches {' and '.join(_said(edit, out) for out in last)} through it alone"
    return chosen


def _said(edit: Edit, out: fx.Node) -> str:
    """An output in the caller's words: its path in the return value."""
    at = [i for i, value in enumerate(edit.outputs) if value is out]
    spec = edit.source.signature.out_spec
    paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))[0]]
    return ", ".join(f"output {''.join(str(key) for key in paths[i]) or i}" if len(paths) == len(edit.outputs) else f"output {i}" for i in at)


def _ancestors(node: fx.Node, without: Collection[fx.Node] = ()) -> set[fx.Node]:
    """A node and everything that it is computed from, not looking behind `without`."""
    reached: set[fx.Node] = set()
    stack = [node]
    while stack:
        found = stack.pop()
        if found not in reached and found not in without:
            reached.add(found)
            stack.extend(found.all_input_nodes)
    return reached


# -- casts -----------------------------------------------------------------------------------------------------------------


def cast(edit: Edit, node: fx.Node | None, dtype: torch.dtype, like: fx.Node) -> fx.Node | None:
    """The node's value in a dtype. Needed where autocast, or the model's code, casts what the linear reads."""
    found = meta.tensor(node)
    if node is None or found is None or found.dtype == dtype:
        return node
    return edit.call(aten.to.dtype, (node, dtype), like=like)


def uncast(node: fx.Node) -> fx.Node:
    """What a node casts, if one cast of that gives the node's value (see `_exact`); else the node."""
    dtypes, source = [meta.tensor(node).dtype], node
    while casts(source):
        before = meta.tensor(source.args[0]).dtype
        if not _exact([before, *dtypes]):
            break
        source = source.args[0]
        dtypes.insert(0, before)
    return source


def module_of(name: str) -> tuple[str, str]:
    """(module path, leaf) of a parameter's name."""
    path, _, leaf = name.rpartition(".")
    return path, leaf
