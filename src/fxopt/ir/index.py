"""What a graph says about memory and gradients: which nodes share storage, which are written, which take a gradient."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import mutates, random
from fxopt.torch_private import OpOverload

aten = torch.ops.aten

# Composite operators whose schema does not say that they may return their input, and do not.
_FRESH = frozenset({
    aten.linear.default, aten.matmul.default, aten.layer_norm.default, aten.rms_norm.default, aten.scaled_dot_product_attention.default,
    aten.cross_entropy_loss.default, aten.softmax.int, aten.log_softmax.int, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.group_norm.default,
    aten.batch_norm.default, aten.instance_norm.default,
    aten.silu.default, aten.embedding.default, aten.repeat_interleave.self_int, aten.stack.default, aten.cat.default,
})

_CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default})


def static(size: Any) -> int | None:
    """A size as an int if it is known at compile time (a SymInt may hold a constant), else None; adds no guard."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_Integer else None
    return int(size)


def called(node: Any, *targets: Any) -> bool:
    """Whether `node` is a node that calls one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by schema name, without those that are None or equal to their default."""
    target = node.target
    if not isinstance(target, OpOverload):
        return {**{str(i): arg for i, arg in enumerate(node.args)}, **node.kwargs}
    found: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if value is None or (argument.has_default_value() and not isinstance(value, fx.Node) and type(value) is type(argument.default_value)
                             and value == argument.default_value):
            continue
        found[argument.name] = value
    return found


_FROM_END = ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim")


def full_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in, dimensions counted from the end (`-1` is the last)."""
    target = node.target
    if not isinstance(target, OpOverload):
        return arguments(node)
    found: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        found[argument.name] = _from_end(node, value) if argument.name in _FROM_END else value
    return found


def _from_end(node: fx.Node, dim: Any) -> Any:
    if isinstance(dim, (list, tuple)):
        return sorted(_from_end(node, item) for item in dim)
    if not isinstance(dim, int) or dim < 0:
        return dim
    widened = node.target in (aten.unsqueeze.default, aten.stack.default)
    whole = meta.tensor(node) if widened else next((val for source in node.all_input_nodes for val in meta.tensors(source)), None)
    return dim - whole.dim() if whole is not None else dim


class Flow:
    """Facts about one state of a graph; make a new one after the graph changed.

    Attributes:
        order: position of each node.
        roots: for each node, the nodes whose storage its value may share (itself if it is fresh).
        aliases: for each root, the nodes whose value may share its storage.
        written: roots that some node writes into.
        returned: roots whose storage reaches an output.
        grad: nodes whose value may take a gradient, as if every floating-point parameter and input did.
    """

    def __init__(self, graph: fx.Graph, slots: Any) -> None:
        self.order: dict[fx.Node, int] = {}
        self.roots: dict[fx.Node, frozenset[fx.Node]] = {}
        self.aliases: dict[fx.Node, list[fx.Node]] = {}
        self.written: set[fx.Node] = set()
        self.returned: set[fx.Node] = set()
        self.grad: set[fx.Node] = set()
        for i, node in enumerate(graph.nodes):
            self.order[node] = i
            if node.op == "output":
                for source in node.all_input_nodes:
                    self.returned |= self.roots[source]
                continue
            shared = {root for source in sharing(node) for root in self.roots[source]}
            self.roots[node] = frozenset(shared) if shared else frozenset({node})
            for root in self.roots[node]:
                self.aliases.setdefault(root, []).append(node)
            for source in writes(node):
                self.written |= self.roots[source]
            if self._takes_gradient(node, slots):
                self.grad.add(node)

    def _takes_gradient(self, node: fx.Node, slots: Any) -> bool:
        if not any(val.is_floating_point() or val.is_complex() for val in meta.tensors(node)):
            return False
        if node.op == "placeholder":
            return True
        if node.op == "get_attr":
            slot = slots.get(node.target)
            return slot is not None and slot.kind == "parameter"
        if node.target is aten.detach.default:
            return False
        return any(source in self.grad for source in node.all_input_nodes)

    def state(self, node: fx.Node) -> bool:
        """Whether the node's storage may belong to an input or to the model's state."""
        return any(root.op != "call_function" for root in self.roots[node])


def sharing(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments whose storage the node's value may share."""
    target = node.target
    if node.op != "call_function":
        return
    if not isinstance(target, OpOverload):
        yield from node.all_input_nodes  # getitem, and higher-order operators, of which nothing is known
        return
    kind, marked = _shares(target)
    if kind == "nothing":
        return
    if target in _CASTS and meta.tensor(node) is not None and meta.tensor(node.args[0]) is not None and meta.tensor(node).dtype != meta.tensor(node.args[0]).dtype:
        return  # converting copies
    if kind == "marked":
        given = _by_name(node)
        for name in marked:
            yield from _nodes(given.get(name))
    else:
        yield from node.all_input_nodes  # a composite without annotations, such as dropout, may return its input


