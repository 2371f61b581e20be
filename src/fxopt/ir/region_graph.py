"""Changes to the graphs of regions, which are not Programs any more: their joint graphs, and the forward and backward made of them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from fxopt.errors import CheckError
from fxopt.ir import meta
from fxopt.ir.regions import is_view
from fxopt.torch_private import detect_fake_mode

aten = torch.ops.aten


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
    position = {node: at for at, node in enumerate(graph.nodes)}
    waiting = {node for node in graph.nodes if node.name in names and node.users and node.op != "placeholder"}
    sequence: list[fx.Node] = []
    for node in graph.nodes:
        if node not in waiting:
            due, stack = [node], [node]
            while stack:
                for source in stack.pop().all_input_nodes:
                    if source in waiting:
                        waiting.discard(source)
                        due.append(source)
                        stack.append(source)
            sequence += sorted(due, key=position.__getitem__)
    for node in sequence:
        graph._root.prepend(node)


def call_behind(graph: fx.Graph, place: fx.Node, target: Any, args: tuple[Any, ...], val: Any, like: fx.Node,
                instead: dict[fx.Node, int | None]) -> list[fx.Node]:
    """Call `target(*args)` right behind `place`; readers of each node of `instead` read that item of its value (None: the value).
    Returns the call and its items."""
    with graph.inserting_after(place):
        call = graph.call_function(target, args)
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
        if node.op == "call_function" and node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def detach_outputs(graph: fx.Graph, keep: set[int]) -> None:
    """Detach every output of a region's graph except those at the positions `keep`."""
    output = graph.output_node()
    new = []
    for index, node in enumerate(output.args[0]):
        if index not in keep and isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor):
            with graph.inserting_before(output):
                detached = graph.call_function(aten.detach.default, (node,))
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
        if node.target is aten.sym_size.int and isinstance(source, fx.Node) and source.target is aten.reshape.default:
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


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A call at the graph's insertion point whose value is known, with the provenance of `like`."""
    node = graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda arg: arg.meta["val"])
    with detect_fake_mode(like.meta["val"]), torch.no_grad():
        node.meta = {**like.meta, "val": target(*values)}
    return node


def encode(forward: fx.Graph, groups: dict[fx.Node, int], start: int) -> None:
    """Return int8 codes and scales (see `ir.compress`) instead of some of the values that a forward graph returns from position `start` on:
    [..., n] becomes codes [..., n / group, group] and fp32 scales [..., n / group, 1]. They are made behind the value's last reader, so that its memory is
    free from there on.

    Args:
        groups: how many elements of the last dimension share a scale, by value.
    """
    made: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    output = forward.output_node()
    position = {node: at for at, node in enumerate(forward.nodes)}
    first = next(node for node in forward.nodes if node.op != "placeholder")
    for value, group in groups.items():
        last, waiting = value if value.op != "placeholder" else first, [value]
        while waiting:
            for user in waiting.pop().users:
                if user is not output and user in position:
                    last = max(last, user, key=position.__getitem__)
                    waiting += [user] if is_view(user) else []
        with forward.inserting_before(last if last is output else last.next):
            whole = meta.value(value).dtype
            split = _call(forward, aten.unflatten.int, (value, -1, [int(meta.value(value).shape[-1]) // group, group]), value)
            low, high = (_call(forward, reduction, (split, [-1], True), value) for reduction in (aten.amin.default, aten.amax.default))
            most = _call(forward, aten.maximum.default, (high, _call(forward, aten.neg.default, (low,), value)), value)
            if whole != torch.float32:
                most = _call(forward, aten.to.dtype, (most, torch.float32), value)
            scale = _call(forward, aten.div.Tensor, (most, 127.0), value)
            scale = _call(forward, aten.clamp_min.default, (scale, torch.finfo(torch.float32).tiny), value)
            steps = _call(forward, aten.round.default, (_call(forward, aten.div.Tensor, (split, scale), value),), value)
            made[value] = _call(forward, aten.to.dtype, (steps, torch.int8), value), scale
    returned = output.args[0]
    output.args = ((*returned[:start], *(part for node in returned[start:] for part in made.get(node, (node,)))),)


def decode(backward: fx.Graph, groups: dict[fx.Node, int]) -> None:
    """Take codes and scales, as `encode` returns them, instead of some values, by placeholder."""
    for value, group in groups.items():
        val = meta.value(value)
        with detect_fake_mode(val), torch.no_grad():
            split = val.detach().unflatten(-1, [int(val.shape[-1]) // group, group])
            codes_val = torch.empty_like(split, dtype=torch.int8)
            scale_val = torch.empty_like(split.amax(-1, keepdim=True), dtype=torch.float32)
        with backward.inserting_before(value):
            codes, scale = backward.placeholder(f"{value.name}_codes"), backward.placeholder(f"{value.name}_scale")
        codes.meta, scale.meta = {**value.meta, "val": codes_val}, {**value.meta, "val": scale_val}
        first = next(node for node in backward.nodes if node.op != "placeholder")
        with backward.inserting_before(first):
            x = _call(backward, aten.mul.Tensor, (codes, scale), value)
            if val.dtype != torch.float32:
                x = _call(backward, aten.to.dtype, (x, val.dtype), value)
            x = _call(backward, aten.flatten.using_ints, (x, -2, -1), value)
        for user in list(value.users):
            sized = user.target is aten.sym_size.int and user.args[1] not in (-1, val.dim() - 1)
            user.replace_input_with(value, codes if sized else x)
        backward.erase_node(value)
