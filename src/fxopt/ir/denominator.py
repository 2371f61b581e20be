"""What the loss of a program is the mean of.

The loss of a batch is N / D: N a sum over the samples, D a count that the inputs alone decide. Of a batch that is given in parts b,

    loss = sum_b N_b / D = sum_b (D_b / D) * loss_b,    D = f(sum_b C_b),    D_b = f(C_b)

where the C are sums over the samples (numbers of labels, sizes of the batch) and f is what the program makes of them (often
nothing; else a clamp, an epsilon). So the gradient of the whole is the sum of the gradients of the parts, each times D_b / D. In
floating point the weight is off by one rounding, its product with the loss by another, and the sum of n parts by n - 1: about
(n + 2) * eps of the sum of the parts' sizes, which is below 1e-12 in fp64 for up to thousands of parts. Nothing else differs but
the order of sums over rows, which the parts do in pieces.

That the parts may be taken apart at all, that is, that no sample has an influence on another, is proven from the operators: see
`ir.samples`. Where it cannot be, `derive` says why and where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx

from fxopt.errors import CallError
from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.index import arguments
from fxopt.ir.program import Program
from fxopt.ir.region_graph import extract
from fxopt.ir.sample_order import ordered
from fxopt.ir.sample_products import RULES
from fxopt.ir.samples import CONSTANT, Counted, Free, Mixed, Rows, Samples, Total, expression
from fxopt.torch_private import pytree

aten = torch.ops.aten
BY = "denominator"
_SHAPING = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default, aten.alias.default, aten.transpose.int,
                      aten.permute.default, aten.unsqueeze.default})


@dataclass(frozen=True)
class Underivable:
    """Why the loss has no denominator, and where."""

    reason: str
    where: str = ""


@dataclass(frozen=True, eq=False)
class Denominator:
    """A fact: the loss is a sum over the samples divided by a count.

    Attributes:
        counts: from the program's inputs to numbers that are sums over the samples.
        sizes: further such numbers, made of the sizes of the inputs. equal: names of such sizes that are the same, see `equal_sizes`.
        total: from those numbers, counts first, to what the sum is divided by; None: it is the only one of them, or 1 if there is none.
        formula: equal for denominators that are computed in the same way.
        text: in words.
    """

    counts: Program
    sizes: tuple[Any, ...]
    equal: Mapping[Any, Any]
    total: Program | None
    formula: str
    text: str
    seen: dict[Any, list[int]] = field(default_factory=dict, repr=False)  # what `sizes` are for inputs of these shapes

    def __str__(self) -> str:
        return f"loss = sum / {self.text}"

    def names(self) -> set[str]:
        """The slots that must be given to `measure` and `divisor`."""
        programs = [self.counts, *([self.total] if self.total is not None else [])]
        return {str(node.target) for program in programs for node in program.nodes if node.op == "get_attr" and node.target not in program.constants}

    def measure(self, inputs: Sequence[torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[int | float]:
        """The numbers of one batch, which are added over batches. One synchronization for each on a GPU."""
        with torch.no_grad():
            found = [value.item() for value in _values(self.counts, inputs, state)]
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self.seen:
            self.seen[shapes] = self._sizes(shapes)
        return found + self.seen[shapes]

    def _sizes(self, shapes: Sequence[torch.Size]) -> list[int]:
        bound: dict[sympy.Symbol, int] = {}
        for node, shape in zip(self.counts.placeholders, shapes):
            for symbol, size in zip(map(expression, meta.tensor(node).shape), shape):  # type: ignore[union-attr]
                symbol = expression(self.equal.get(symbol, symbol))
                if not isinstance(symbol, (int, sympy.Symbol)):
                    continue
                known = symbol if isinstance(symbol, int) else bound.setdefault(symbol, size)
                if known != size:
                    raise CallError(f"sizes of the inputs differ ({known} and {size}) that were equal in the call that was captured",
                                    where=str(self.counts.signature.names()), do="what the loss is the mean of is not known: give the count")
        return [int(sympy.sympify(size).subs(bound)) for size in self.sizes]

    def divisor(self, numbers: Sequence[int | float], state: Mapping[str, torch.Tensor]) -> float:
        """What the loss of batches with these numbers (of one, or added) is divided by."""
        if self.total is None:
            return float(numbers[0]) if numbers else 1.0
        given = [torch.tensor(number, dtype=val.dtype) if isinstance(val := meta.value(node), torch.Tensor) else number
                 for number, node in zip(numbers, self.total.placeholders)]
        with torch.no_grad():
            return float(_values(self.total, given, {name: tensor.cpu() for name, tensor in state.items()})[0])


def derive(program: Program) -> Denominator | Underivable:
    """The denominator of a program's loss; of a program that passes made, that of what they were given, which computes the same."""
    first = [each for each in program.history() if "canonical" in each.facts]
    source = first[-1] if first else list(program.history())[-1]
    edit = Edit(source, by=BY)  # a copy, for the nodes that count; it is dropped
    loss = find_loss(source, edit)
    if isinstance(loss, Underivable):
        return loss
    samples = Samples(edit.graph, edit.slots, edit.trainable, RULES, ordered)
    state = samples[loss]
    if isinstance(state, Mixed):
        return Underivable(state.reason, _place(state.node))
    if not isinstance(state, Total):
        what = "depends on no sample" if isinstance(state, Free) else "is no sum over the samples"
        return Underivable(f"the loss {what}", _place(loss))
    terms = {_key(term): term for term in (_counted(edit, samples, term) for term in state.terms - {CONSTANT})}
    if len(terms) > 1:
        return Underivable(f"the loss is a sum of terms that are divided by different counts: {', '.join(sorted(map(_said, terms.values())))}",
                           _place(loss))
    term = next(iter(terms.values()), None)
    if isinstance(samples.batch, int) and term is None:
        return Underivable("the program is captured for one batch size: a number in it may be the number of samples", _place(loss))
    try:
        return _built(edit, samples, term, constant=CONSTANT in state.terms, loss=loss)
    except _NotInputs as error:
        return Underivable(str(error.args[0]), _place(loss))


