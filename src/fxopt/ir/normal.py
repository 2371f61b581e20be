"""The canonical form of a graph: exact rewrites only, so that one pattern finds what is written in many ways."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, effectful, mutates, random, rule_here
from fxopt.ir.index import Flow, arguments, called, static, writes
from fxopt.torch_private import OpOverload

aten = torch.ops.aten

_ASSERTS = (aten._assert_tensor_metadata.default,)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten._to_copy.default)
# Other spellings of the same operator, with the same arguments.
_SPELLINGS = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor, aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor, aten.subtract.Tensor: aten.sub.Tensor, aten.divide.Tensor: aten.div.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor, aten.negative.default: aten.neg.default,
    aten.greater.Tensor: aten.gt.Tensor, aten.greater_equal.Tensor: aten.ge.Tensor, aten.less.Tensor: aten.lt.Tensor, aten.less_equal.Tensor: aten.le.Tensor,
    # the scalar overloads wrap the number in a tensor and call the tensor overload
    aten.mul.Scalar: aten.mul.Tensor, aten.add.Scalar: aten.add.Tensor, aten.sub.Scalar: aten.sub.Tensor, aten.div.Scalar: aten.div.Tensor,
    aten.rsub.Tensor: None, aten.square.default: None,
}
_VIEWS = (aten.view.default, aten.reshape.default, aten.expand.default, aten.view_as.default, aten.expand_as.default, aten.alias.default,
          aten.squeeze.default, aten.squeeze.dim, aten.flatten.using_ints, aten.unflatten.int)
# Operators whose result is contiguous whatever the strides of their inputs are.
_DENSE = (aten.linear.default, aten.embedding.default, aten.mm.default, aten.addmm.default, aten.arange.default, aten.contiguous.default)


def normalize(edit: Edit) -> int:
    """Bring the edited graph into canonical form. Returns how many rewrites it took.

    Every rewrite is exact: the same numbers, the same aliasing of what is returned, the same random stream. It adds no
    guard on a dynamic size: sizes are compared by structure.
    """
    before = len(edit.rewrites)
    for node in edit.nodes:
        if called(node, *_ASSERTS) and not edit.spent:
            edit.erase(node)
            edit.rewrote(rule_here("metadata assert"), node)
    _without_writes(edit)
    spell(edit)
    _without_no_ops(edit)
    merge_equal(edit)
    edit.dead()
    return len(edit.rewrites) - before


def spell(edit: Edit) -> None:
    """One spelling for operators that have several."""
    for node in edit.nodes:
        if node.op != "call_function":
            continue
        if called(node, *_CASTS) and node.target is not aten.to.dtype:
            _spell_cast(edit, node)
        elif node.target is aten.square.default:
            # square is pow(x, 2) in ATen, forward and backward
            edit.set_target(node, aten.pow.Tensor_Scalar)
            edit.set_args(node, (node.args[0], 2), {})
        elif node.target is aten.slice.Tensor:
            _spell_slice(edit, node)
        elif node.target is aten.rsub.Tensor and _plain(node):
            edit.set_target(node, aten.sub.Tensor)
            edit.set_args(node, (node.args[1], node.args[0]), {})
        elif _SPELLINGS.get(node.target) is not None and (_plain(node) or node.target._schema.overload_name != "Scalar"):
            edit.set_target(node, _SPELLINGS[node.target])


def _spell_slice(edit: Edit, node: fx.Node) -> None:
    """`slice(x, dim, start, end[, step])` with bounds that count from the front and no end beyond the size."""
    given = arguments(node)
    x, dim = given["self"], given.get("dim", 0)
    size = static(meta.tensor(x).shape[dim])
    start, end, step = given.get("start", 0), given.get("end", sys.maxsize), given.get("step", 1)
    if size is not None:
        if isinstance(start, int) and start < 0:
            start = max(0, start + size)
        if isinstance(end, int) and end < 0:
            end = max(0, end + size)
        if isinstance(end, int) and end >= size:
            end = sys.maxsize
    args = (x, dim, start, end) if step == 1 else (x, dim, start, end, step)
    if args != tuple(node.args) or node.kwargs:
        edit.set_args(node, args, {})


def _plain(node: fx.Node) -> bool:
    """Two arguments, no `alpha`."""
    return len(node.args) == 2 and not node.kwargs


def _spell_cast(edit: Edit, node: fx.Node) -> None:
    """Any cast that keeps device and layout, as `to.dtype(x, dtype)`."""
    given = arguments(node)
    x = given.get("self")
    was, now = meta.tensor(x), meta.tensor(node)
    if was is None or now is None or was.device != now.device or was.layout != now.layout:
        return
    if given.get("copy") or "memory_format" in given or given.get("pin_memory"):
        return
    if node.target is aten._to_copy.default and was.dtype == now.dtype:
        return  # always copies
    edit.set_target(node, aten.to.dtype)
    edit.set_args(node, (x, now.dtype), {})


# -- in-place operators ----------------------------------------------------------------------------------------------


def _without_writes(edit: Edit) -> None:
    """In-place operators on values that nobody else can see become ordinary ones."""
    for node in edit.nodes:
        if node.op != "call_function" or not mutates(node) or random(node) or edit.spent:
            continue
        target = _functional(node.target)
        if target is None:
            continue
        flow = Flow(edit.graph, edit.slots)
        why = _visible(flow, node)
        if why is not None:
            if not _scatter(edit, flow, node, target) and not any(miss.node == node.name for miss in edit.misses):
                edit.missed("in-place", node, why)
            continue
        x = node.args[0]
        if node.target is aten.copy_.default:
            continue  # all of x is overwritten by a copy: as good as it gets
        if not _has_derivative(flow, node, target):
            continue
        new = edit.call(target, node.args, dict(node.kwargs), like=node)
        if not (meta.tensor(new).dtype == meta.tensor(x).dtype and meta.same_shape(meta.tensor(new), meta.tensor(x))):
            edit.erase(new)
            edit.missed("in-place", node, "written as an ordinary operator it would change the dtype or the shape")
            continue
        position = flow.order[node]
        edit.replace(x, new, unless=lambda user: flow.order.get(user, -1) <= position)
        edit.replace(node, new, rule=rule_here("in-place"))
        edit.erase(node)


def _functional(target: Any) -> Any:
    """The operator without the trailing underscore, if it takes the same arguments."""
    # By the name and the schema: the tag `inplace` is younger than torch 2.11.
    if not isinstance(target, OpOverload) or target.namespace != "aten" or not target._schema.is_mutable or not target._schema.name.endswith("_"):
        return None
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None) if packet is not None else None
    if found is None or found._schema.is_mutable:
        return None
    same = [a.name for a in found._schema.arguments] == [a.name for a in target._schema.arguments]
    return found if same else None


def _visible(flow: Flow, node: fx.Node) -> str | None:
    """Why the write could be seen by someone other than the later readers of the written node; None if it cannot."""
    x = node.args[0]
    if list(writes(node)) != [x]:
        return "it writes into more than its first argument"
    if flow.state(x):
        return "it writes into an input or into the model's state"
    position = flow.order[node]
    for root in flow.roots[x]:
        if not isinstance(root.target, OpOverload):
            return f"nothing is known about the memory of `{root.name}`"
        for other in flow.aliases[root]:
            if other is x or other is node:
                continue
            late = [user for user in other.users if flow.order.get(user, position + 1) > position]
            if late and flow.order[other] < position:
                return f"`{other.name}`, a view of the same memory, is read later by `{late[0].name}`"
    return None


# Ordinary forms that are not elementwise and have a derivative; not every one has.
_DIFFERENTIABLE = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.fill.Scalar, aten.fill.Tensor, aten.index_put.default, aten.zero.default,
                             aten.index_add.default, aten.index_fill.int_Scalar, aten.scatter.src, aten.scatter_add.default})


def _has_derivative(flow: Flow, node: fx.Node, target: Any) -> bool:
    return torch.Tag.pointwise in target.tags or target in _DIFFERENTIABLE or not flow.grad.intersection(node.all_input_nodes)


_SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}


def _scatter(edit: Edit, flow: Flow, node: fx.Node, target: Any) -> bool:
    """A write into a part of a value that nobody else can see becomes the value with that part replaced."""
    x, position = node.args[0], flow.order[node]
    scatter = _SCATTERS.get(x.target) if x.op == "call_function" else None
    if scatter is None or list(writes(node)) != [x] or flow.state(x) or flow.roots[x] != {x.args[0]} or node.users:
        return False
    base = x.args[0]
    views = [other for other in flow.aliases[base] if other is not base and flow.order[other] < position]
    if any(flow.order.get(user, position + 1) > position for view in views for user in view.users):
        return False
    if node.target is aten.copy_.default:
        cast = edit.call(aten.to.dtype, (node.args[1], meta.tensor(x).dtype), like=node)  # aten.copy has no derivative
        value = edit.call(aten.expand_as.default, (cast, x), like=node)
    elif not _has_derivative(flow, node, target):
        return False
    else:
        value = edit.call(target, node.args, dict(node.kwargs), like=node)
    if not _same(value, x):
        return False  # what was made is dead code
    new = edit.call(scatter, (base, value, *x.args[1:]), dict(x.kwargs), like=node)
    edit.replace(base, new, rule=rule_here("in-place part"), unless=lambda user: user is value or flow.order.get(user, -1) <= position)
    edit.erase(node)
    return True


# -- operators that do nothing ---------------------------------------------------------------------------------------


def _without_no_ops(edit: Edit) -> None:
    flow = Flow(edit.graph, edit.slots)
    output = edit.graph.output_node()
    for node in edit.nodes:
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or edit.spent:
            continue
        x = node.args[0] if node.args else None
        if not isinstance(x, fx.Node) or not rule(node, x, flow):
            continue
        if output in node.users and (output in x.users or x.op != "call_function") and rule is not _same_cast:
            continue  # the caller gets a tensor object of its own
        fresh = node in flow.roots[node]
        if fresh and not _may_share(flow, node, x):
            continue
        edit.replace(node, x, rule=rule_here(f"no-op {node.target}"))
        edit.erase(node)


def _may_share(flow: Flow, node: fx.Node, x: fx.Node) -> bool:
    """Whether a fresh copy of x can be x itself: nobody writes into either, and no second output shares the memory."""
    roots = flow.roots[x]
    if flow.written & (roots | {node}):
        return False
    return node not in flow.returned or not (flow.state(x) or roots & flow.returned)


def _same(a: fx.Node, b: fx.Node) -> bool:
    x, y = meta.tensor(a), meta.tensor(b)
    return x is not None and y is not None and x.dtype == y.dtype and x.device == y.device and meta.same_shape(x, y)


def _same_cast(node: fx.Node, x: fx.Node, flow: Flow) -> bool:
    return _same(node, x) and not arguments(node).get("copy") and "memory_format" not in arguments(node) and \
        meta.tensor(node).layout == meta.tensor(x).layout


def _same_view(node: fx.Node, x: fx.Node, flow: Flow) -> bool:
    return _same(node, x)


def _whole_slice(node: fx.Node, x: fx.Node, flow: Flow) -> bool:
    given = arguments(node)
    if given.get("step", 1) != 1 or given.get("start", 0) != 0:
        return False
    end, size = given.get("end", sys.maxsize), meta.tensor(x).shape[given.get("dim", 0)]
    if isinstance(end, fx.Node):
        return meta.same_size(meta.value(end), size)
    return end == sys.maxsize or (static(size) is not None and end >= static(size))


def _one(node: fx.Node, x: fx.Node, flow: Flow) -> bool:
    """x * 1 and x / 1."""
    return _plain(node) and _number(node.args[1], 1) and _same(node, x)


def _zero(node: fx.Node, x: fx.Node, flow: Flow) -> bool:
    """x - 0, and x + 0 for integers; for floating point x + 0 turns -0.0 into 0.0."""
    exact = node.target is aten.sub.Tensor or not (meta.tensor(x).is_floating_point() or meta.tensor(x).is_complex())
    return _number(node.args[1], 0) and exact and _same(node, x) and len(node.args) == 2


def _number(value: Any, wanted: int) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == wanted


def _already_contiguous(node: fx.Node, x: fx.Node, flow: Flow) -> bool:
    """Only behind an operator that is contiguous for any input: fake strides of other values are a guess."""
    while called(x, aten.view.default, aten.unsqueeze.default):
        x = x.args[0]
    return called(x, *_DENSE) and "memory_format" not in arguments(node) and "memory_format" not in arguments(x)


def _no_dropout(node: fx.Node, x: fx.Node, flow: Flow) -> bool:
    """Dropout in eval mode or with p = 0 returns its input."""
    return not random(node)


def _detached(node: fx.Node, x: fx.Node, flow: Flow) -> bool:
    return x not in flow.grad


_RULES: dict[Any, Callable[[fx.Node, fx.Node, Flow], bool]] = {
    **{target: _same_cast for target in (*_CASTS,) if target is not aten._to_copy.default},
    **{target: _same_view for target in _VIEWS},
    aten.slice.Tensor: _whole_slice, aten.mul.Tensor: _one, aten.div.Tensor: _one, aten.add.Tensor: _zero, aten.sub.Tensor: _zero,
    aten.contiguous.default: _already_contiguous, aten.dropout.default: _no_dropout, aten.detach.default: _detached,
}


# -- common subexpressions -------------------------------------------------------------------------------------------


def merge_equal(edit: Edit) -> None:
    """Compute equal values once, within one module's call and where no gradient flows.

    With a gradient, one node's backward of a sum is not bitwise the sum of two backwards. Across modules, the second
    module would read a value made inside the first one, and repeated blocks would no longer be alike.
    """
    flow = Flow(edit.graph, edit.slots)
    seen: dict[Any, fx.Node] = {}
    for node in edit.nodes:
        if node.op == "get_attr":
            key: Any = ("state", node.target)
        elif node.op != "call_function" or node in flow.grad or effectful(node) or not isinstance(node.target, OpOverload | type(operator.getitem)):
            continue
        elif flow.roots[node] & flow.written or any(flow.roots[x] & flow.written for x in node.all_input_nodes):
            continue
        else:
            given = arguments(node)
            key = (node.target, meta.provenance(node).path, tuple((name, _frozen(value)) for name, value in given.items()))
        first = seen.setdefault(key, node)
        if first is node:
            continue
        both_returned = node.op != "get_attr" and flow.roots[first] & flow.returned and flow.roots[node] & flow.returned
        if both_returned or edit.spent:
            continue  # the caller may write into one of them
        edit.replace(node, first, rule=rule_here("equal value"))
        edit.erase(node)


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return ("list", *(_frozen(item) for item in value))
    if isinstance(value, (bool, int, float)):
        return (type(value), repr(value))  # True, 1 and 1.0 are different arguments; so are 0.0 and -0.0
    return value
