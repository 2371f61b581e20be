"""Row space: which dimensions of a value hold the rows of a batch, and which operations keep rows apart.

A row is one token of one sequence. A value of the row space has a dimension for the sequences and one for the tokens of each
([batch, seq, hidden], [batch, heads, seq, width]), or one for all rows ([batch * seq, hidden]). Dimensions are counted from the
end. An operation keeps rows apart if row r of its value is computed from row r of what it reads, and from what is no row at all:
then it can be run on any choice of the rows. That is proven from the operation and its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import mutates
from fxopt.ir.index import full_arguments, static
from fxopt.torch_private import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    """Where the rows are.

    Attributes:
        seq: the dimension of the tokens of a sequence; without `batch`, of all rows.
        batch: the dimension of the sequences.
        start, stop: tokens that are cut off at the beginning and at the end of each sequence (the shift of a loss).
        sizes: without `batch`, how many sequences and tokens of each the rows are, if they are that.
    """

    seq: int
    batch: int | None = None
    start: int = 0
    stop: int = 0
    sizes: tuple[sympy.Expr, sympy.Expr] | None = field(default=None, compare=False)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of rows."""
        return (self.seq,) if self.batch is None else (self.batch, self.seq)

    def moved(self, to: Callable[[int], int]) -> Layout:
        """The same with other dimensions."""
        return replace(self, seq=to(self.seq), batch=None if self.batch is None else to(self.batch))


@dataclass(frozen=True)
class Step:
    """How an operation is run on a choice of rows.

    Attributes:
        layout: of its value; of each item where it has several (None: an item that holds no rows, or that nothing may read).
        how: "call" with the arguments put in their new form, "shape" with new sizes as well, "cut": not at all, since rows that
            a sequence loses are kept and not looked at.
        aligned: arguments that are no row values and line up with the rows by broadcasting.
    """

    layout: Layout | tuple[Layout | None, ...]
    how: str = "call"
    aligned: tuple[fx.Node, ...] = ()


class Mixed(Exception):
    """Why an operation does not keep rows apart."""


