"""Sabotaged passes: a real pass with one of its rewrites made wrong; and sabotaged ops: a fused op that computes something else."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from kernels.faults import FAULTS

from fxopt.ir.edit import Edit
from mutants.graphs import DECODER, ENCODER, GPT, MIXED, first_row, read_of, stale, twice
from mutants.mutant import WRONG, Change, Mutant, argument, aten, calls, detached, dropped, faulty, instead, retargeted, swapped, through, times

LORA, STORED = "canonicalize | causal | lora(rank=2)", "canonicalize | causal | lora(rank=2) | quantize(format=int8)"
READY, FUSED = "canonicalize | causal", "canonicalize | causal | fuse"
PADDED = "canonicalize | causal(assume=false) | fuse | loss"


def entry(place: str, value: Any) -> Change:
    """The first entry of a list argument is another: a value, or a function of (edit, node, what it was)."""

    def change(edit: Edit, node: fx.Node, was: Any) -> Any:
        return [value(edit, node, was[0]) if callable(value) else value, *was[1:]]

    return argument(place, change)


def other_state(suffix: str) -> Any:
    """For `entry`: another slot's tensor."""
    return lambda edit, node, was: read_of(suffix)(edit, node, was)


def items_swapped(edit: Edit, node: fx.Node) -> None:
    """The first two results change places."""
    items = sorted((user for user in node.users if "getitem" in user.name), key=lambda user: user.args[1])
    for item, index in zip(items[:2], (items[1].args[1], items[0].args[1])):
        edit.set_args(item, (node, index))


def first_item(change: Change) -> Change:
    """The change is made to the first result."""
    return lambda edit, node: change(edit, min((user for user in node.users if "getitem" in user.name), key=lambda user: user.args[1]))


