"""Row tiling: a part of a graph in which rows do not meet is run for some rows at a time, so that what it needs inside is small.

The rows lie along a dimension whose size is a symbol. What each operator does to them is proven from the operator: values either
hold rows, each computed from the same rows of the operands, or are sums over rows (the gradients of weights), or are free of them. Attention,
norms over a batch and everything unknown let rows meet: the graph falls apart there, and the part that needs most memory
inside is tiled. (Sequence tiling: Bekman et al., 2025, https://arxiv.org/abs/2506.13996; here it is one transform of any graph.)
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import sympy
import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import mutates, random
from fxopt.ir.index import called, full_arguments
from fxopt.ir.joint import Joint
from fxopt.ir.partition import Classes, MinCut, Split, value_bytes
from fxopt.ir.region_graph import extract, put_module
from fxopt.ir.samples import expression, ratio
from fxopt.torch_private import OpOverload

aten = torch.ops.aten
_VIEWS = {"view", "reshape", "_unsafe_view", "expand", "detach", "alias", "clone", "_to_copy", "transpose", "permute", "t", "unsqueeze", "squeeze", "contiguous"}
_ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}
FEWEST = 64  # rows in a tile, where rows are no samples: below it the products starve


@dataclass(frozen=True)
class Part:
    """A part of a graph that can be run row by row.

    Attributes:
        nodes: in order; no path between two of them leaves the part.
        inside: bytes of the values that only the part reads, under the sizes of the capture.
    """

    nodes: tuple[fx.Node, ...]
    inside: int


@dataclass(frozen=True)
class Tiling:
    """The policy `base`, whose backward runs its largest row-independent part in tiles.

    Attributes:
        dim: of the region's output, whose size is the number of rows.
        count: of the tiles.
    """

    base: MinCut
    dim: int
    count: int = 8

    @property
    def allowed(self) -> frozenset[str]:
        """Of the base."""
        return self.base.allowed

    def __call__(self, joint: Joint, classes: Classes) -> list[fx.Node]:
        """The values to save: those of the base."""
        return self.base(joint, classes)

    def apply(self, plan: Split, operands: Mapping[Any, frozenset[int]]) -> Split:
        """The plan with its backward tiled; the plan itself where nothing can be."""
        if plan.backward is None:
            return plan
        tangents = [n for n in plan.backward.graph.nodes if n.op == "placeholder"][-len(plan.tangents):]
        sizes = [expression(meta.tensor(n).shape[self.dim]) for n in tangents if meta.tensor(n).dim() > self.dim + 1]
        symbols = [size for size in sizes if isinstance(size, sympy.Symbol)]
        if not symbols:
            return plan
        rows = Rows(plan.backward.graph, symbols[0], operands)
        for part in rows.parts()[:1]:
            if tile(plan.backward, rows, part, self.count, FEWEST if self.dim else 1):
                return dataclasses.replace(plan, tiled=tuple(node.name for node in part.nodes))
        return plan


class Rows:
    """Where a graph's values hold the rows of a symbol.

    Args:
        symbol: the size of the rows' dimension.
        operands: for operators of which only the caller knows that rows do not meet in them, the positions of the arguments that may hold
            rows, not in the last dimension; results without the symbol are sums over rows.
    """

    def __init__(self, graph: fx.Graph, symbol: sympy.Symbol, operands: Mapping[Any, frozenset[int]]) -> None:
        self.symbol, self.operands = symbol, operands
        self.apart: dict[fx.Node, bool] = {}  # whether rows stay apart in a node that reads rows
        self.under: dict[fx.Node, Any] = {}  # how many places of its dimension each row takes, if not one: [batch * seq, ...] has seq for a sample
        self.level: dict[fx.Node, int] = {}
        for node in graph.nodes:
            self._visit(node)

    def dim(self, value: Any) -> int | None:
        """The dimension, from the end, in which a tensor holds rows; None if in none. More than one is refused by the rules."""
        found = self.dims(value)
        return found[0] if len(found) == 1 else None

    def dims(self, value: Any) -> list[int]:
        """All dimensions, from the end, whose size has the symbol in it."""
        val = meta.tensor(value) if isinstance(value, fx.Node) else value
        if not isinstance(val, torch.Tensor):
            return []
        return [at - val.dim() for at, size in enumerate(val.shape) if self.in_size(size)]

    def in_size(self, size: Any) -> bool:
        """Whether a size depends on the symbol."""
        expr = expression(size)
        return isinstance(expr, sympy.Basic) and self.symbol in expr.free_symbols

    def holds(self, node: fx.Node) -> bool:
        """Whether a node's value, or a part of it, holds rows."""
        return any(self.dims(t) for t in meta.tensors(node))

    def _visit(self, node: fx.Node) -> None:
        """Levels: even where rows stay apart, odd where they meet or nothing is per row; a node's level is never below its operands'."""
        before = [self.level[source] for source in node.all_input_nodes if source in self.level]
        top = max(before, default=-1)
        if node.op != "call_function" or node.op == "output":
            if node.op != "placeholder":
                self.level[node] = top
            return
        if called(node, operator.getitem):
            self.level[node] = top
            self.apart[node] = self.apart.get(node.args[0], False)
            self.under[node] = self.under.get(node.args[0], 1)
            if self.apart[node] and not self.holds(node):
                self.level[node] = top + top % 2
            return
        rows = [source for source in node.all_input_nodes if self.holds(source)]
        summed = any(self.apart.get(source) and not self.holds(source) for source in node.all_input_nodes)
        self.apart[node] = bool(rows) and not summed and not (mutates(node) or random(node)) and self._row_by_row(node)
        if self.apart[node]:
            self.level[node] = top + top % 2 if top >= 0 else 0
        elif before or self.holds(node):
            self.level[node] = top + 1 - top % 2 if top >= 0 else -1

    def _row_by_row(self, node: fx.Node) -> bool:
        target = node.target
        if not isinstance(target, OpOverload):
            return False
        unders = {self.under.get(source, 1) for source in node.all_input_nodes if self.dims(source)}
        if len(unders) > 1:
            return False
        self.under.update(dict.fromkeys([node], *unders))
        allowed = self.operands.get(target)
        if allowed is not None:
            return self._declared(node, allowed)
        if target.namespace != "aten":
            return False
        name = target._schema.name.split("::")[1]
        sources = [source for source in node.all_input_nodes if self.dims(source)]
        if any(len(self.dims(source)) != 1 for source in sources) or len(self.dims(node)) > 1:
            return False
        if name in _VIEWS:
            return self._same_rows(node.args[0], node)
        if torch.Tag.pointwise in target.tags:
            where = {self.dim(source) for source in sources}
            out = self.dim(node)
            return where == {out} and all(source in sources or not self._extent(source, out) for source in node.all_input_nodes)
        if name in _ATTENTION:  # samples do not meet in it, what lies along other dimensions does
            return unders == {1} and all(self.dim(source) == -meta.tensor(source).dim() for source in sources)
        if name == "linear":
            return sources == [node.args[0]] and self.dim(node.args[0]) != -1
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            return self._product(node, name)
        if name in ("sum", "mean", "amax", "amin") and isinstance(node.args[1] if len(node.args) > 1 else None, (list, tuple)):
            rank = meta.tensor(node.args[0]).dim()
            over = {d - rank if d >= 0 else d for d in node.args[1]}
            return name == "sum" if self.dim(node.args[0]) in over else bool(over)
        if name in ("slice", "select", "cat", "split_with_sizes", "split", "_softmax", "_log_softmax"):
            given = full_arguments(node)
            rank = meta.tensor(sources[0]).dim()
            along = given["dim"] if given["dim"] < 0 else given["dim"] - rank
            whole = name != "cat" or len({self.dim(source) for source in node.all_input_nodes}) == 1
            return whole and along != self.dim(sources[0])
        return False

    def _extent(self, source: fx.Node, dim: int | None) -> bool:
        val = meta.tensor(source)
        return val is not None and dim is not None and val.dim() >= -dim and not meta.same_size(val.shape[dim], 1)

    def _declared(self, node: fx.Node, allowed: frozenset[int]) -> bool:
        if full_arguments(node).get("dropout", 0.0):  # its mask goes by the place of a row
            return False
        for position, value in enumerate(node.args):
            parts = value if isinstance(value, (list, tuple)) else [value]
            for part in parts:
                if isinstance(part, fx.Node) and (dims := self.dims(part)):
                    if position not in allowed or len(dims) != 1 or (dims[0] == -1 and not self._is_statistic(node, part)):
                        return False
                elif isinstance(part, fx.Node) and isinstance(meta.value(part), torch.SymInt) and self.in_size(meta.value(part)):
                    return False
        return True

    def _is_statistic(self, node: fx.Node, part: fx.Node) -> bool:
        """One number for each row: a tensor of one dimension less than another operand's."""
        rank = meta.tensor(part).dim()
        return any(meta.tensor(other).dim() == rank + 1 and self.dim(other) == -2 for other in node.all_input_nodes if meta.tensor(other) is not None)

    def _same_rows(self, source: Any, node: fx.Node) -> bool:
        """Whether a rearrangement leaves each row's elements together: a row's elements are as many in both, or the dimension is moved as
        a whole."""
        if not isinstance(source, fx.Node):
            return False
        before, after = meta.tensor(source), meta.tensor(node)
        a, b = self.dim(source), self.dim(node)
        if a is None or b is None:
            return False
        if node.target in (aten.transpose.int, aten.permute.default, aten.t.default):
            return expression(before.shape[a]) == expression(after.shape[b])
        inside = _follow(after, b)
        under = ratio(self.under.get(source, 1) * _follow(before, a), inside)
        if under is None or ratio(expression(after.shape[b]), self.symbol * under) is None:
            return False
        self.under[node] = under
        return True

    def _product(self, node: fx.Node, name: str) -> bool:
        left, right = node.args[-2:] if name in ("mm", "bmm") else node.args[1:3]
        a, b = self.dim(left), self.dim(right)
        extra = node.args[0] if name in ("addmm", "baddbmm") else None
        if extra is not None and self.dims(extra) and self.dim(extra) != self.dim(node):
            return False
        if (a, b) == (-1, -2):
            return extra is None  # a sum over rows
        return (a, b) in ((-2, None), (None, -1)) or (a, b) == (-3, -3)

    def parts(self) -> list[Part]:
        """The parts, the one that needs most inside first."""
        groups: dict[int, list[fx.Node]] = {}
        for node, apart in self.apart.items():
            if apart and self.level[node] % 2 == 0:
                groups.setdefault(self.level[node], []).append(node)
        found = []
        for nodes in groups.values():
            mine = set(nodes)
            inside = sum(value_bytes(n) for n in nodes if self.holds(n) and isinstance(meta.value(n), torch.Tensor) and all(u in mine for u in n.users))
            if self._scales(nodes, mine):
                found.append(Part(tuple(nodes), inside))
        return sorted(found, key=lambda part: -part.inside)

    def _scales(self, nodes: Sequence[fx.Node], mine: set[fx.Node]) -> bool:
        """Whether the sizes that the part is given are proportional to the number of rows, or do not depend on it."""
        for node in nodes:
            for source in node.all_input_nodes:
                val = meta.value(source)
                if source in mine or isinstance(val, torch.Tensor):
                    continue
                if not isinstance(val, (int, float, torch.SymInt)) or isinstance(val, torch.SymInt) and proportion(val, self.symbol) is None:
                    return False
        return True


