"""Changes to the graphs of regions, which are not Programs any more: their joint graphs, and the forward and backward made of them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from fxopt.errors import CheckError


def extract(graph: fx.Graph, inputs: list[fx.Node], outputs: list[Any]) -> fx.Graph:
    """The part of a graph that computes `outputs` from `inputs`, in the graph's order.

    Raises:
        CheckError: if an output needs a placeholder that is not among the inputs.
    """
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = new.placeholder(node.name)
        env[node].meta = dict(node.meta)
    position = {node: i for i, node in enumerate(graph.nodes)}
    needed: set[fx.Node] = set()
    stack = [n for n in outputs if isinstance(n, fx.Node)]
    while stack:
        node = stack.pop()
        if node in env or node in needed:
            continue
        if node.op == "placeholder":
            raise CheckError(f"{node.name} is needed but is not an input of the extracted graph")
        needed.add(node)
        stack.extend(node.all_input_nodes)
    for node in sorted(needed, key=position.__getitem__):
        env[node] = new.node_copy(node, lambda arg: env[arg])
        env[node].meta = dict(node.meta)
    new.output(tuple(env[n] if isinstance(n, fx.Node) else n for n in outputs))
    new.lint()
    return new


def put_module(module: fx.GraphModule, name: str, part: torch.nn.Module, sequence: list[Any], inputs: list[fx.Node], nodes: list[fx.Node],
               outputs: list[fx.Node]) -> None:
    """Replace some nodes of a module's graph by a call of a submodule, which returns the values of `outputs`. `sequence`: the order
    of the other nodes, with the string "part" where the call goes."""
    graph = module.graph
    module.add_submodule(name, part)
    call = after = graph.call_module(name, tuple(inputs))
    for node in sequence:
        graph._root.prepend(call if node == "part" else node)
    for index, node in enumerate(outputs):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, index))
        after.meta = dict(node.meta)
        for user in [user for user in node.users if user not in nodes]:
            user.replace_input_with(node, after)
    for node in reversed(nodes):
        graph.erase_node(node)
    graph.lint()
    module.recompile()


def delay(graph: fx.Graph, names: set[str]) -> None:
    """Move the named nodes right before their first reader (recomputed values: alive only from their first use on)."""
    for node in reversed(list(graph.nodes)):
        if node.name in names and node.users:
            position = {n: i for i, n in enumerate(graph.nodes)}
            first = min(node.users, key=position.__getitem__)
            first.prepend(node)


def call_behind(graph: fx.Graph, source: fx.Node, target: Any, args: tuple[Any, ...], val: Any, like: fx.Node,
                instead: dict[fx.Node, int | None]) -> list[fx.Node]:
    """Call `target(source, *args)` right behind `source`; readers of each node of `instead` read that item of its value (None: the
    value). Returns the call and its items."""
    with graph.inserting_after(source):
        call = graph.call_function(target, (source, *args))
    call.meta = {**like.meta, "val": val}
    made = [call]
    for old, index in instead.items():
        if index is not None:
            with graph.inserting_after(call):
                made.append(graph.call_function(operator.getitem, (call, index)))
            made[-1].meta = dict(old.meta)
        old.replace_all_uses_with(call if index is None else made[-1])
    return made


def reshape_views(graph: fx.Graph) -> None:
    """`view` becomes `reshape` in a functional graph: equal where the view exists, and right where the strides at run time
    are others than the fake ones (a batch norm of a transposed tensor)."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default


def detach_outputs(graph: fx.Graph, keep: set[int]) -> None:
    """Detach every output of a region's graph except those at the positions `keep`."""
    output = next(reversed(graph.nodes))
    new = []
    for index, node in enumerate(output.args[0]):
        if index not in keep and isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor):
            with graph.inserting_before(output):
                detached = graph.call_function(torch.ops.aten.detach.default, (node,))
            detached.meta = dict(node.meta)
            node = detached
        new.append(node)
    output.args = (tuple(new),)


def share_sizes(graph: fx.Graph) -> None:
    """A size of a reshaped tensor is read from the reshape's own sizes, and each size is computed once. By the graph alone: that two
    symbols are equal in a trace says nothing of another call."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.SymInt):
            continue
        same = known.setdefault((node.target, node.args), node)
        source = node.args[0]
        if node.target is torch.ops.aten.sym_size.int and isinstance(source, fx.Node) and source.target is torch.ops.aten.reshape.default:
            size = source.args[1][node.args[1]]
            same = size if isinstance(size, fx.Node) else same
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def drop_unread(graph: fx.Graph) -> None:
    """Erase what nobody reads."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def retarget(node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Let a node call another operation that has the same value."""
    node.target, node.args = target, args