_PASSES: list[tuple[str, str, str, str, int, Change, str]] = [
    # lora
    (DECODER, READY, "lora(rank=2)", "", 3, entry("scales", 1.0), "the adapter's scale is dropped"),
    (DECODER, READY, "lora(rank=2)", "", 0, entry("scales", 2.0001), "the adapter's scale is off"),
    (DECODER, READY, "lora(rank=2)", "", 5, entry("lora_a", through(aten.detach.default)), "factor A takes no gradient"),
    (DECODER, READY, "lora(rank=2)", "", 9, entry("lora_b", through(aten.detach.default)), "factor B takes no gradient"),
    (DECODER, READY, "lora(rank=2)", "", 4, entry("lora_a", other_state("v_proj.lora_A.default")), "an adapter reads another's factor A"),
    (DECODER, READY, "lora(rank=2)", "", 9, detached("x"), "the input takes no gradient"),
    (DECODER, READY, "lora(rank=2)", "", 7, first_item(times(0.0)), "an adapted layer gives zeros"),
    (DECODER, READY, "lora(rank=2, variant=dora)", "fxopt.dora_norm", 1, argument("scale", 1.0), "DoRA's norm is taken without the scale"),
    (ENCODER, READY, "lora(rank=2)", "", 2, argument("biases", []), "the bias is dropped"),
    (GPT, READY, "lora(rank=2)", "", 1, entry("scales", lambda edit, node, was: 2 * was), "a transposed layer's scale is doubled"),
    # quantize
    (DECODER, LORA, "quantize(format=int8)", "", 0, argument("bases", lambda edit, node, was: [was[0], edit.call(aten.roll.default, (was[1], [1]), like=node, before=node)]), "rows take each other's scales"),
    (DECODER, LORA, "quantize(format=int8)", "", 6, argument("bases", lambda edit, node, was: [edit.call(aten.neg.default, (was[0],), like=node, before=node), was[1]]), "the codes' signs are turned"),
    (DECODER, LORA, "quantize(format=int8)", "", 3, argument("bases", lambda edit, node, was: [was[0], edit.call(aten.mul.Tensor, (was[1], 1.001), like=node, before=node)]), "the stored scales are off by 1e-3"),
    (ENCODER, LORA, "quantize(format=int8)", "", 2, argument("biases", []), "the bias is dropped"),
    # siblings
    (DECODER, STORED, "siblings", "fxopt.lora_linear", 0, lambda edit, node: _items(edit, node, 1, 2), "keys and values change places"),
    (DECODER, STORED, "siblings", "fxopt.lora_linear", 2, items_swapped, "gate and up change places"),
    (DECODER, STORED, "siblings", "fxopt.lora_linear", 0, entry("scales", 1.0), "one sibling's scale is dropped"),
    (DECODER, STORED, "siblings", "fxopt.lora_linear", 4, argument("x", through(aten.mul.Tensor, 1.001)), "the shared input is off by 1e-3"),
    # fuse
    (DECODER, READY, "fuse", "fxopt.rms_norm", 0, argument("eps", 1.1e-6), "a fused norm's epsilon is off by a tenth"),
    (DECODER, READY, "fuse", "fxopt.add_rms_norm", 1, argument("offset", 1e-4), "a fused norm's offset is not zero"),
    (DECODER, READY, "fuse", "fxopt.add_rms_norm", 0, argument("residual", through(aten.detach.default)), "the residual takes no gradient"),
    (DECODER, READY, "fuse", "fxopt.swiglu", 1, swapped(), "a fused gate has its operands the other way round"),
    (DECODER, READY, "fuse", "fxopt.rope", 0, swapped(2, 3), "a fused rotation has cosine and sine the other way round"),
    (DECODER, READY, "fuse", "fxopt.rope", 1, argument("sin", through(aten.neg.default)), "a fused rotation turns the other way"),
    (GPT, READY, "fuse", "fxopt.layer_norm", 0, argument("eps", 1.2e-5), "a fused norm's epsilon is off by a fifth"),
    (ENCODER, READY, "fuse", "fxopt.add_layer_norm", 0, argument("residual", through(aten.mul.Tensor, 1.0001)), "a fused sum is off by 1e-4"),
    # loss
    (DECODER, FUSED, "loss", "fxopt.linear_cross_entropy", 0, argument("ignore_index", 5), "a fused loss ignores another class"),
    (DECODER, FUSED, "loss", "fxopt.linear_cross_entropy", 0, argument("reduction", "sum"), "a fused loss is a sum"),
    (DECODER, FUSED, "loss", "fxopt.linear_cross_entropy", 0, argument("target", through(aten.roll.default, [1])), "a fused loss's labels are shifted by one"),
    (DECODER, FUSED, "loss", "fxopt.linear_cross_entropy", 0, argument("label_smoothing", 1e-5), "a fused loss smooths its labels a little"),
    (DECODER, FUSED, "loss", "fxopt.linear_cross_entropy", 0, argument("weight", through(aten.detach.default)), "a fused loss's head takes no gradient"),
    (ENCODER, FUSED, "loss", "fxopt.linear_cross_entropy", 0, argument("bias", None), "a fused loss drops the head's bias"),
    (GPT, FUSED, "loss", "fxopt.linear_cross_entropy", 0, argument("hidden", through(aten.detach.default)), "a fused loss gives the model no gradient"),
    (GPT, FUSED, "loss", "fxopt.linear_cross_entropy", 0, argument("softcap", 30.0), "a fused loss caps its logits"),
    # causal
    (DECODER, "canonicalize", "causal", "scaled_dot_product_attention", 0, argument("is_causal", False), "the mask is dropped, and the flag not set"),
    (DECODER, "canonicalize", "causal", "scaled_dot_product_attention", 1, argument("scale", 0.35), "the attention's scale is off"),
    (ENCODER, "canonicalize", "causal", "scaled_dot_product_attention", 1, argument("is_causal", True), "an attention to both sides became causal"),
    # rows
    (DECODER, FUSED + " | loss", "compact", "fxopt.linear_cross_entropy", 0, argument("reduction", "sum"), "a loss over the rows that count is a sum"),
    (DECODER, PADDED, "pack", "fxopt.packed_attention", 0, argument("segments", through(aten.zeros_like.default)), "all documents are one segment"),
    (DECODER, PADDED, "pack", "fxopt.packed_attention", 1, argument("causal", False), "a packed attention looks ahead"),
    # precision
    (DECODER, FUSED, "precision(dtype=bf16)", "linear", 1, times(1.02), "a product in 16 bits is off by 2%"),
    (DECODER, FUSED, "precision(dtype=bf16)", "linear", 4, detached(1), "a cast loses a weight's gradient"),
    # canonicalize, dead_code, remat: exact ones
    (MIXED, "", "canonicalize", "batch_norm", 0, argument(5, False), "a buffer is updated no more"),
    (MIXED, "", "canonicalize", "mul", 0, times(1.0 + 2**-20), "a product is off by 1e-6"),
    (MIXED, "", "canonicalize", "add_", 0, stale, "a counter is written into a copy"),
    (MIXED, "canonicalize", "dead_code", "dropout", 1, dropped, "a dropout was taken for dead"),
    (MIXED, "canonicalize", "dead_code", "add_", 0, lambda edit, node: (edit.replace(node, node.args[0]), edit.erase(node)), "a write into a buffer was taken for dead"),  # type: ignore[func-returns-value]
    (DECODER, "canonicalize", "remat", "silu", 1, instead(twice), "a recomputed value is counted twice"),
    (GPT, "canonicalize", "dead_code", "tanh", 0, instead(first_row), "the first sample stands for all"),
    (ENCODER, "canonicalize", "dead_code", "gelu", 0, retargeted(aten.relu.default), "an activation is another"),
    (MIXED, "canonicalize", "denominator", "logsumexp", 0, calls(aten.mul.Tensor, 1.0001), "a pass that only marks changes a value"),
]