class _NotInputs(Exception):
    """A count is not made of inputs."""


def find_loss(program: Program, edit: Edit) -> fx.Node | Underivable:
    """The loss among the outputs: what is called so, or the only number that takes a gradient."""
    paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(edit.outputs))), program.signature.out_spec))[0]]
    reached = _trained(edit)
    numbers = [i for i, out in enumerate(edit.outputs) if isinstance(out, fx.Node) and out in reached and (val := meta.tensor(out)) is not None and val.dim() == 0]
    called = [i for i in numbers if i < len(paths) and len(paths[i]) == 1 and getattr(paths[i][0], "key", getattr(paths[i][0], "name", None)) == "loss"]
    found = called or numbers
    if len(found) == 1:
        return edit.outputs[found[0]]
    many = ", ".join(edit.outputs[i].name for i in numbers)
    return Underivable(f"the program returns several numbers that take a gradient: {many}" if numbers else "the program returns no number that takes a gradient")


def _trained(edit: Edit) -> set[fx.Node]:
    """The nodes whose value may take a gradient of a trained parameter."""
    found: set[fx.Node] = set()
    for node in edit.nodes:
        trains = node.op == "get_attr" and node.target in edit.slots and edit.slots[str(node.target)].kind == "parameter"
        floating = any(val.is_floating_point() or val.is_complex() for val in meta.tensors(node))
        if floating and (trains or node.op == "call_function" and node.target is not aten.detach.default and any(s in found for s in node.all_input_nodes)):
            found.add(node)
    return found


def _built(edit: Edit, samples: Samples, term: Any, *, constant: bool, loss: fx.Node) -> Denominator:
    """The denominator from what a term is divided by."""
    counts: list[fx.Node] = []
    sizes: list[Any] = []
    total, text = None, ""
    if term is None:
        text = "1 (it is a sum)"
    elif not isinstance(term, fx.Node):
        sizes, text = [term], f"{term} (all elements)"
    elif isinstance(samples[term], Total) and samples[term].data and samples[term].terms == {None}:
        counts, sizes = ([term], []) if meta.tensor(term) is not None else ([], [samples.size(meta.value(term))])
        text = _said(term)
    else:
        ends = _ends(samples, term)
        counts = [node for node in ends if meta.tensor(node) is not None]
        rest = [node for node in ends if meta.tensor(node) is None]
        sizes, text = [samples.size(meta.value(node)) for node in rest], _said(term)
        total = _program(edit, extract(edit.graph, [*counts, *rest], [term]))
    if constant and (total is not None or term is None):
        raise _NotInputs("a part of the loss is the same for every batch, and the weights of the parts of a batch do not add up to 1")
    graph = extract(edit.graph, [node for node in edit.nodes if node.op == "placeholder"], counts)
    found = _program(edit, graph)
    formula = "\n".join([*map(str, sizes), *(_formula(p.graph) for p in (found, total) if p is not None)])
    return Denominator(found, tuple(sizes), samples.equal, total, formula, text)


