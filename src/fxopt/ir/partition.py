"""Split a joint graph into forward and backward, choosing which values are saved in between.

`save_all` saves what eager autograd would. `MinCut` saves as few bytes as possible under two bans: no matrix product,
convolution, attention or other heavy operation is recomputed but those it names, and no random operation is run a second time
(torch's own budgeted partitioner does that, with fresh randomness: pytorch#190758). Everything pointwise may be recomputed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import networkx
import torch
import torch.fx as fx

from fxopt.errors import LowerError
from fxopt.ir import meta
from fxopt.ir.derive import shorten, sources, take
from fxopt.ir.edit import random
from fxopt.ir.joint import Joint
from fxopt.ir.region_graph import delay, extract
from fxopt.ir.regions import is_view
from fxopt.torch_private import HigherOrderOperator, OpOverload

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Split:
    """Forward and backward graphs.

    Attributes:
        forward: takes the primals; returns (outputs..., mutated..., saved...).
        backward: takes (saved..., tangents...); returns one gradient per entry of `wanted`.
        saved: names of the saved values, for reports.
        saved_bytes: their size under the shapes of the capture.
        wanted: indices of the primals that get a gradient.
        tangents: indices of the outputs whose tangents the backward takes.
        mutated: indices of the primals with a new value.
        recomputed: names of the nodes that the backward computes again.
        tiled: names of the nodes of the backward that run for some rows at a time.
        compressed: names of the values of the forward that are saved as codes and scales (ir/compress.py).
        offloaded: positions among the saved values of those that wait in host memory (ir/offload.py).
        n_inputs: how many of the primals are the region's inputs; the rest is its state.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    n_outputs: int
    saved: tuple[str, ...]
    saved_bytes: int
    wanted: tuple[int, ...]
    tangents: tuple[int, ...]
    mutated: tuple[int, ...]
    recomputed: tuple[str, ...] = ()
    tiled: tuple[str, ...] = ()
    compressed: tuple[str, ...] = ()
    offloaded: tuple[int, ...] = ()
    n_inputs: int = 0


Policy = Callable[[Joint, "Classes"], list[fx.Node]]
"""Chooses the values to save. Policies are compared and hashed: regions are split once for each."""


@dataclass(frozen=True, eq=False)
class Classes:
    """The nodes of a joint graph by role: those the outputs need, those that depend on a tangent, and the rest."""

    forward: dict[fx.Node, None]
    backward: dict[fx.Node, None]
    saved_candidates: list[fx.Node]
    order: dict[fx.Node, int]