Of = Callable[[Any], Layout | None]
RowRule = Callable[[fx.Node, Of], Step]


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node reads, in order."""
    return [x for x in node.all_input_nodes if meta.tensors(x)]


def one_layout(node: fx.Node, of: Of) -> Layout:
    """The layout that all row values which the node reads have."""
    found = {layout for x in operands(node) if (layout := of(x)) is not None}
    if len(found) != 1:
        raise Mixed("it reads rows laid out in several ways" if found else "it reads no rows")
    return found.pop()


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise Mixed(why)


def pointwise(node: fx.Node, of: Of) -> Step:
    """Element by element, with broadcasting: what is no row value must line up with the rows or be the same for all."""
    layout = one_layout(node, of)
    for x in operands(node):
        val = meta.tensor(x)
        _need(of(x) is not None or val.dim() < -layout.seq or all(val.dim() < -d or known(val.shape[d]) for d in layout.dims), f"`{x.name}` has sizes of no known kind")
    return Step(layout, aligned=tuple(x for x in operands(node) if of(x) is None))


def known(size: Any) -> bool:
    """Whether a size can be that of rows: 1, or not fixed."""
    return static(size) in (1, None)


def per_row(*given: str, outputs: int = 1, last: int = 1) -> RowRule:
    """One row of each argument named, of equal layouts, gives one row of the value; the last dimensions are no rows, and all
    other arguments hold none. `outputs`: items that may be read, where there are several (0: the value is one tensor)."""

    def rule(node: fx.Node, of: Of) -> Step:
        arguments = full_arguments(node)
        rows = [arguments[name] for name in given if isinstance(arguments.get(name), fx.Node)]
        layout = next((found for x in rows if (found := of(x)) is not None), None)
        _need(layout is not None and layout.seq < -last, "it mixes the rows")
        shape = next(meta.tensor(x) for x in rows if of(x) is not None)
        _need(all(of(x) == layout or of(x) is None and meta.same_shape(meta.tensor(x), shape) for x in rows), "what should be rows of one layout is not")
        _need(all(of(x) is None for x in operands(node) if x not in rows), "what should be the same for all rows is a row")
        return Step(layout if outputs == 0 else (layout,) * outputs, aligned=tuple(x for x in rows if of(x) is None))

    return rule


def _dim(node: fx.Node, of: Of) -> Step:
    """Along one dimension or some, which are kept."""
    layout, given = one_layout(node, of), full_arguments(node)
    dims = given["dim"] if isinstance(given["dim"], list) else [given["dim"]]
    _need(not set(dims) & set(layout.dims), "it computes along the rows")
    return Step(layout)


def _reduced(node: fx.Node, of: Of) -> Step:
    given = full_arguments(node)
    step = _dim(node, of) if given.get("dim") not in (None, []) else None
    _need(step is not None, "it reduces all rows to one value")
    dims = given["dim"] if isinstance(given["dim"], list) else [given["dim"]]
    return step if given.get("keepdim") else Step(step.layout.moved(lambda d: d + sum(1 for r in dims if r > d)))


def _normalized(node: fx.Node, of: Of) -> Step:
    return per_row("input", outputs=0, last=len(full_arguments(node)["normalized_shape"]))(node, of)


def _matmul(node: fx.Node, of: Of) -> Step:
    given = full_arguments(node)
    x, y = given.get("self", given.get("mat1")), given.get("other", given.get("mat2"))
    layout = of(x)
    _need(layout is not None and layout.seq < -1, "it sums over the rows")
    if of(y) is None:
        _need(meta.tensor(y).dim() == 2, "it multiplies rows by a stack of matrices")
    else:
        _need(of(y) == layout and layout.seq < -2, "it multiplies rows by rows")
    return Step(layout)


def _addmm(node: fx.Node, of: Of) -> Step:
    given = full_arguments(node)
    layout = of(given["mat1"])
    _need(layout == Layout(-2) or (layout is not None and layout.seq == -2), "it sums over the rows")
    _need(of(given["self"]) is None and of(given["mat2"]) is None and meta.tensor(given["self"]).dim() == 1, "its bias or matrix holds rows")
    return Step(layout)


def _embedding(node: fx.Node, of: Of) -> Step:
    given = full_arguments(node)
    layout = of(given["indices"])
    _need(layout is not None and of(given["weight"]) is None, "it looks up in rows")
    return Step(layout.moved(lambda d: d - 1))


def _gathered(node: fx.Node, of: Of) -> Step:
    given = full_arguments(node)
    layout = of(given["self"])
    _need(layout is not None and of(given["index"]) == layout and given["dim"] not in layout.dims, "it gathers along the rows")
    return Step(layout)


def _unsqueeze(node: fx.Node, of: Of) -> Step:
    dim = full_arguments(node)["dim"]
    return Step(one_layout(node, of).moved(lambda d: d if d > dim else d - 1))


def _squeeze(node: fx.Node, of: Of) -> Step:
    layout, dim = one_layout(node, of), full_arguments(node)["dim"]
    _need(dim not in layout.dims, "it drops a dimension of rows")
    changed = meta.tensor(node).dim() < meta.tensor(node.args[0]).dim()
    return Step(layout.moved(lambda d: d + 1 if changed and d < dim else d))


def _permuted(node: fx.Node, of: Of) -> Step:
    layout, rank = one_layout(node, of), meta.tensor(node).dim()
    if node.target is aten.permute.default:
        order = [d % rank - rank for d in node.args[1]]
    else:
        order = list(range(-rank, 0))
        a, b = (node.args[1], node.args[2]) if node.target is aten.transpose.int else (0, 1)
        order[a], order[b] = order[b], order[a]
        order = [d % rank - rank for d in order]
    return Step(layout.moved(lambda d: order.index(d) - rank))


def _one_of(node: fx.Node, of: Of) -> Step:
    layout, dim = one_layout(node, of), full_arguments(node)["dim"]
    _need(dim not in layout.dims, "it takes one token of each sequence")
    return Step(layout.moved(lambda d: d + 1 if d < dim else d))


def _slice(node: fx.Node, of: Of) -> Step:
    layout, given = one_layout(node, of), full_arguments(node)
    if given["dim"] not in layout.dims:
        return Step(layout)
    _need(given["dim"] == layout.seq and layout.batch is not None, "it cuts the batch")
    start, stop = given["start"] or 0, given["end"]
    _need(isinstance(start, int) and start >= 0 and given["step"] == 1, "it takes some tokens of each sequence")
    _need(stop is None or isinstance(stop, int) and (stop < 0 or stop >= 1 << 31), "it cuts sequences at a length")
    return Step(replace(layout, start=layout.start + start, stop=layout.stop + (-stop if stop is not None and stop < 0 else 0)), "cut")


def _parts(node: fx.Node, of: Of) -> Step:
    layout, dim = one_layout(node, of), full_arguments(node)["dim"]
    _need(dim not in layout.dims, "it splits the rows")
    gone = 1 if node.target is aten.unbind.int else 0
    return Step((layout.moved(lambda d: d + gone if d < dim else d),) * len(meta.value(node)))


def _joined(node: fx.Node, of: Of) -> Step:
    layout, dim = one_layout(node, of), full_arguments(node)["dim"]
    _need(all(of(x) is not None for x in operands(node)), "it joins rows with what is none")
    if node.target is aten.stack.default:
        return Step(layout.moved(lambda d: d if d > dim else d - 1))
    _need(dim not in layout.dims, "it joins along the rows")
    return Step(layout)


def _expand(node: fx.Node, of: Of) -> Step:
    return Step(one_layout(node, of), "shape")


def expression(size: Any) -> sympy.Expr:
    """A size as an expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _product(sizes: Any) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*map(expression, sizes)))


