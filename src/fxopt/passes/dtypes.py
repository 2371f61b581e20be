"""What a dtype does to each operator: which may compute in 16 bits, which of their operands follow, which values may be narrowed.

Four kinds of operators, by what they compute:

* PRODUCT: matrix products, convolutions, attention. They are what a narrow dtype is for (their sums are kept in fp32 by every
  kernel), so they are always narrow.
* FREE: pointwise arithmetic, gates, selections, copies and views. One rounding more or less of what a product made and another
  one reads; they take the dtype that needs fewer casts.
* STATISTIC: norms. The operator keeps its sums in fp32 whatever it reads. Free where what it reads has been rounded already (behind a
  convolution); where it reads a wide value (a residual stream), it stays wide.
* everything else is WIDE and keeps the program's dtype: exponentials, powers, sums, softmax, losses, embeddings (they follow
  their table), and every operator that is not listed here.

This is the division of autocast (Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740, section 3.3), but for FREE: autocast lets
type promotion decide.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.errors import FxoptError, PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.index import called
from fxopt.kernels import catalog
from fxopt.kernels.formats import named
from fxopt.kernels.lora_linear.grouping import first_parts
from fxopt.torch_private import OpOverload, pytree

aten = torch.ops.aten
NARROW = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *NARROW)
PRODUCT, FREE, STATISTIC, WIDE = "product", "free", "statistic", "wide"


@dataclass(frozen=True)
class Rule:
    """How an operator takes a dtype.

    Attributes:
        kind: see the module.
        own: names of float arguments that keep the dtype they have (running averages, scales of stored weights, tables).
        result: whether the results are in the operands' dtype; losses are fp32 whatever they read.
    """

    kind: str
    own: frozenset[str] = frozenset()
    result: bool = True


def _rules() -> dict[Any, Rule]:
    found: dict[Any, Rule] = {operator.getitem: Rule(FREE)}

    def add(kind: str, *names: str, own: tuple[str, ...] = (), result: bool = True) -> None:
        for name in names:
            packet, _, overload = name.partition(".")
            if hasattr(aten, packet):
                found[getattr(getattr(aten, packet), overload or "default")] = Rule(kind, frozenset(own), result)

    add(PRODUCT, "linear", "mm", "bmm", "matmul", "addmm", "addbmm", "baddbmm", "addmv", "mv", "dot", "einsum", "bilinear", "convolution",
        "conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding", "conv_transpose1d", "conv_transpose2d.input",
        "conv_transpose3d.input", "scaled_dot_product_attention", "_grouped_mm")
    add(FREE, "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar", "neg", "rsub.Scalar",
        "abs", "relu", "relu6", "silu", "gelu", "leaky_relu", "tanh", "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "elu", "mish", "dropout",
        "native_dropout", "where.self", "where.ScalarOther", "where.ScalarSelf", "masked_fill.Scalar", "masked_fill.Tensor", "maximum", "minimum",
        "clamp", "clamp_min", "clamp_max", "lerp.Scalar", "lerp.Tensor", "max_pool1d", "max_pool2d", "max_pool3d")
    add(FREE, "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "transpose.int", "permute", "t", "mT", "slice.Tensor", "select.int",
        "narrow", "expand", "expand_as", "squeeze", "squeeze.dim", "squeeze.dims", "unsqueeze", "flatten.using_ints", "unflatten.int", "split.Tensor",
        "split.sizes", "split_with_sizes", "chunk", "unbind.int", "movedim.int", "movedim.intlist", "swapaxes", "detach", "alias", "contiguous",
        "clone", "cat", "stack", "repeat", "repeat_interleave.self_int", "index_select", "index.Tensor", "gather", "flip", "roll", "pad",
        "constant_pad_nd", "tril", "triu", "numpy_T")
    add(STATISTIC, "layer_norm", "rms_norm", "group_norm", "native_layer_norm", "native_group_norm")
    add(STATISTIC, "batch_norm", "native_batch_norm", "_native_batch_norm_legit_functional", "instance_norm",
        own=("weight", "bias", "running_mean", "running_var"))
    fused = (
        (catalog.swiglu, Rule(FREE)), (catalog.geglu, Rule(FREE)), (catalog.rope, Rule(FREE, frozenset({"cos", "sin"}))),
        (catalog.packed_attention, Rule(PRODUCT)), (catalog.lora_linear, Rule(PRODUCT)), (catalog.quantized_linear, Rule(PRODUCT, frozenset({"base"}))),
        (catalog.linear_cross_entropy, Rule(PRODUCT, result=False)), (catalog.cross_entropy, Rule(FREE, result=False)),
        (catalog.rms_norm, Rule(STATISTIC)), (catalog.add_rms_norm, Rule(STATISTIC)), (catalog.layer_norm, Rule(STATISTIC, frozenset({"weight", "bias"}))),
        (catalog.add_layer_norm, Rule(STATISTIC, frozenset({"weight", "bias"}))),
    )
    return found | {op.overload: rule for op, rule in fused}


RULES: Mapping[Any, Rule] = _rules()
_SUMS = (aten.add.Tensor, catalog.add_rms_norm.overload, catalog.add_layer_norm.overload)
# Operators that read two dtypes in one kernel: the result is in the wider one.
PROMOTING = (aten.add.Tensor,)
_FILLS = (aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf, aten.full.default, aten.full_like.default, aten.scalar_tensor.default)


def rule(node: fx.Node) -> Rule:
    """The node's rule; WIDE where its operator has none."""
    return RULES.get(node.target, _UNKNOWN) if node.op == "call_function" else _UNKNOWN