def classify(joint: Joint) -> Classes:
    """Which nodes the forward outputs need, and which depend on tangents."""
    order = {node: i for i, node in enumerate(joint.graph.nodes)}
    forward: dict[fx.Node, None] = {}
    stack = [n for n in (*joint.outputs, *(v for _, v in joint.mutated)) if isinstance(n, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in forward:
            forward[node] = None
            stack.extend(node.all_input_nodes)
    tangents = {node for _, node in joint.tangents}
    backward: dict[fx.Node, None] = {}
    for node in joint.graph.nodes:
        if node in tangents or any(i in backward for i in node.all_input_nodes):
            if node.op != "output":
                backward[node] = None
    clash = [n for n in forward if n in backward]
    if clash:
        raise LowerError(f"an output of the region depends on a tangent ({clash[0].name})")
    candidates = [n for n in joint.graph.nodes if n not in backward and n.op not in ("output", "get_attr")
                  and any(u in backward for u in n.users)]
    returned = {g for g in joint.gradients if g is not None and g not in backward}
    candidates += [g for g in returned if g not in candidates and g.op != "get_attr"]
    return Classes(forward, backward, candidates, order)


def split(joint: Joint, policy: Policy) -> Split:
    """Partition a joint graph, which stays as it is; `policy` chooses the values to save."""
    joint = joint.copy()  # values may get a second way, see `take`
    classes = classify(joint)
    wanted = tuple(i for i, g in enumerate(joint.gradients) if g is not None)
    outputs = list(joint.outputs)
    mutated = [value for _, value in joint.mutated]
    if not wanted or not joint.tangents:
        graph = extract(joint.graph, list(joint.primals), [*outputs, *mutated])
        return Split(_module(joint, graph), None, len(outputs), (), 0, (), (), tuple(i for i, _ in joint.mutated))
    saved = policy(joint, classes)
    tangents = [node for _, node in joint.tangents]
    forward = extract(joint.graph, list(joint.primals), [*outputs, *mutated, *saved])
    shortcuts = take(joint.graph, saved)
    backward = extract(joint.graph, [*saved, *tangents], [joint.gradients[i] for i in wanted])
    shorten(backward)
    names = {n.name for n in backward.nodes}
    twice = [n for n in (*classes.forward, *shortcuts) if n.op == "call_function" and n.name in names and n not in saved]
    recomputed = tuple(n.name for n in twice)
    delay(backward, {n.name for n in joint.graph.nodes if n.op == "call_function" and n not in classes.backward} | set(recomputed))
    allowed = getattr(policy, "allowed", frozenset())
    again = [n.name for n in twice if random(n) or (heavy(n) and n.name not in allowed and not checkpointed(n, classes))]
    if again:
        raise LowerError(f"the backward would run {again[0]} a second time", do="this is a defect of the partitioner: report it")
    return Split(_module(joint, forward), _module(joint, backward), len(outputs), tuple(n.name for n in saved),
                 sum(value_bytes(n) for n in saved if n.op != "placeholder"), wanted, tuple(i for i, _ in joint.tangents),
                 tuple(i for i, _ in joint.mutated), recomputed, n_inputs=joint.n_inputs)


def _module(joint: Joint, graph: fx.Graph) -> fx.GraphModule:
    used = {n.target for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule({name: value for name, value in joint.modules.items() if name in used}, graph)


def value_bytes(node: fx.Node) -> int:
    """Bytes of the tensors of a node's value, under the shapes of the capture."""
    total = 0
    for t in meta.tensors(node):
        size = t.element_size()
        for dim in t.shape:
            size *= _hint(dim)
        total += size
    return total


def _hint(size: Any) -> int:
    """The size under the shapes of the capture, without adding a guard."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint
    return int(hint) if hint is not None else 4096


def checkpointed(node: fx.Node, classes: Classes) -> bool:
    """Whether the node is inside a region that the user checkpointed: it is computed again, never saved.

    What leaves the region is an ordinary value; random operations are saved nevertheless.
    """
    mark = _mark(node)
    source = node.args[0] if node.target is operator.getitem else node
    if mark is None or random(source):
        return False
    return all(_mark(user) == mark for user in node.users if user not in classes.backward and user.op == "call_function")


def _mark(node: fx.Node) -> Any:
    return (node.meta.get("custom") or {}).get("checkpoint")


def save_all(joint: Joint, classes: Classes) -> list[fx.Node]:
    """Save what the backward reads, as eager autograd does. Views are taken again from what they view."""
    saved: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()

    def need(node: fx.Node) -> None:
        if node.op == "get_attr" or node in seen:
            return
        seen.add(node)
        if (is_view(node) and node not in classes.backward) or (node.op == "call_function" and checkpointed(node, classes)):
            for source in node.all_input_nodes:
                need(source)
        elif node.op == "call_function" and node not in classes.forward and node.target is not operator.getitem:
            for source in node.all_input_nodes:  # neither forward nor backward: sizes, transposes, constants
                need(source)
        else:
            saved.setdefault(node)

    for node in classes.saved_candidates:
        need(node)
    return _sorted(saved, classes)


def _sorted(saved: Any, classes: Classes) -> list[fx.Node]:
    return sorted(saved, key=classes.order.__getitem__)


_HEAVY = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.matmul.default, aten.linear.default,
    aten.convolution.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_attention_math.default,
    aten.sort.default, aten.sort.stable, aten.topk.default, aten.cumsum.default, aten.index_put.default, aten.scatter.src,
    aten.scatter_add.default, aten._cdist_forward.default, aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default,
    aten.mkldnn_rnn_layer.default, aten.embedding_bag.padding_idx, aten._embedding_bag.default, aten.nonzero.default,
}
_LIGHT = {
    "rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "swiglu", "geglu", "rope",  # fxopt ops that cost one pass over memory
}
_LIGHT_ATEN = {
    aten.native_layer_norm.default, aten.native_group_norm.default, aten._softmax.default, aten._log_softmax.default, aten.cat.default,
    aten.embedding.default, aten.index.Tensor, aten.gather.default, aten.index_select.default, aten.clone.default, aten._to_copy.default,
    aten._native_batch_norm_legit_functional.default, aten.constant_pad_nd.default, aten.where.self, aten.arange.default,
    aten.arange.start, aten.arange.start_step, aten.full.default, aten.zeros.default, aten.ones.default, aten.scalar_tensor.default,
    aten.repeat.default, aten._unsafe_view.default, aten.copy.default, aten.slice_scatter.default, aten.select_scatter.default,
    aten.native_batch_norm.default, aten._native_batch_norm_legit.default, aten._native_batch_norm_legit_no_training.default, aten.stack.default,
    aten.flip.default, aten.roll.default, aten.tril.default, aten.triu.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
}
_LIGHT_TAGS = {torch.Tag.pointwise, torch.Tag.reduction}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "var", "var_mean", "prod", "any", "all", "linalg_vector_norm", "argmax", "argmin", "max", "min"}


def heavy(node: fx.Node) -> bool:
    """Whether recomputing the node would cost more than reading its value back: a ban for every policy."""
    target = node.target
    if node.op != "call_function" or target is operator.getitem:
        return False
    if not isinstance(target, OpOverload):
        return isinstance(target, HigherOrderOperator)
    if target in _HEAVY:
        return True
    if target in _LIGHT_ATEN or is_view(node) or _LIGHT_TAGS.intersection(target.tags):
        return False
    if target.namespace == "fxopt":
        return target._schema.name.split("::")[1] not in _LIGHT
    if target._schema.name.split("::")[1] in _REDUCTIONS:
        return False
    return bool(meta.tensors(node))


@dataclass(frozen=True)
class MinCut:
    """The policy that saves the fewest bytes from which the backward can be computed without random recomputation, and
    without heavy recomputation but of the nodes it names.

    Attributes:
        allowed: names of heavy nodes of the joint graph that may be computed again.
    """

    allowed: frozenset[str] = frozenset()

    def __call__(self, joint: Joint, classes: Classes) -> list[fx.Node]:
        """The values to save, in the order of the graph."""
        return _cut(joint, classes, self.allowed)


min_cut = MinCut()


def _cut(joint: Joint, classes: Classes, allowed: frozenset[str]) -> list[fx.Node]:
    """A minimum cut (Chen et al. 2016 posed the trade-off; the cut formulation follows AOTAutograd's documentation):
    every value is an edge of its size in bytes; values that may not be recomputed hang on the source; what the backward
    reads hangs on the sink.
    """
    graph = networkx.DiGraph()
    infinite = float("inf")
    sized: dict[fx.Node, float] = {}

    def weight(node: fx.Node) -> float:
        val = meta.value(node)
        if isinstance(val, (tuple, list)):
            return infinite  # a tuple is saved through its items
        if not isinstance(val, torch.Tensor):
            return 0.5  # sizes
        if node in alive:
            return 1.0
        if node.op == "call_function" and checkpointed(node, classes):
            return infinite
        return max(value_bytes(node), 1) * (1.01 if is_view(node) else 1.0)

    # state, and inputs without a gradient (masks, rotary tables: shared by all blocks), are alive anyway
    alive = {p for i, (p, g) in enumerate(zip(joint.primals, joint.gradients)) if i >= joint.n_inputs or g is None}
    candidates = [n for n in joint.graph.nodes if n not in classes.backward and n.op in ("placeholder", "call_function")]
    second = sources(joint.graph)
    for item, source in second.items():
        graph.add_edge((source, "out"), (item, "in"), capacity=infinite)
    for node in candidates:
        sized[node] = weight(node)
        graph.add_edge((node, "in"), (node, "out"), capacity=sized[node])
        fixed = node.op == "placeholder" or random(node) or (heavy(node) and node.name not in allowed and not checkpointed(node, classes))
        if fixed:
            if isinstance(meta.value(node), (tuple, list)):
                for user in node.users:
                    if user not in classes.backward and user.op == "call_function":
                        graph.add_edge("source", (user, "in"), capacity=infinite)
            else:
                graph.add_edge("source", (node, "in"), capacity=infinite)
        for user in node.users:
            if user in classes.backward or user.op == "output" or user in second:
                continue
            if not fixed or not isinstance(meta.value(node), (tuple, list)):
                graph.add_edge((node, "out"), (user, "in"), capacity=infinite)
    if "source" not in graph:
        return save_all(joint, classes)
    for node in classes.saved_candidates:
        if isinstance(meta.value(node), (tuple, list)):
            continue  # its readers in the backward are items, themselves part of the backward only if they are gradients
        graph.add_edge((node, "out"), "sink", capacity=infinite)
    if "sink" not in graph:
        return []
    value, (left, _) = networkx.minimum_cut(graph, "source", "sink")
    if value == infinite:
        raise LowerError("no finite cut of a joint graph", do="this is a defect of the partitioner: report it")
    saved = [node for node in candidates if (node, "in") in left and (node, "out") not in left]
    return _sorted(saved, classes)
