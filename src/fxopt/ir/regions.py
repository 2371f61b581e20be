"""Cut a flat Program into Regions: one per repeated block, plus what lies before, between and after them.

The cut is a schedule: regions in an order in which each needs only what came before. A region's boundary values are
never views: view operations are cheap, so they are repeated inside each reader, and what crosses is the tensor that
owns the memory. Views that the program itself returns are taken after the last region, by ordinary autograd.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from fxopt.errors import LowerError
from fxopt.ir import meta
from fxopt.ir.edit import build_region, effectful, mutates
from fxopt.ir.part import part_of
from fxopt.ir.program import Lazy, Program
from fxopt.torch_private import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Region:
    """A piece of a Program.

    Attributes:
        path: module path of the block it belongs to; None for what lies between blocks.
        graph: placeholders are `inputs` then `state`; the output is a tuple, one value per name in `outputs`.
        inputs: names of the program's values that it reads.
        state: names of the slots and constants that it reads.
        outputs: names of the program's values that it produces.
        key: equal for regions that compute the same function of their inputs and state.
    """

    path: str | None
    graph: fx.Graph
    inputs: tuple[str, ...]
    state: tuple[str, ...]
    outputs: tuple[str, ...]
    modules: dict[str, Any]
    key: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Region:
        return self


@dataclass(frozen=True, eq=False)
class Schedule:
    """Regions in execution order, the views taken at the end, and the flat outputs (a value's name, or a constant).

    `lazy` maps the name of an output that is computed only when somebody reads it to the nodes that compute it.
    """

    regions: tuple[Region, ...]
    views: tuple[fx.Node, ...]
    outputs: tuple[Any, ...]
    lazy: dict[str, tuple[fx.Node, ...]]
    dissolved: tuple[str, ...]  # blocks that could not be cut out, with the reason

    def __deepcopy__(self, memo: dict[int, Any]) -> Schedule:
        return self


def repeated_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the outermost entries of lists that hold two or more modules of one class with parameters."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def visit(module: nn.Module) -> None:
        children = list(module.children())
        repeated: set[int] = set()
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            kinds: dict[type, list[nn.Module]] = {}
            for child in children:
                kinds.setdefault(type(child), []).append(child)
            for group in kinds.values():
                rich = [m for m in group if any(True for _ in m.children()) and any(True for _ in m.parameters())]
                if len(rich) > 1:
                    found.extend(names[m] for m in rich)
                    repeated.update(id(m) for m in rich)
        for child in children:
            if id(child) not in repeated:
                visit(child)

    visit(model)
    return tuple(dict.fromkeys(found))


def is_view(node: fx.Node) -> bool:
    """Whether the node's value shares memory with its first argument (by schema; casts and copies excluded)."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        return False
    returns = node.target._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or returns[0].alias_info.is_write:
        return False
    if "[]" in str(returns[0].type) or not isinstance(meta.value(node), torch.Tensor):
        return False
    if effectful(node):
        return False
    source = node.args[0] if node.args else None
    a, b = meta.tensor(source), meta.tensor(node)
    if a is None or b is None or a.dtype != b.dtype or a.device != b.device:
        return False
    if node.target is aten.contiguous.default:
        return bool(a.is_contiguous())
    return True


def cheap(node: fx.Node) -> bool:
    """Values that each region recomputes instead of receiving: views, sizes, and arithmetic on sizes."""
    if is_view(node):
        return True
    return node.op == "call_function" and not isinstance(meta.value(node), (torch.Tensor, tuple, list, type(None))) and not effectful(node)


def cut(program: Program, blocks: Iterable[str]) -> Schedule:
    """The schedule of a program. `blocks` are the module paths that should become regions of their own."""
    wanted = list(blocks)
    dissolved: list[str] = []
    while True:
        schedule = _try_cut(program, wanted, dissolved)
        if isinstance(schedule, Schedule):
            return schedule
        wanted.remove(schedule[0])
        dissolved.append(f"{schedule[0]}: {schedule[1]}")


def influences(region: Region) -> tuple[frozenset[int], ...]:
    """For each argument, the outputs that a gradient could flow from to it."""
    reached: dict[fx.Node, frozenset[int]] = {}
    output = region.graph.output_node()
    for index, node in enumerate(output.args[0]):
        if isinstance(node, fx.Node):
            reached[node] = reached.get(node, frozenset()) | {index}
    for node in reversed(region.graph.nodes):
        found = reached.get(node, frozenset())
        if node is output or not found or node.target is aten.detach.default:
            continue
        known = meta.tensors(node)
        if known and not any(t.is_floating_point() or t.is_complex() for t in known):
            continue
        for source in node.all_input_nodes:
            reached[source] = reached.get(source, frozenset()) | found
    return tuple(reached.get(n, frozenset()) for n in region.graph.nodes if n.op == "placeholder")


def differentiable_outputs(region: Region, requires_grad: Sequence[bool]) -> tuple[bool, ...]:
    """For each output, whether a gradient could flow to it from an argument that requires one."""
    carries: set[fx.Node] = set()
    arguments = iter(requires_grad)
    for node in region.graph.nodes:
        if node.op == "placeholder":
            if next(arguments):
                carries.add(node)
        elif node.target is not aten.detach.default and any(i in carries for i in node.all_input_nodes):
            if any(t.is_floating_point() or t.is_complex() for t in meta.tensors(node)):
                carries.add(node)
    return tuple(n in carries for n in region.graph.output_node().args[0])


def lazy_nodes(program: Program) -> dict[str, tuple[fx.Node, ...]]:
    """For each lazy output, the nodes that nothing else needs, in order."""
    names = {fact.node for fact in program.facts if isinstance(fact, Lazy)}
    eager = [n for n in program.outputs if isinstance(n, fx.Node) and n.name not in names]
    needed = ancestors([*eager, *(n for n in program.graph.nodes if n.op == "call_function" and effectful(n))])
    needed |= {user for node in needed for user in node.users if user.target is operator.getitem}  # a tuple does not leave its region
    found = {}
    for node in program.outputs:
        if isinstance(node, fx.Node) and node.name in names and node not in needed:
            mine = ancestors([node]) - needed
            found[node.name] = tuple(n for n in program.graph.nodes if n in mine and n.op == "call_function")
    return found


def memory(node: fx.Node) -> fx.Node:
    """The node whose memory a node's value may share, through views and in-place operations."""
    while node.op == "call_function" and isinstance(node.target, OpOverload) and node.all_input_nodes:
        returns = node.target._schema.returns
        if not returns or returns[0].alias_info is None:
            break
        node = node.all_input_nodes[0]
    return node


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _try_cut(program: Program, wanted: list[str], dissolved: list[str]) -> Schedule | tuple[str, str]:
    paths = set(wanted)
    lazy = lazy_nodes(program)
    later = {n for nodes in lazy.values() for n in nodes}
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and not cheap(n) and n not in later]
    order: dict[str, int] = {}
    owner: dict[fx.Node, str] = {}
    for node in nodes:
        path = next((p for p, _ in meta.provenance(node).stack if p in paths), None)
        if path is not None:
            owner[node] = path
            order.setdefault(path, 2 * len(order) + 1)  # blocks have odd levels, what lies between them even ones
    level: dict[fx.Node, int] = {}
    deps: dict[fx.Node, int] = {}
    effects = 0  # writes and random draws keep their order
    reads: dict[fx.Node, int] = {}  # the last level at which a tensor's memory is read, and at which it is written:
    writes: dict[fx.Node, int] = {}  # a read behind a write depends on it through memory, not through the graph
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            deps[node] = 0
            continue
        if node.op == "output" or node in later:
            continue
        needed = max((deps[i] for i in node.all_input_nodes), default=0)
        touched = [memory(i) for i in node.all_input_nodes]
        needed = max([needed, *(writes.get(m, 0) for m in touched)])
        if mutates(node):
            needed = max([needed, *(reads.get(m, 0) for m in touched)])
        if cheap(node):
            deps[node] = needed
            continue
        if effectful(node):
            needed = max(needed, effects)
        if node in owner:
            at = order[owner[node]]
            if needed > at:
                return owner[node], f"{node.name} needs a value computed after the block has begun"
            level[node] = deps[node] = at
        else:
            # behind a block's own value comes the gap after it
            level[node] = deps[node] = needed + (needed % 2)
        if effectful(node):
            effects = level[node]
        for root in touched:
            reads[root] = max(reads.get(root, 0), level[node])
            if mutates(node):
                writes[root] = level[node]
    # a block's node that reads a later gap was caught above; a gap's node needs all its blocks to be done: by level
    groups: dict[int, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(level[node], []).append(node)
    flat = program.outputs
    returned = [n for n in flat if isinstance(n, fx.Node)]
    tail: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def trail(node: fx.Node) -> None:  # the views that the program returns, back to what owns the memory
        if node in seen or not cheap(node):
            return
        seen.add(node)
        for source in node.all_input_nodes:
            trail(source)
        tail.append(node)

    for node in returned:
        if node.name not in lazy:
            trail(node)
    for node in later:
        for source in node.all_input_nodes:
            if source not in later:
                trail(source)
    position = {n: i for i, n in enumerate(program.graph.nodes)}
    tail.sort(key=position.__getitem__)
    home = {node: at for at, group in groups.items() for node in group}
    crossing: set[fx.Node] = {n for n in returned if n in home} | {i for n in (*tail, *later) for i in n.all_input_nodes if i in home}
    part = part_of(program.facts)
    regions: list[Region] = []
    plans: dict[int, tuple[list[fx.Node], list[fx.Node], list[str]]] = {}
    for at, group in groups.items():
        plans[at] = _needs(group, home, at)
        crossing.update(n for n in plans[at][1] if n in home)
    block_of = {at: path for path, at in order.items()}
    for at in sorted(groups):
        body, inputs, state = plans[at]
        outputs = [n for n in groups[at] if n in crossing]
        mutating = any(effectful(n) for n in groups[at])
        if not outputs and not mutating:
            continue
        path = block_of.get(at)
        home_path = path or (part.path if part is not None else None)
        prefix = f"{home_path}." if home_path else ""
        graph, modules = build_region(body, inputs, state, outputs, program)
        relative = tuple(name[len(prefix):] if prefix and name.startswith(prefix) else f"^{name}" for name in state)
        regions.append(Region(path, graph, tuple(n.name for n in inputs), tuple(state), tuple(n.name for n in outputs), modules,
                              _key(graph, relative if home_path else tuple(state), program, state)))
    for name in [n.name for n in tail for a in n.all_input_nodes if a.op == "get_attr"]:
        raise LowerError(f"the program returns {name}, a view of its own state", do="return a clone of the parameter")
    outputs_out = tuple(n.name if isinstance(n, fx.Node) else n for n in flat)
    return Schedule(tuple(regions), tuple(tail), tuple(_Ref(o) if isinstance(f, fx.Node) else o for f, o in zip(flat, outputs_out)), lazy, tuple(dissolved))


class _Ref(str):
    """The name of a value, as opposed to a constant string that a program returns."""


def is_ref(value: Any) -> bool:
    """Whether an entry of `Schedule.outputs` names a value."""
    return isinstance(value, _Ref)


def _needs(group: list[fx.Node], home: dict[fx.Node, int], at: int) -> tuple[list[fx.Node], list[fx.Node], list[str]]:
    """The nodes of a region with the cheap nodes repeated in it, its input values, and the state it reads."""
    body: dict[fx.Node, None] = {}
    inputs: dict[fx.Node, None] = {}
    state: dict[str, None] = {}

    def pull(node: fx.Node) -> None:
        if node in body or node in inputs:
            return
        if node.op == "get_attr":
            state.setdefault(node.target)
            body[node] = None
        elif node.op == "placeholder" or (node in home and home[node] != at):
            inputs[node] = None
        elif node in home:
            return  # of this region: added in order by the caller
        else:
            for source in node.all_input_nodes:
                pull(source)
            body[node] = None

    for node in group:
        for source in node.all_input_nodes:
            pull(source)
        body[node] = None
    return list(body), list(inputs), list(state)


def _key(graph: fx.Graph, relative: tuple[str, ...], program: Program, state: list[str]) -> str:
    """A digest of everything that decides what a region computes and how it is compiled."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    lines = [repr(relative)]
    for name in state:
        slot = program.slots.get(name)
        lines.append(f"{slot.shape}{slot.dtype}{program.trainable(name)}" if slot else f"constant {name}")

    def show(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return f"%{number[arg]}"
        if isinstance(arg, (list, tuple)):
            return "[" + ",".join(show(a) for a in arg) + "]"
        if isinstance(arg, dict):
            return "{" + ",".join(f"{k}:{show(v)}" for k, v in arg.items()) + "}"
        return repr(arg)

    for node in graph.nodes:
        target = str(node.target) if node.op == "call_function" else node.op if node.op != "get_attr" else f"attr {node.target}"
        val = node.meta.get("val")
        shown = f"{val.dtype}{tuple(str(s) for s in val.shape)}{tuple(str(s) for s in val.stride())}{val.device}" if isinstance(val, torch.Tensor) else ""
        lines.append(f"{node.op} {target} {show(node.args)} {show(node.kwargs)} {shown if node.op == 'placeholder' else ''} {meta.provenance(node).checkpoint is not None}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
