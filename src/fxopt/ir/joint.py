"""The joint forward-and-backward graph of a region, traced by AOTAutograd. The only file that uses its private API.

Tried on torch 2.13: `aot_export_joint_with_descriptors` gives one functional graph whose inputs and outputs
carry descriptors (which input, which gradient, which mutated input), and tags each node as forward or backward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.fx.traceback as fx_traceback

from fxopt.errors import LowerError
from fxopt.ir import meta
from fxopt.ir.edit import copy_graph, random
from fxopt.ir.region_graph import detach_outputs, reshape_views, retarget, share_sizes
from fxopt.ir.regions import Region
from fxopt.ir.torch_patches import recurrent_layers
from fxopt.torch_private import aot_autograd


@dataclass(frozen=True, eq=False)
class Joint:
    """A region's joint graph.

    Attributes:
        graph: placeholders are `primals` then `tangents`; the output is mutated inputs, outputs, gradients, flat.
        n_inputs: how many of the primals are the region's inputs; the rest is its state.
        primals: the placeholders that take the region's inputs and state, in order.
        tangents: (index of the output, placeholder) for each output that takes a tangent.
        mutated: (index of the primal, node with its new value).
        outputs: one node or constant per output of the region.
        gradients: for each primal, the node of its gradient, or None.
        differentiable: for each output, whether it requires a gradient.
    """

    graph: fx.Graph
    modules: dict[str, Any]
    n_inputs: int
    primals: tuple[fx.Node, ...]
    tangents: tuple[tuple[int, fx.Node], ...]
    mutated: tuple[tuple[int, fx.Node], ...]
    outputs: tuple[Any, ...]
    gradients: tuple[fx.Node | None, ...]
    differentiable: tuple[bool, ...]

    def copy(self) -> Joint:
        """The same joint graph with nodes of its own, under the same names."""
        graph, new = copy_graph(self.graph)

        def of(value: Any) -> Any:
            return new.get(value, value) if isinstance(value, fx.Node) else value

        return dataclasses.replace(
            self, graph=graph, primals=tuple(map(of, self.primals)), tangents=tuple((i, of(n)) for i, n in self.tangents),
            mutated=tuple((i, of(n)) for i, n in self.mutated), outputs=tuple(map(of, self.outputs)), gradients=tuple(map(of, self.gradients)))


def region_examples(region: Region, requires_grad: Sequence[bool], fake_mode: Any) -> list[Any]:
    """Fake arguments for a region: one per placeholder, leaves that require a gradient where asked."""
    args = []
    with fake_mode:
        for node, wanted in zip((n for n in region.graph.nodes if n.op == "placeholder"), requires_grad):
            val = meta.value(node)
            if isinstance(val, torch.Tensor):
                val = val.detach().requires_grad_(wanted)
            args.append(val)
    return args


def trace(region: Region, requires_grad: Sequence[bool], fake_mode: Any, *, only: Sequence[int] | None = None) -> Joint:
    """Trace the joint graph of a region.

    Args:
        requires_grad: per placeholder of the region, whether the argument requires a gradient.
        only: outputs that will receive a tangent; the others are detached. Default: all that require a gradient.

    Raises:
        LowerError: if the region cannot be differentiated by tracing.
    """
    graph, _ = copy_graph(region.graph)
    for node in graph.nodes:
        if node.target is torch.ops.aten.dropout.default and not random(node):
            retarget(node, torch.ops.aten.clone.default, (node.args[0],))  # it is its input; torch 2.14 gives an output that is an input no gradient
    if only is not None:
        detach_outputs(graph, set(only))
    module = fx.GraphModule(dict(region.modules), graph)
    args = region_examples(region, requires_grad, fake_mode)
    place = region.path or "<outside the blocks>"
    try:
        with contextlib.ExitStack() as stack, warnings.catch_warnings(), torch.enable_grad(), recurrent_layers(), fx_traceback.preserve_node_meta():
            warnings.simplefilter("ignore")
            traced = aot_autograd.aot_export_joint_with_descriptors(stack, module, tuple(args))
    except Exception as error:
        raise LowerError(f"the backward of a region could not be traced: {type(error).__name__}: {str(error)[:400]}", where=place,
                         do="exclude this module from the optimization, or report the operation it uses") from error
    info = traced._aot_state.fw_metadata
    return _read(traced.graph_module, region, info, place)


def _read(module: fx.GraphModule, region: Region, info: Any, place: str) -> Joint:
    graph = module.graph
    reshape_views(graph)
    share_sizes(graph)
    n_primals, n_outputs = len(region.inputs) + len(region.state), len(region.outputs)
    primals: list[fx.Node | None] = [None] * n_primals
    tangents: list[tuple[int, fx.Node]] = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        desc = node.meta["desc"]
        kind = type(desc).__name__
        if kind == "PlainAOTInput":
            primals[desc.idx] = node
        elif kind == "TangentAOTInput" and type(desc.output).__name__ == "PlainAOTOutput":
            tangents.append((desc.output.idx, node))
        else:
            raise LowerError(f"an input of kind {kind} in a joint graph is not supported", where=place)
    last = graph.output_node()
    outputs: list[Any] = [None] * n_outputs
    gradients: list[fx.Node | None] = [None] * n_primals
    mutated: list[tuple[int, fx.Node]] = []
    for value, desc in zip(last.args[0], last.meta["desc"]):
        kind = type(desc).__name__
        if kind == "NoneType":
            continue
        if kind == "PlainAOTOutput":
            outputs[desc.idx] = value
        elif kind == "InputMutationAOTOutput":
            mutated.append((desc.mutated_input.idx, value))
        elif kind == "GradAOTOutput":
            gradients[desc.grad_of.idx] = value
        else:
            raise LowerError(f"an output of kind {kind} in a joint graph is not supported", where=place)
    if any(p is None for p in primals):
        raise LowerError("an input of the region is missing from its joint graph", where=place)
    differentiable = tuple(bool(o.requires_grad) for o in info.output_info)
    modules = {n.target: getattr(module, n.target) for n in graph.nodes if n.op == "get_attr"}
    return Joint(graph, modules, len(region.inputs), tuple(p for p in primals if p is not None), tuple(tangents), tuple(mutated), tuple(outputs),
                 tuple(gradients), differentiable)