def _values(program: Program, inputs: Sequence[Any], state: Mapping[str, torch.Tensor]) -> list[Any]:
    """What the few nodes of a count give. As `Program.run`, without an interpreter: that takes 0.3 ms a batch more."""
    env: dict[fx.Node, Any] = dict(zip(program.placeholders, inputs))
    for node in program.graph.nodes:
        if node.op == "get_attr":
            env[node] = state[node.target] if node.target in state else program.constants[node.target]
        elif node.op == "call_function":
            if node.kwargs or any(isinstance(arg, (tuple, list)) for arg in node.args):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
            else:
                env[node] = node.target(*[env[arg] if isinstance(arg, fx.Node) else arg for arg in node.args])
    return [env[value] if isinstance(value, fx.Node) else value for value in program.outputs]


def _program(edit: Edit, graph: fx.Graph) -> Program:
    for node in graph.nodes:
        if node.op == "call_function" and any(isinstance(edit.source.constants.get(str(s.target)), torch.nn.Module) for s in node.all_input_nodes):
            raise _NotInputs(f"the count needs `{node.name}`, which calls a graph of its own")
    return edit.source.replace(graph=graph, facts=frozenset(), assumptions=(), log=(), parent=None)


def _formula(graph: fx.Graph) -> str:
    """A graph as text, without the names of nodes and of symbols for sizes."""
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    return "\n".join(f"{node.op} {node.target if node.op in ('call_function', 'get_attr') else ''} "
                     f"{fx.node.map_arg((node.args, tuple(node.kwargs.items())), lambda n: number[n])}" for node in graph.nodes)


def _counted(edit: Edit, samples: Samples, term: Any) -> Any:
    """The node of a count; that of a loss which takes its own mean is made: the labels that are not ignored, by the weights of their classes."""
    if not isinstance(term, fx.Node) or "target" not in (given := arguments(term)):
        return term
    target, weight = given["target"], given.get("weight")
    made = [edit.call(aten.ne.Scalar, (target, given.get("ignore_index", -100)), like=term)]
    if weight is not None:
        made.append(edit.call(aten.where.ScalarOther, (made[0], target, 0), like=term))
        made.append(edit.call(aten.index.Tensor, (weight, [made[1]]), like=term))
        made.append(edit.call(aten.mul.Tensor, (made[2], made[0]), like=term))
    made.append(edit.call(aten.sum.default, (made[-1],), like=term))
    for node in made:
        samples.visit(node)
    return made[-1]


def _key(term: Any) -> Any:
    """Equal for counts that are equal: what is summed up whole may lie in another shape and order, and be cast."""
    if not isinstance(term, fx.Node):
        return term
    if meta.tensor(term) is None or term.op != "call_function" or term.target is not aten.sum.default:
        return term
    inner, chain = term.args[0], []
    while isinstance(inner, fx.Node) and inner.op == "call_function":
        if inner.target in _SHAPING or inner.target is aten.to.dtype and meta.tensor(inner.args[0]).dtype is torch.bool:  # type: ignore[union-attr]
            pass
        elif len(inner.all_input_nodes) == 1 and torch.Tag.pointwise in getattr(inner.target, "tags", ()):
            chain.append((str(inner.target), str([arg for arg in inner.args if not isinstance(arg, fx.Node)]), str(inner.kwargs)))
        else:
            break
        inner = inner.args[0]
    return inner, tuple(chain)


def _ends(samples: Samples, term: fx.Node) -> list[fx.Node]:
    """The sums over samples that a count is made of, in the order in which they are met."""
    if meta.tensor(term) is not None and meta.tensor(term).dim() > 0:  # type: ignore[union-attr]
        raise _NotInputs(f"`{term.name}` has several elements: each part of the loss is divided by another count")
    found: dict[fx.Node, None] = {}
    waiting = [term]
    while waiting:
        node = waiting.pop()
        state = samples[node]
        val = meta.value(node)
        if isinstance(state, Free):
            if node.op == "call_function" and not state.data:
                raise _NotInputs(f"`{term.name}` is made of what is no input")
        elif isinstance(state, Total) and state.terms == {None} and (not isinstance(val, torch.Tensor) or val.dim() == 0):
            found[node] = None
        elif isinstance(state, Rows) or isinstance(val, torch.Tensor) and val.dim() > 0 or isinstance(state, Counted | Total) and not node.all_input_nodes:
            raise _NotInputs(f"`{node.name}`, of which the count `{term.name}` is made, is no sum over the samples")
        if node not in found:
            waiting += node.all_input_nodes
    return list(found)


def _said(term: Any) -> str:
    if term is None:
        return "1"
    return f"`{term.name}` ({meta.provenance(term)})" if isinstance(term, fx.Node) else f"{term} elements"


def _place(node: fx.Node) -> str:
    return f"{node.name}: {meta.provenance(node)}"