_UNKNOWN = Rule(WIDE)


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a node whose value is one tensor of 16 or 32 bits of float, else None."""
    found = meta.tensor(node)
    return found.dtype if found is not None and found.dtype in FLOATS else None


def operands(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """(operand, whether it follows the node's dtype) of each float tensor that the node reads; repeated as in the arguments."""
    for operand, follows in _marked(node):
        if dtype_of(operand) is not None:
            yield operand, follows


def _marked(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    own = rule(node).own
    if node.target is catalog.lora_linear.overload:
        yield from _adapted(node)
        return
    if not isinstance(node.target, OpOverload):
        yield from ((each, True) for each in node.all_input_nodes)
        return
    result = meta.tensor(node)
    for i, argument in enumerate(node.target._schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        for each in pytree.tree_leaves(given):
            if isinstance(each, fx.Node):
                val = meta.tensor(each)
                # a tensor without dimensions does not change the dtype of a result that has some
                scalar = rule(node).kind is FREE and val is not None and val.dim() == 0 and result is not None and result.dim() > 0
                yield each, argument.name not in own and not scalar


def _adapted(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """The operands of an adapted linear: parts of quantized weights keep their dtypes."""
    x, bases, formats, _, biases, lora_a, lora_b = node.args[:7]
    yield x, True
    for place, format in zip(first_parts(formats), formats):
        for base in bases[place : place + len(named(format).parts)]:
            yield base, format == "dense"
    for each in (*biases, *lora_a, *lora_b):
        yield each, True


def with_operands(node: fx.Node, find: Callable[[fx.Node, bool], fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments with `find(operand, follows)` for each float operand."""
    found = {operand: find(operand, follows) for operand, follows in operands(node)}
    return fx.node.map_arg((node.args, node.kwargs), lambda each: found.get(each, each))


# -- which values may be narrowed ------------------------------------------------------------------------------------------


def learned(edit: Edit) -> set[fx.Node]:
    """Values that depend on a parameter or a float input. The others are made of positions, masks and constants: 16 bits hold no
    position above 256 (bf16) or 2,048 (fp16) exactly, so they are computed as they are."""
    found: set[fx.Node] = set()
    for node in edit.nodes:
        slot = edit.slots.get(str(node.target)) if node.op == "get_attr" else None
        source = slot is not None and (slot.kind == "parameter" or slot.made is not None) or node.op == "placeholder" and dtype_of(node) is not None
        floats = any(t.is_floating_point() or t.is_complex() for t in meta.tensors(node))
        if source or floats and any(each in found for each in node.all_input_nodes):  # a size, or an index, carries nothing on
            found.add(node)
    return found


def naturally(edit: Edit, to: torch.dtype, products: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Values that are in the narrow dtype if type promotion decides, as under autocast: made of nothing but results of products, and of
    parameters.

    Args:
        products: whether a node is a product that becomes narrow.
    """
    found: set[fx.Node] = set()
    carried: set[fx.Node] = set()  # depends on what the caller gives, not on the state alone
    for node in edit.nodes:
        if node.op == "placeholder" or any(each in carried for each in node.all_input_nodes):
            carried.add(node)
        if node.op != "call_function" or not rule(node).result:
            continue
        if dtype_of(node) == to or products(node):
            found.add(node)
        elif rule(node).kind in (FREE, STATISTIC):
            read = [each for each, follows in _marked(node) if follows and each in carried and any(t.is_floating_point() for t in meta.tensors(each))]
            if read and all(each in found for each in read):
                found.add(node)
    return found


def residual_sums(edit: Edit) -> dict[fx.Node, fx.Node]:
    """Sums of a value and what a product made of that value: a stream that layers add to. Each addition in 16 bits would round all of
    what was added before. With each, what is added."""
    before: dict[fx.Node, int] = {}  # bit sets: what a node depends on, and what through a product
    through: dict[fx.Node, int] = {}
    bit: dict[fx.Node, int] = {}
    found: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(edit.nodes):
        bit[node] = before[node] = 1 << i
        through[node] = 0
        for source in node.all_input_nodes:
            before[node] |= before[source]
            through[node] |= before[source] if rule(node).kind is PRODUCT else through[source]
        if called(node, *_SUMS):
            a, b = node.args[:2]
            for x, y in ((a, b), (b, a)) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else ():
                if any(bit[image] & through[y] for image in _images(x)):
                    found[node] = y
    return found


def _images(node: fx.Node) -> Iterator[fx.Node]:
    """The node and what it is a view, an item or a pointwise image of."""
    yield node
    while rule(node).kind is FREE and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        yield node


def huge(edit: Edit, to: torch.dtype, learned_: Collection[fx.Node], inputs: Collection[str] = ()) -> set[fx.Node]:
    """Values that hold a finite constant beyond `to`'s range (the -3e38 of additive masks), by the numbers in the program. They are cast
    with saturation: added to scores, the largest number of `to` hides as well.

    Args:
        learned_: see `learned`. inputs: names of inputs that are known to hold such numbers.
    """
    largest = torch.finfo(to).max
    found: set[fx.Node] = set()
    for node in edit.nodes:
        fills = called(node, *_FILLS)
        numbers = pytree.tree_leaves((node.args, node.kwargs)) if fills or node.op == "call_function" and node not in learned_ else []
        beyond = any(isinstance(n, float) and largest < abs(n) < math.inf for n in numbers)
        passes_on = node.op == "call_function" and (rule(node).kind is FREE or fills)
        if beyond or node.op == "placeholder" and node.name in inputs or passes_on and any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


# -- the check of every edge -----------------------------------------------------------------------------------------------

Dtypes = Mapping[fx.Node, tuple[torch.dtype | None, ...]]


def read_dtypes(nodes: list[fx.Node]) -> dict[fx.Node, tuple[torch.dtype | None, ...]]:
    """For each node the dtypes of the float operands, in order."""
    return {node: tuple(dtype_of(each) for each, _ in operands(node)) for node in nodes}


def check_edges(edit: Edit, before: Dtypes) -> int:
    """Every node reads dtypes that its operator takes, and makes the dtype that is recorded. Returns how many edges were seen.

    A node reads either what it read before, or one dtype in all operands that follow it; a sum may read two and make the wider one. Then
    its operator runs on fake values.

    Args:
        before: `read_dtypes` of the nodes before they were changed; nodes that are not in it are new casts.

    Raises:
        PassError: naming the node and its place.
    """
    count = 0
    for node in edit.nodes:
        if node.op != "call_function":
            continue
        where = f"{node.name}: {meta.provenance(node)}"
        now = [(dtype_of(each), follows) for each, follows in operands(node)]
        count += len(now)
        if node in before and tuple(dtype for dtype, _ in now) != before[node]:
            follow = {dtype for dtype, follows in now if follows}
            kept = [(dtype, was) for (dtype, follows), was in zip(now, before[node]) if not follows]
            if len(follow) > 1 and not called(node, *PROMOTING) or any(dtype != was for dtype, was in kept) or len(now) != len(before[node]):
                read = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in {dtype for dtype, _ in now}))
                raise PassError(f"{node.target} reads {read}", where=where,
                                do="this is a bug of the pass that put the casts in: report it with the program's text")
        made, recorded = fake_value(edit, node), meta.value(node)
        a, b = ([t.dtype for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)] for value in (made, recorded))
        if a != b:
            raise PassError(f"{node.target} makes {a}, and {b} is recorded", where=where, do="this is a bug of the pass: report it with the program's text")
    return count


def fake_value(edit: Edit, node: fx.Node) -> Any:
    """The fake value of a node for the operands that it has now; a PassError with its place where the operator refuses them."""
    if not isinstance(node.target, OpOverload) and node.target is not operator.getitem:
        return meta.value(node)  # a region of its own: its operands are what they were
    try:
        return edit.fake(node.target, node.args, node.kwargs)
    except (RuntimeError, TypeError, FxoptError) as error:
        raise _refused(node, error) from error


def retyped(edit: Edit, node: fx.Node) -> None:
    """Make a node's fake value anew; a PassError with its place where the operator refuses what it reads."""
    try:
        edit.retype(node, node.args, node.kwargs)
    except (RuntimeError, TypeError, FxoptError) as error:
        raise _refused(node, error) from error


def _refused(node: fx.Node, error: Exception) -> PassError:
    read = ", ".join(meta.describe(meta.value(each)) for each in node.all_input_nodes)
    return PassError(f"{node.target} does not take {read}: {str(error).splitlines()[0]}", where=f"{node.name}: {meta.provenance(node)}",
                     do="this is a bug of the pass: report it with the program's text")