def _view(node: fx.Node, of: Of) -> Step:
    """Rows stay where as many elements lie before and behind each of their dimensions as did."""
    layout = one_layout(node, of)
    old, new = list(meta.tensor(node.args[0]).shape), list(meta.tensor(node).shape)

    def place(sizes: list[Any], dims: tuple[int, ...]) -> tuple[sympy.Expr, sympy.Expr]:
        return _product(sizes[: dims[0] % len(sizes)]), _product(sizes[dims[-1] % len(sizes) + 1:])

    dims, rows = layout.dims, _product(old[d] for d in layout.dims)
    together = len(dims) == 1 or dims[1] == dims[0] + 1
    pair = layout.sizes if layout.batch is None else tuple(expression(old[d]) for d in dims)
    for d in range(-len(new), 0) if together else ():
        if pair is not None and d < -1 and (expression(new[d]), expression(new[d + 1])) == pair and place(new, (d, d + 1)) == place(old, dims):
            return Step(replace(layout, seq=d + 1, batch=d), "shape")
        if _product([new[d]]) == rows and place(new, (d,)) == place(old, dims):
            return Step(replace(layout, seq=d, batch=None, sizes=pair), "shape")
    found = [next((d for d in range(-len(new), 0) if expression(new[d]) == expression(old[x]) and place(new, (d,)) == place(old, (x,))), None) for x in dims]
    if None not in found and len(dims) == 2:
        return Step(replace(layout, seq=found[1], batch=found[0]), "shape")
    raise Mixed("it does not keep the rows in dimensions of their own")


ROW_RULES: Mapping[Any, RowRule] = {
    **{op: pointwise for op in (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
                                aten.dropout.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.zeros_like.default, aten.ones_like.default,
                                aten.type_as.default, aten.silu.default, aten.gelu.default, aten.relu.default, aten.where.ScalarOther, aten.where.ScalarSelf)},
    **{op: _dim for op in (aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default, aten.cumsum.default)},
    **{op: _reduced for op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default, aten.argmax.default,
                               aten.sum.default, aten.mean.default, aten.linalg_vector_norm.default, aten.var.correction)},
    aten.linear.default: per_row("input", outputs=0), aten.matmul.default: _matmul, aten.mm.default: _matmul, aten.addmm.default: _addmm,
    aten.layer_norm.default: _normalized, aten.rms_norm.default: _normalized, aten.embedding.default: _embedding, aten.gather.default: _gathered,
    aten.unsqueeze.default: _unsqueeze, aten.squeeze.dim: _squeeze, aten.permute.default: _permuted, aten.transpose.int: _permuted,
    aten.t.default: _permuted, aten.select.int: _one_of, aten.slice.Tensor: _slice,
    **{op: _parts for op in (aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)},
    aten.cat.default: _joined, aten.stack.default: _joined, aten.expand.default: _expand,
    **{op: _view for op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int)},
}


def step_of(node: fx.Node, of: Of, rules: Mapping[Any, RowRule]) -> Step:
    """How a node is run on a choice of rows.

    Args:
        of: the layout of a value; None for what holds no rows.
        rules: for operators that ATen has not.

    Raises:
        Mixed: it mixes rows, or nothing is known of it.
    """
    if mutates(node):
        raise Mixed("it writes into memory")
    rule = rules.get(node.target) or ROW_RULES.get(node.target)
    if rule is None and isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags:
        rule = pointwise
    if rule is None:
        raise Mixed(f"nothing is known of {node.target}")
    return rule(node, of)
