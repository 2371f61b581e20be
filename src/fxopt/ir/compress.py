"""Saved values in 8 bits: what a forward keeps for its backward is kept as int8 codes, with a scale for each group of the last dimension.

x' = code * scale with code = round(x / scale), scale = max|group| / 127: |x - x'| <= max|group| / 254, the rounding of `scale` and
of x' in their dtypes (and the smallest normal number of fp32) aside. Groups keep one large element from coarsening a whole row
(Dettmers et al., 2022, https://arxiv.org/abs/2110.02861, block-wise); activations in a few bits: Liu et al., 2022,
https://arxiv.org/abs/2206.11357. The forward is not touched: outputs and losses stay exact, gradients alone see x'.

Only values whose error stays in proportion are compressed: they are followed through what the backward computes again up to the first
operations that read a gradient, and each on the way has to be a product, a sum, a norm, a smooth activation, or the
gradient of one. What exponentials are computed from (queries, keys, logits, their normalisers), what decides (signs, comparisons,
indices), and everything unknown is kept as it is.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.index import called, full_arguments, static
from fxopt.ir.joint import Joint
from fxopt.ir.partition import Classes, MinCut, Split
from fxopt.ir.region_graph import decode, delay, encode
from fxopt.ir.regions import is_view
from fxopt.torch_private import OpOverload

aten = torch.ops.aten
LARGEST_GROUP = 64  # elements that share a scale: 1.0625 bytes each
SMALLEST_GROUP = 32  # a row of fewer is not worth it

_ANY = None  # every argument
# Arguments in which an error stays in proportion, by operator: linear in them, or smooth with bounded derivatives.
_BOUNDED: Mapping[str, frozenset[str] | None] = {
    **dict.fromkeys(("aten::add", "aten::sub", "aten::rsub", "aten::mul", "aten::neg", "aten::sum", "aten::mean", "aten::mm", "aten::bmm", "aten::addmm",
                     "aten::baddbmm", "aten::linear", "aten::matmul", "aten::clone", "aten::cat", "aten::stack", "aten::reshape", "aten::constant_pad_nd",
                     "aten::roll", "aten::flip", "aten::silu", "aten::gelu", "aten::sigmoid", "aten::tanh", "fxopt::swiglu", "fxopt::geglu"), _ANY),
    "aten::div": frozenset({"self"}), "aten::convolution": frozenset({"input"}), "aten::convolution_backward": frozenset({"input"}),
    "aten::native_layer_norm": frozenset({"input"}), "aten::native_layer_norm_backward": frozenset({"input"}),
    "aten::native_group_norm": frozenset({"input"}), "aten::native_group_norm_backward": frozenset({"input"}),
    "aten::silu_backward": frozenset({"self"}), "aten::gelu_backward": frozenset({"self"}), "aten::tanh_backward": frozenset({"output"}),
    "aten::sigmoid_backward": frozenset({"output"}),
    **dict.fromkeys(("fxopt::rms_norm", "fxopt::layer_norm", "fxopt::rms_norm_backward", "fxopt::layer_norm_backward", "fxopt::quantized_linear"),
                    frozenset({"x"})),
    **dict.fromkeys(("fxopt::add_rms_norm", "fxopt::add_layer_norm"), frozenset({"x", "residual"})),
    **dict.fromkeys(("fxopt::add_rms_norm_backward", "fxopt::add_layer_norm_backward"), frozenset({"sum"})),
    "fxopt::lora_linear": frozenset({"x"}), "fxopt::lora_linear_backward": frozenset({"x", "low"}), "fxopt::rope": frozenset({"q", "k"}),
    "fxopt::swiglu_backward": frozenset({"gate", "up"}), "fxopt::geglu_backward": frozenset({"gate", "up"}),
    # an attention's gradient is linear in its values and its result; its probabilities come from queries, keys and normalisers
    **dict.fromkeys(("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "aten::_scaled_dot_product_flash_attention_backward",
                     "aten::_scaled_dot_product_efficient_attention_backward", "aten::_scaled_dot_product_cudnn_attention_backward",
                     "fxopt::packed_attention_backward", "fxopt::live_attention_backward"), frozenset({"value", "out"})),
}
_POWERS = (2, 3)  # x^n is smooth and its derivatives are products


@dataclass(frozen=True)
class Compressed:
    """The policy `base`, with the saved values in 8 bits that may be.

    Attributes:
        inputs: also the region's inputs. It saves memory only if nobody else keeps them.
    """

    base: MinCut
    inputs: bool = True

    @property
    def allowed(self) -> frozenset[str]:
        """Of the base."""
        return self.base.allowed

    def __call__(self, joint: Joint, classes: Classes) -> list[fx.Node]:
        """The values to save: those of the base."""
        return self.base(joint, classes)

    def apply(self, plan: Split, operands: Mapping[Any, frozenset[int]]) -> Split:
        """The plan with codes and scales among its saved values; the plan itself where nothing can be compressed."""
        del operands
        return compress(plan, self.inputs)


def compress(plan: Split, inputs: bool = True) -> Split:
    """Keep in 8 bits what may be. `inputs`: also what the region is given."""
    if plan.backward is None:
        return plan
    forward, backward = plan.forward.graph, plan.backward.graph
    placeholders = [node for node in backward.nodes if node.op == "placeholder"]
    sound = bounded(backward, placeholders[-len(plan.tangents):])
    given = [node for node in forward.nodes if node.op == "placeholder"]
    kept = forward.output_node().args[0]
    start = plan.n_outputs + len(plan.mutated)
    own = _from_inputs(forward, given[: plan.n_inputs])
    written = {given[index] for index in plan.mutated}
    chosen: dict[fx.Node, int] = {}
    for reader, value in zip(placeholders, kept[start:]):
        wanted = isinstance(value, fx.Node) and value in own and value not in written and value not in chosen and (inputs or value.op != "placeholder")
        if wanted and reader in sound and (group := group_of(value)) is not None:
            chosen[value] = group
    if not chosen:
        return plan
    encode(forward, chosen, start)
    decode(backward, {reader: chosen[value] for reader, value in zip(placeholders, kept[start:]) if isinstance(value, fx.Node) and value in chosen})
    late = _after(backward, [node for node in backward.nodes if node.op == "placeholder"][-len(plan.tangents):])
    delay(backward, {node.name for node in backward.nodes if node.op == "call_function" and node not in late})
    for module in (plan.forward, plan.backward):
        module.graph.lint()
        module.recompile()
    return dataclasses.replace(plan, compressed=tuple(value.name for value in chosen))


def group_of(node: fx.Node) -> int | None:
    """How many elements of the last dimension share a scale: its largest divisor up to LARGEST_GROUP, or all of it; None if the value
    stays as it is: no floating point numbers, one row alone, or short rows."""
    val = meta.tensor(node)
    if val is None or not val.is_floating_point() or val.dtype.itemsize > 4 or val.dim() < 2:
        return None
    width = static(val.shape[-1])
    if width is None or width < SMALLEST_GROUP or all(static(size) == 1 for size in val.shape[:-1]):
        return None
    return next((group for group in range(min(LARGEST_GROUP, width), SMALLEST_GROUP - 1, -1) if width % group == 0), width)


def bounded(backward: fx.Graph, tangents: list[fx.Node]) -> set[fx.Node]:
    """The values of a backward graph before any gradient that may carry a small error: all that is made of them keeps it in proportion."""
    late = _after(backward, tangents)
    found: set[fx.Node] = set()
    for node in reversed(list(backward.nodes)):
        if node in late or node.op == "output":
            continue
        readers = [user for user in node.users if not isinstance(meta.value(user), torch.SymInt)]
        if all(user.op == "call_function" and _proportional(user, node) and (user in late or user in found) for user in readers):
            found.add(node)
    return found


def _after(graph: fx.Graph, sources: list[fx.Node]) -> set[fx.Node]:
    """The sources and everything computed from them."""
    found = set(sources)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _from_inputs(forward: fx.Graph, inputs: list[fx.Node]) -> set[fx.Node]:
    """What depends on an input of the region: the rest is state, or made of state alone, which is there anyway."""
    return _after(forward, inputs)


def _proportional(user: fx.Node, node: fx.Node) -> bool:
    if called(user, operator.getitem) or is_view(user):
        return True
    target = user.target
    if not isinstance(target, OpOverload):
        return False
    name = target._schema.name
    if name == "aten::_to_copy":
        return meta.tensor(user).is_floating_point()
    if name == "aten::pow":
        return target is aten.pow.Tensor_Scalar and user.args[1] in _POWERS
    if name == "aten::rsqrt":
        return _of_a_mean(user.args[0])
    if name not in _BOUNDED:
        return False
    allowed = _BOUNDED[name]
    return allowed is _ANY or set(_names(user, node)) <= allowed


def _of_a_mean(node: Any) -> bool:
    """Whether a value is a mean (of squares) over a dimension, and perhaps a small number: what a norm divides by."""
    while called(node, aten.add.Tensor, aten.add.Scalar) and not isinstance(node.args[1], fx.Node) or isinstance(node, fx.Node) and is_view(node):
        node = node.args[0]
    return called(node, aten.mean.dim)


def _names(user: fx.Node, node: fx.Node) -> Iterator[str]:
    """The arguments of a call in which a value occurs."""
    for name, value in full_arguments(user).items():
        if value is node or isinstance(value, (list, tuple)) and any(part is node for part in value):
            yield name
