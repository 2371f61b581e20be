"""What of a program is the same in every epoch: values that depend on the inputs and on frozen state alone, sample by sample."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import effectful
from fxopt.ir.index import Flow
from fxopt.ir.program import Program
from fxopt.ir.sample_order import ordered
from fxopt.ir.sample_products import RULES
from fxopt.ir.samples import Free, Mixed, Rows, Samples, State, operator_name


def frozen(program: Program) -> set[fx.Node]:
    """The nodes that no trainable tensor, no random number and no written memory has an influence on."""
    flow = Flow(program.graph, program.slots)
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "output" or flow.roots.get(node, frozenset()) & flow.written:
            continue
        if node.op == "get_attr" and program.trainable(str(node.target)) and program.slots.get(str(node.target)) is not None:
            if any(t.is_floating_point() or t.is_complex() for t in meta.tensors(node)):
                continue
        if node.op == "call_function" and (effectful(node) or not all(source in found for source in node.all_input_nodes)):
            continue
        found.add(node)
    return found


_PRODUCTS = frozenset({"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "convolution", "scaled_dot_product_attention",
                       "quantized_linear", "lora_linear", "packed_attention", "grouped_mm", "_grouped_mm"})


def product(node: fx.Node) -> bool:
    """Whether a node is a product of matrices, a convolution or an attention: what is worth keeping the result of. Anything else is about as
    fast as reading back what it made."""
    return node.op == "call_function" and operator_name(node) in _PRODUCTS


def samples(program: Program) -> Samples:
    """How each value depends on the samples of a batch; the fused operators that frozen layers have are known here too."""
    return Samples(program.graph, program.slots, program.trainable, {**RULES, **_FUSED}, ordered)


def kept_apart(node: fx.Node, states: Samples) -> Rows | str:
    """Where a value holds the samples of a batch, each by itself; or why it does not."""
    state = states[node]
    if isinstance(state, Mixed):
        return f"samples meet in `{state.node.name}` ({meta.provenance(state.node)}): {state.reason}"
    if isinstance(states.batch, int) or states.batch is None:
        return "the number of samples is fixed in the program"
    val = meta.tensor(node)
    if not isinstance(state, Rows) or val is None:
        return "it holds no samples"
    if state.by is not None or state.order is not None or state.index or state.over != 1:
        return "its samples do not lie one after the other"
    return state


def _by_row(*given: str, last: int = 1) -> Any:
    """The rule of a fused operator that computes each place of its first result from the same place of the arguments named; the last dimensions
    are no samples. Other results (statistics) may not be read."""

    def rule(states: Samples, node: fx.Node, arguments: dict[str, Any]) -> State:
        rows = [arguments[name] for name in given if isinstance(arguments.get(name), fx.Node)]
        found = {state for x in rows if isinstance(state := states[x], Rows)}
        others = [x for x in node.all_input_nodes if x not in rows]
        if len({meta.tensor(x).dim() for x in rows}) != 1 or any(not isinstance(states[x], Rows | Free) for x in rows):
            return Mixed(node, "its operands hold samples in several ways")
        if len(found) != 1 or any(not isinstance(states[x], Free) for x in others):
            return Mixed(node, "its operands hold samples in several ways")
        (state,) = found
        if state.dim >= -last or state.by is not None or state.index:
            return Mixed(node, "it computes along the samples")
        if any(isinstance(states[x], Free) and not meta.same_size(meta.tensor(x).shape[state.dim], 1) for x in rows):
            return Mixed(node, "an operand that is the same for every batch lines up with its samples")
        rank = meta.tensor(rows[0]).dim()
        if isinstance(meta.value(node), tuple) and any(isinstance(t := meta.value(user), torch.Tensor) and t.dim() != rank for user in node.users):
            return Mixed(node, "a statistic of it is read")
        return Rows(state.dim, state.over, state.under, data=False)

    return rule


def _norm(states: Samples, node: fx.Node, arguments: dict[str, Any]) -> State:
    if node.target.namespace == "fxopt":
        return _by_row("x")(states, node, arguments)
    return RULES["rms_norm" if "rms" in str(node.target) else "layer_norm"](states, node, arguments)


_FUSED = {"rms_norm": _norm, "layer_norm": _norm, "add_rms_norm": _by_row("x", "residual"), "add_layer_norm": _by_row("x", "residual"),
          "swiglu": _by_row("gate", "up", last=0), "geglu": _by_row("gate", "up", last=0), "rope": _by_row("q", "k", "cos", "sin"),
          "quantized_linear": _by_row("x")}