@functools.cache
def _shares(target: OpOverload) -> tuple[str, tuple[str, ...]]:
    """What an operator's value may share memory with: "nothing", the "marked" arguments, or "any" of them."""
    marked = tuple(a.name for a in target._schema.arguments if a.alias_info is not None)
    if target in _FRESH:
        return "nothing", ()
    if marked and any(r.alias_info is not None for r in target._schema.returns):
        return "marked", marked
    return ("any", ()) if not marked and target._can_decompose() else ("nothing", ())


@functools.cache
def _names(target: OpOverload) -> tuple[str, ...]:
    return tuple(a.name for a in target._schema.arguments)


def writes(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that the node writes into."""
    if node.op != "call_function" or not mutates(node):
        return
    given = _by_name(node)
    marked = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    for name in marked or ("running_mean", "running_var"):
        yield from _nodes(given.get(name))


def _by_name(node: fx.Node) -> dict[str, Any]:
    return {**dict(zip(_names(node.target), node.args)), **node.kwargs}


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _nodes(item)


_ANY_STRIDES = frozenset({aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default, aten.contiguous.default,
                          aten.scaled_dot_product_attention.default, aten.cross_entropy_loss.default, aten.embedding.default})
_VIEWING = frozenset({aten.view.default, aten.view.dtype, aten.view_as_complex.default, aten.view_as.default, aten.as_strided.default})


# Operators whose fake results may have other strides than their kernels': found by calling all operators of torch's database on transposed inputs, fake and real.
_GUESSED = frozenset({aten.batch_norm.default, aten.native_batch_norm.default, aten._native_batch_norm_legit.default, aten.max_pool1d.default,
                      aten.copysign.Tensor, aten.div.Tensor_mode, aten.floor_divide.default})
# Those of torch 2.11 that may have others on contiguous inputs, too.
_FOURIER = frozenset({aten.fft_fft.default, aten.fft_fft2.default, aten.fft_fftn.default, aten.fft_ifft.default, aten.fft_ifft2.default, aten.fft_ifftn.default,
                      aten.fft_rfft.default, aten.fft_rfft2.default, aten.fft_rfftn.default, aten.fft_ihfft.default, aten.fft_ihfft2.default, aten.fft_ihfftn.default,
                      aten.stft.default, aten.stft.center})


def relaid(new: fx.Node, old: fx.Node) -> fx.Node | None:
    """What could tell the value of `new` from that of `old` by its strides (see `viewed`), if they are others, or `old`'s are not known."""
    view = viewed(old)
    return None if view is None or _same_strides(meta.tensor(new), meta.tensor(old)) and not _guessed(old) else view


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fake tensors of one shape have equal strides by structure; those of size-1 dimensions do not matter."""
    return all(meta.same_size(x, y) or meta.same_size(size, 1) for x, y, size in zip(a.stride(), b.stride(), a.shape))


def _guessed(node: fx.Node) -> bool:
    """Whether a value may have other strides than its fake one: its layout comes from an operator of `_FOURIER`, or of `_GUESSED` with an
    input that is not contiguous."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if called(node, *_ANY_STRIDES):
            continue
        if called(node, *_FOURIER):
            return True
        given = (value for source in node.all_input_nodes if (value := meta.tensor(source)) is not None)
        if called(node, *_GUESSED) and not all(_same_strides(value, value.new_empty(value.shape)) for value in given):
            return True
        more = [source for source in node.all_input_nodes if source not in seen]
        seen.update(more)
        waiting.extend(more)
    return False


def viewed(node: fx.Node) -> fx.Node | None:
    """A node that may work only for the strides that `node`'s value has now, or give other numbers for others: a view of it, or of what
    inherits its layout; or a draw of random numbers for such, which are drawn in the order of memory."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if called(user, *_VIEWING) or isinstance(user.target, OpOverload) and random(user):
                return user
            if user not in seen and not called(user, *_ANY_STRIDES):
                seen.add(user)
                waiting.append(user)
    return None
