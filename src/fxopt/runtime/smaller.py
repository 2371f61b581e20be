"""A smaller call of the same kind, for checks: fewer samples, and a piece of each sequence."""

from __future__ import annotations

from collections.abc import Iterator

import sympy
import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.capture import Call
from fxopt.ir.index import static
from fxopt.ir.program import Program, ShapeGuards

SAMPLES = 2
POSITIONS = 16  # of a sequence, if nothing in the graph counts further


def smaller(program: Program, guards: ShapeGuards, call: Call, sequences: bool = True) -> Iterator[Call]:
    """Calls that a capture covers as it covers this one, cheapest first: the first samples, with the first or the last positions.

    A dimension is one of positions if it is the second one of a matrix of whole numbers (ids, masks, labels), and dynamic. What the
    graph compares positions with, or cuts sequences at (a window), stays inside the piece, unless it is beyond the call's own length.
    """
    samples = _samples(call)
    if sequences:
        for cut in _pieces(program, call):
            found = _cut(call, samples, cut)
            if _covered(guards, call, found):
                yield found
    if samples is not None:
        found = _cut(call, samples, {})
        if _covered(guards, call, found):
            yield found


def first_samples(call: Call) -> Call | None:
    """A call with the first samples only; None if it has no more, or its tensors' first dimensions differ."""
    samples = _samples(call)
    return None if samples is None else _cut(call, samples, {})


def on(part: Call, call: Call) -> str:
    """What a check ran on, for the report; nothing if that is the whole call."""
    return "" if part is call else f"; on sizes {', '.join(str(tuple(t.shape)) for t in part.tensors)}"


def _samples(call: Call) -> int | None:
    sizes = {t.shape[0] if t.dim() else 0 for t in call.tensors}
    return SAMPLES if len(sizes) == 1 and sizes.pop() > SAMPLES else None


def _covered(guards: ShapeGuards, call: Call, found: Call) -> bool:
    was, now = (guards.check(tuple(tuple(t.shape) for t in each.tensors)) for each in (call, found))
    return now == was


def _pieces(program: Program, call: Call) -> Iterator[dict[tuple[int, int], tuple[int, int]]]:
    """Ways to cut: (tensor, dimension) to (start, length)."""
    places: dict[sympy.Symbol, list[tuple[int, int]]] = {}
    fixed: set[sympy.Symbol] = set()
    wanted: set[sympy.Symbol] = set()
    for i, node in enumerate(program.placeholders):
        val = meta.tensor(node)
        for dim, size in enumerate(val.shape if val is not None else ()):
            expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
            if not isinstance(expr, sympy.Symbol):
                fixed |= expr.free_symbols
                continue
            places.setdefault(expr, []).append((i, dim))
            if dim == 0:
                fixed.add(expr)
            elif dim == 1 and val.dim() == 2 and not val.is_floating_point():
                wanted.add(expr)
    lengths = {}
    for symbol in wanted - fixed:
        size = call.tensors[places[symbol][0][0]].shape[places[symbol][0][1]]
        length = max([POSITIONS, *(2 + c for c in _counts(program) if c < size)])
        if 2 * length <= size:
            lengths[symbol] = size, length
    if lengths:
        for last in (False, True):
            yield {place: (size - length if last else 0, length) for symbol, (size, length) in lengths.items() for place in places[symbol]}


def _counts(program: Program) -> Iterator[int]:
    """The whole numbers that the graph computes with where it computes no floating-point number, and at which it cuts dynamic sizes."""
    for node in program.graph.nodes:
        val = meta.value(node)
        if node.op != "call_function" or isinstance(val, torch.Tensor) and val.is_floating_point() and not _cuts(node):
            continue
        for value in (*node.args[1:], *node.kwargs.values()):
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, int) and not isinstance(each, (bool, fx.Node)):
                    yield abs(each)


def _cuts(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    return static(meta.tensor(node.args[0]).shape[node.args[1] if len(node.args) > 1 else 0]) is None


def _cut(call: Call, samples: int | None, pieces: dict[tuple[int, int], tuple[int, int]]) -> Call:
    made: dict[int, torch.Tensor] = {}
    tensors = []
    for i, t in enumerate(call.tensors):
        if id(t) not in made:
            new = t.detach()
            for dim in range(t.dim()):
                if (i, dim) in pieces:
                    new = new.narrow(dim, *pieces[i, dim])
            made[id(t)] = (new if samples is None else new[:samples]).clone().requires_grad_(t.requires_grad)
        tensors.append(made[id(t)])
    return Call(call.spec, call.leaves, tuple(tensors))