def _follow(val: torch.Tensor, dim: int) -> Any:
    total: Any = 1
    for size in val.shape[val.dim() + dim + 1:]:
        total = total * expression(size)
    return total


def proportion(value: torch.SymInt, symbol: sympy.Symbol) -> bool | None:
    """True if a size is proportional to the symbol, False if it does not depend on it, None for anything else."""
    expr = sympy.sympify(expression(value))
    if symbol not in expr.free_symbols:
        return False
    factor = sympy.cancel(expr / symbol)
    return None if symbol in factor.free_symbols else True


class Tiled(torch.nn.Module):
    """Runs a part of a graph for some rows at a time.

    Args:
        body: the part.
        inputs: for each argument: the dimension (from the end) that holds rows; "size" for a size that is proportional to them; None.
        outputs: for each result: the dimension that holds rows, or None for a sum over them.
        count: into how many tiles, if they have `fewest` rows then.
    """

    def __init__(self, body: fx.GraphModule, inputs: Sequence[int | str | None], outputs: Sequence[int | None], count: int, fewest: int) -> None:
        super().__init__()
        self.body, self.inputs, self.outputs, self.count, self.fewest = body, tuple(inputs), tuple(outputs), count, fewest

    def forward(self, *args: Any) -> tuple[Any, ...]:
        """The part's results."""
        many = next(arg.shape[at] for arg, at in zip(args, self.inputs) if isinstance(at, int))
        tile = max(self.fewest, -(-many // self.count))
        found: list[Any] = [None] * len(self.outputs)
        for start in range(0, max(many, 1), tile):
            rows = min(tile, many - start)
            given = [arg.narrow(at, start * (arg.shape[at] // many), rows * (arg.shape[at] // many)) if isinstance(at, int) and many else
                     arg * rows // many if at == "size" and many else arg for arg, at in zip(args, self.inputs)]
            results = self.body(*given)
            del given
            for index, (at, part) in enumerate(zip(self.outputs, results)):
                if part is None:
                    continue
                if at is None:
                    if start and found[index].dtype != torch.promote_types(part.dtype, torch.float32):
                        found[index] = found[index].to(torch.promote_types(part.dtype, torch.float32))
                    found[index] = part if not start else found[index].add_(part)
                    continue
                if not start:
                    shape = list(part.shape)
                    shape[at] = many
                    found[index] = part if rows == many else part.new_empty(shape)
                if rows != many:
                    found[index].narrow(at, start, rows).copy_(part)
            dtypes = [part.dtype if isinstance(part, torch.Tensor) else None for part in results]
            del results
        return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype != dtype else x for x, dtype in zip(found, dtypes))


def tile(module: fx.GraphModule, rows: Rows, part: Part, count: int, fewest: int = FEWEST) -> bool:
    """Put the part into a `Tiled` submodule of the graph module. False, and nothing is changed, where that would make a circle or a value
    that crosses the border does not hold its rows in a dimension of their own."""
    graph, mine = module.graph, set(part.nodes)
    wanted = [n for n in part.nodes if any(user not in mine for user in n.users) and not isinstance(meta.value(n), (tuple, list))]
    if any(isinstance(meta.value(n), (tuple, list)) and any(user not in mine for user in n.users) for n in part.nodes):
        return False
    given: dict[fx.Node, None] = {}
    for node in part.nodes:
        given.update({source: None for source in node.all_input_nodes if source not in mine})
    inputs: list[int | str | None] = []
    for source in given:
        val = meta.value(source)
        if isinstance(val, torch.SymInt):
            inputs.append("size" if proportion(val, rows.symbol) else None)
            continue
        at = rows.dim(source) if rows.dims(source) else None
        if at is not None and expression(val.shape[at]) != rows.symbol:
            return False
        inputs.append(at)
    outputs: list[int | None] = []
    for node in wanted:
        at = rows.dim(node) if rows.dims(node) else None
        if at is not None and expression(meta.tensor(node).shape[at]) != rows.symbol:
            return False
        outputs.append(at)
    if not any(isinstance(at, int) for at in inputs):
        return False
    order = {node: i for i, node in enumerate(graph.nodes)}
    reach = networkx.DiGraph()
    last = max(order[n] for n in part.nodes)
    for node in graph.nodes:
        key = "part" if node in mine else node
        reach.add_node(key, at=last if key == "part" else order[node])
        for source in node.all_input_nodes:
            start = "part" if source in mine else source
            if start != key:
                reach.add_edge(start, key)
    try:
        sequence = list(networkx.lexicographical_topological_sort(reach, key=lambda key: reach.nodes[key]["at"]))
    except networkx.NetworkXUnfeasible:
        return False
    body = fx.GraphModule(module, extract(graph, list(given), list(wanted)))
    put_module(module, f"tiled_{part.nodes[0].name}", Tiled(body, inputs, outputs, count, fewest), sequence, list(given), list(part.nodes), wanted)
    return True
