"""Wrong rewrites planted as edits of captured graphs: slips that a pass could make anywhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from fxopt.ir.edit import Edit
from mutants.mutant import Change, Mutant, argument, aten, calls, detached, dropped, instead, retargeted, swapped, through, times

DECODER, GPT, ENCODER, MIXED = "decoder", "decoder with layer norm", "encoder", "mixed"


def twice(edit: Edit, node: fx.Node) -> fx.Node:
    """The value is counted twice."""
    return edit.call(aten.add.Tensor, (node, node), like=node, before=node.next)


def one_way(place: int) -> Change:
    """Of a residual sum, the gradient of one term is lost."""
    return detached(place)


def stale(edit: Edit, node: fx.Node) -> None:
    """A buffer is read as it was before it was written: a write in place becomes one into a copy."""
    held = node.args[0]
    copied = edit.call(aten.clone.default, (held,), like=node, before=node)
    args = (copied, *node.args[1:])
    edit.set_args(node, args)


def moved_draw(edit: Edit, node: fx.Node) -> None:
    """A second dropout takes the numbers of the first: both masks are one."""
    first = next(each for each in edit.nodes if each.target is aten.dropout.default)
    ones = edit.call(aten.ones_like.default, (node.args[0],), like=node, before=node)
    mask = edit.call(aten.dropout.default, (ones, first.args[1], True), like=node, before=node)
    edit.replace(node, edit.call(aten.mul.Tensor, (node.args[0], mask), like=node, before=node))


def dropout_forward_only(edit: Edit, node: fx.Node) -> fx.Node:
    """The mask acts on the value and not on the gradient."""
    gap = edit.call(aten.sub.Tensor, (node, node.args[0]), like=node, before=node.next)
    held = edit.call(aten.detach.default, (gap,), like=node, before=gap.next)
    return edit.call(aten.add.Tensor, (node.args[0], held), like=node, before=held.next)


def rounded(edit: Edit, node: fx.Node) -> fx.Node:
    """The value is rounded to bf16 on its way."""
    low = edit.call(aten.to.dtype, (node, torch.bfloat16), like=node, before=node.next)
    return edit.call(aten.to.dtype, (low, torch.float32), like=node, before=low.next)


def first_row(edit: Edit, node: fx.Node) -> fx.Node:
    """The first sample stands for all."""
    one = edit.call(aten.slice.Tensor, (node, 0, 0, 1), like=node, before=node.next)
    zero = edit.call(aten.zeros_like.default, (node,), like=node, before=one.next)
    return edit.call(aten.add.Tensor, (zero, one), like=node, before=zero.next)


def read_of(name: str) -> Any:
    """For `argument`: another parameter of the same shape."""

    def value(edit: Edit, node: fx.Node, was: Any) -> fx.Node:
        return next(each for each in edit.nodes if each.op == "get_attr" and str(each.target).endswith(name))

    return value


def through_other(target: Any) -> Change:
    """The wrong branch where two values are equal: gradient to the first alone."""

    def make(edit: Edit, node: fx.Node) -> fx.Node:
        larger = edit.call(aten.gt.Tensor if target == "gt" else aten.ge.Tensor, node.args[:2], like=node, before=node)
        return edit.call(aten.where.self, (larger, *node.args[:2]), like=node, before=node)

    return instead(make)


_TABLE: list[tuple[str, str, int, Change, str]] = [
    # scales and constants
    (DECODER, "mean", 0, times(1.0001), "a norm's mean square is off by 1e-4"),
    (DECODER, "mean", 1, retargeted(aten.sum.dim_IntList), "a norm's mean became a sum"),
    (DECODER, "rsqrt", 0, retargeted(aten.reciprocal.default), "a norm's root is lost"),
    (DECODER, "add", 3, argument(1, 1.01e-6), "a norm's epsilon is off by a hundredth"),
    (DECODER, "add", 3, dropped, "a norm's epsilon is dropped"),
    (GPT, "layer_norm", 0, argument("eps", 1.1e-5), "a layer norm's epsilon is off by a tenth"),
    (GPT, "layer_norm", 1, argument("eps", 0.0), "a layer norm's epsilon is dropped"),
    (GPT, "layer_norm", 0, argument("bias", None), "a layer norm's bias is dropped"),
    (GPT, "layer_norm", 1, argument("weight", read_of("ln_1.weight")), "a layer norm takes another's weight"),
    (GPT, "mul", 0, times(2.0), "an activation's half is lost"),
    (GPT, "pow", 0, argument(1, 2.0), "an activation's cube became a square"),
    (DECODER, "scaled_dot_product_attention", 0, argument("scale", 1.0), "the attention's scale is dropped"),
    (DECODER, "scaled_dot_product_attention", 0, argument("scale", 0.3536), "the attention's scale is rounded to four digits"),
    (MIXED, "div", 0, argument(1, 8.0), "a root in a scale is forgotten"),
    # operands, dimensions, layouts
    (DECODER, "scaled_dot_product_attention", 1, swapped(0, 1), "queries and keys change places"),
    (DECODER, "scaled_dot_product_attention", 0, swapped(1, 2), "keys and values change places"),
    (DECODER, "neg", 0, dropped, "a rotation's sign is lost"),
    (DECODER, "cat", 1, argument(0, lambda edit, node, was: was[::-1]), "a rotation's halves change places"),
    (DECODER, "cos", 0, retargeted(aten.sin.default), "a rotation's cosine became a sine"),
    (DECODER, "linear", 0, argument(1, read_of("o_proj.weight")), "a linear takes another's weight"),
    (DECODER, "linear", 3, argument(1, through(aten.t.default)), "a square weight is transposed"),
    (GPT, "addmm", 1, argument(2, through(aten.t.default)), "a square weight is transposed, in an addmm"),
    (MIXED, "softmax", 0, argument(1, -2), "a softmax is over the wrong dimension"),
    (MIXED, "cumsum", 0, argument(1, 0), "a running sum is over the samples"),
    (MIXED, "sub", 0, swapped(), "a difference has its operands the other way round"),
    (MIXED, "flip", 0, argument(1, [2]), "a flip is along the wrong dimension"),
    (MIXED, "transpose", 0, calls(aten.flip.default, [2]), "positions come in reverse"),
    (MIXED, "mul", 0, instead(first_row), "the first sample stands for all"),
    (MIXED, "conv1d", 0, argument("bias", None), "a convolution's bias is dropped"),
    (MIXED, "conv1d", 0, calls(aten.roll.default, [1], [2]), "a convolution's positions are shifted by one"),
    # masks, labels, shifts
    (DECODER, "scaled_dot_product_attention", 0, argument("attn_mask", None), "a mask is dropped"),
    (DECODER, "le", 0, retargeted(aten.lt.Tensor), "a causal mask is off by one"),
    (DECODER, "le", 0, retargeted(aten.ge.Tensor), "a causal mask looks ahead"),
    (DECODER, "pad", 0, argument(1, [1, 0]), "labels are padded at the wrong end"),
    (DECODER, "pad", 0, argument(3, 0.0), "the label behind the last is a class"),
    (DECODER, "cross_entropy_loss", 0, argument("ignore_index", 0), "class 0 is ignored"),
    (DECODER, "cross_entropy_loss", 0, argument("label_smoothing", 1e-4), "labels are smoothed"),
    (DECODER, "cross_entropy_loss", 0, argument("reduction", 2), "a loss's mean became a sum"),
    (ENCODER, "cross_entropy_loss", 0, times(0.9999), "a loss is off by 1e-4"),
    (MIXED, "masked_fill", 0, dropped, "a mask is not applied"),
    (MIXED, "masked_fill", 0, argument(2, 1e-3), "masked values are not zero"),
    (MIXED, "eq", 0, retargeted(aten.ne.Scalar), "a mask is inverted"),
    # gradients
    (DECODER, "linear", 4, detached(1), "a weight's gradient is None"),
    (DECODER, "linear", 5, detached(0), "an input's gradient is lost"),
    (GPT, "layer_norm", 0, detached("bias"), "a bias's gradient is None"),
    (DECODER, "silu", 0, instead(lambda edit, node: edit.call(aten.detach.default, (node,), like=node, before=node.next)), "a gate takes no gradient"),
    (ENCODER, "add", 5, one_way(1), "of a residual sum, one gradient is lost"),
    (DECODER, "embedding", 0, detached(0), "the embedding takes no gradient"),
    (MIXED, "detach", 1, dropped, "a detach is missing"),
    (MIXED, "maximum", 0, through_other("gt"), "ties of a maximum give their gradient to one"),
    (MIXED, "amax", 0, detached(0), "a maximum takes no gradient"),
    (MIXED, "relu", 0, instead(lambda edit, node: edit.call(aten.clamp_min.default, (node.args[0], 1e-6), like=node, before=node)), "a relu starts a little late"),
    (MIXED, "relu", 0, retargeted(aten.leaky_relu.default), "a relu leaks"),
    (MIXED, "where", 0, argument(2, through(aten.mul.Tensor, 1.0001)), "a branch that is seldom taken is off by 1e-4"),
    (MIXED, "clamp", 0, argument(2, 3.9), "a clamp is too tight"),
    (MIXED, "clamp", 0, dropped, "a clamp is dropped"),
    (MIXED, "mse_loss", 0, detached(0), "a loss's gradient is lost"),
    (DECODER, "add", 6, instead(twice), "a residual is counted twice"),
    (GPT, "add", 1, instead(twice), "a residual is counted twice"),
    # random numbers, buffers, modes
    (ENCODER, "dropout", 0, argument(1, 0.11), "a dropout's probability is off by a hundredth"),
    (ENCODER, "dropout", 1, dropped, "a dropout is left out"),
    (MIXED, "dropout", 1, moved_draw, "a dropout's numbers come from another draw"),
    (MIXED, "dropout", 0, instead(dropout_forward_only), "a dropout's gradient has no mask"),
    (GPT, "dropout", 0, argument(2, False), "a dropout is in evaluation mode"),
    (MIXED, "batch_norm", 0, argument(5, False), "a batch norm is in evaluation mode"),
    (MIXED, "batch_norm", 0, argument(6, 0.2), "a batch norm's momentum is another"),
    (MIXED, "batch_norm", 0, argument(7, 1.1e-5), "a batch norm's epsilon is off by a tenth"),
    (MIXED, "mul_", 0, stale, "a buffer's decay goes into a copy"),
    (MIXED, "add_", 0, argument(1, 2), "a counter counts twice"),
    (MIXED, "add_", 1, argument("alpha", 0.2), "a buffer's average has another weight"),
    # precision
    (DECODER, "mul", 3, instead(rounded), "a value is rounded to bf16"),
    (MIXED, "logsumexp", 0, instead(rounded), "a logarithm is rounded to bf16"),
]

MUTANTS = [Mutant(program, "", "", at, nth, change, label, "graph") for program, at, nth, change, label in _TABLE]