def _items(edit: Edit, node: fx.Node, a: int, b: int) -> None:
    items = {user.args[1]: user for user in node.users if "getitem" in user.name}
    edit.set_args(items[a], (node, b))
    edit.set_args(items[b], (node, a))


# Faults of tests/kernels/faults.py that show in these programs. Not planted: those of arguments that the programs leave at the value
# which the fault sets (a norm without an offset, a loss without smoothing, a cap or a z-loss): the op would compute the same. Nor what
# cannot be seen in these programs: rope's "inverse for transpose" (of a rotation they are one), its "input written" (nobody reads the
# input again), the bias of a key projection (it adds one number to all of a query's scores, which softmax takes out).
_OPS: list[tuple[str, str, str, str, int, tuple[str, ...]]] = [
    (DECODER, READY, "fuse", "rms_norm", 0, ("lost gradient", "doubled gradient", "grad_output of the first row", "input written", "rounded to bf16", "constant rstd",
                                             "eps outside the root", "weight ignored", "weight gradient lost")),
    (DECODER, READY, "fuse", "add_rms_norm", 1, ("residual gradient lost", "gradient of the sum lost", "residual not added", "weight gradient lost", "doubled gradient")),
    (DECODER, READY, "fuse", "swiglu", 0, ("lost gradient", "doubled gradient", "operands swapped", "sigmoid for silu", "up gradient lost", "rounded to bf16")),
    (DECODER, READY, "fuse", "rope", 1, ("sin negated", "other layout", "keys not rotated", "lost gradient")),
    (GPT, READY, "fuse", "layer_norm", 0, ("constant mean", "eps ignored", "bias ignored", "weight gradient lost", "bias gradient lost", "lost gradient")),
    (ENCODER, READY, "fuse", "add_layer_norm", 1, ("residual gradient lost", "residual not added", "bias gradient lost", "eps ignored", "rounded to bf16")),
    (DECODER, FUSED, "loss", "linear_cross_entropy", 0, ("ignored rows counted", "mean over all rows", "weight gradient lost", "lost gradient", "doubled gradient")),
    (ENCODER, FUSED, "loss", "linear_cross_entropy", 0, ("bias ignored", "bias gradient lost")),
    (DECODER, LORA, "siblings", "lora_linear", 0, ("scale dropped", "gradient of lora_a lost", "gradient of lora_b lost", "doubled gradient", "rounded to bf16")),
    (DECODER, LORA, "siblings", "lora_linear", 4, ("lost gradient",)),
    (DECODER, STORED, "siblings", "lora_linear", 0, ("scale dropped", "gradient of lora_b lost")),
]

_BY_NAME = {(op, label): fault for op, label, fault in FAULTS}

MUTANTS = [Mutant(program, before, inner, at, nth, change, label, "pass") for program, before, inner, at, nth, change, label in _PASSES]
MUTANTS += [Mutant(program, before, inner, f"fxopt.{op}", nth, faulty(op, _BY_NAME[op, label]), f"{op}: {label}" + (" (stored weights)" if "quantize" in before else ""), "op")
            for program, before, inner, op, nth, labels in _OPS for label in labels]
globals().update({wrong.__name__: wrong for wrong in WRONG})
