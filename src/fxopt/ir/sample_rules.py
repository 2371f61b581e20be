"""What each operator does to samples: see `ir.samples`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import random
from fxopt.ir.index import static
from fxopt.ir.samples import CONSTANT, Counted, Free, Mixed, Rows, Samples, State, Total, operator_name

Given = dict[str, Any]
Rule = Callable[[Samples, fx.Node, Given], State]
RULES: dict[str, Rule] = {}

_KEEPING = ("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the names of operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def nodes_in(value: Any) -> list[fx.Node]:
    """The nodes in an argument."""
    if isinstance(value, fx.Node):
        return [value]
    return [node for item in value for node in nodes_in(item)] if isinstance(value, (list, tuple)) else []


def rank_of(node: fx.Node) -> int:
    val = meta.tensor(node)
    return val.dim() if val is not None else 0


def is_data(samples: Samples, node: fx.Node, sources: Sequence[fx.Node] | None = None) -> bool:
    return not random(node) and all(getattr(samples[s], "data", True) for s in (node.all_input_nodes if sources is None else sources))


def crosses(node: fx.Node) -> Mixed:
    return Mixed(node, f"`{operator_name(node)}` is taken over the samples")


def _dims(node: fx.Node, given: Given, rank: int) -> list[int]:
    """The dimensions that an operator works along, from the end; all if it names none."""
    dims = given.get("dim", given.get("dims"))
    found = list(range(-rank, 0)) if dims is None or dims == [] else list(dims) if isinstance(dims, (list, tuple)) else [dims]
    return [dim - rank if dim >= 0 else dim for dim in found]


def free_along(node: fx.Node, dim: int) -> bool:
    """Whether a value has no extent in a dimension."""
    val = meta.tensor(node)
    return val is None or val.dim() < -dim or static(val.shape[dim]) == 1


# -- element by element --------------------------------------------------------------------------------------------------


@rule("pointwise", *_KEEPING, "dropout", "where", "masked_fill", "silu", "gelu", "relu", "relu6", "elu", "selu", "celu", "leaky_relu", "hardtanh", "hardswish",
      "softplus", "mish", "log_sigmoid", "copy", "fill", "zero", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli",
      "nan_to_num", "lerp", "prelu", "native_dropout", "alpha_dropout", "feature_dropout", "one_minus", "isin", "bucketize", "logit", "square", "rsub")
def pointwise(samples: Samples, node: fx.Node, given: Given) -> State:
    """Each element of the value depends on the elements at its place."""
    sources = [s for s in node.all_input_nodes if not isinstance(samples[s], Free)]
    rows = [s for s in sources if isinstance(samples[s], Rows)]
    if not rows:
        return _of_totals(samples, node, sources)
    found = [samples[s] for s in rows]
    name, first = operator_name(node), found[0]
    if any((state.dim, state.over, state.under, state.order) != (first.dim, first.over, first.under, first.order) for state in found):
        return Mixed(node, f"`{name}` brings samples of different places together")
    for other in node.all_input_nodes:
        if isinstance(samples[other], Free) and not free_along(other, first.dim):
            return Mixed(node, f"`{other.name}` has another value for each place in the batch")
    data = is_data(samples, node)
    totals = [s for s in sources if isinstance(samples[s], (Total, Counted))]
    if any(not getattr(samples[s], "data", True) for s in totals):
        return Mixed(node, f"each sample reads `{totals[0].name}`, which is taken over all samples")
    divided = [state.by for state in found if state.by is not None]
    if not totals and not divided:
        return replace(first, data=data, index=first.index and data)
    if totals and name in ("div", "true_divide") and len(node.args) == 2 and not divided and node.args[1] is totals[0] and len(rows) == 1 and rank_of(totals[0]) == 0:
        return replace(first, data=data, by=totals[0])
    if not totals and (name in (*_KEEPING, "neg") or (name == "mul" and len(divided) == 1 or name == "div" and node.args[0] in rows and len(rows) == 1)
                       or name in ("add", "sub") and len(set(divided)) == 1 and len(divided) == len(node.all_input_nodes)):
        return replace(first, data=data, by=divided[0])
    return Mixed(node, f"`{name}` of what is divided by a count is no longer a quotient by it")


def _of_totals(samples: Samples, node: fx.Node, sources: list[fx.Node]) -> State:
    """An operator on values that are taken over the samples, and on others that are the same for all batches."""
    name, states = operator_name(node), [samples[s] for s in sources]
    data = all(isinstance(s, Counted) or s.data for s in states) and is_data(samples, node)  # type: ignore[union-attr]
    free = [s for s in node.all_input_nodes if s not in sources]
    linear = _linear(samples, node, name, sources, free)
    if linear is not None:
        return linear
    return Counted() if data else Mixed(node, f"`{name}` of what is taken over the samples is no longer a sum over them")


def _linear(samples: Samples, node: fx.Node, name: str, sources: list[fx.Node], free: list[fx.Node]) -> State | None:
    """The sum of terms that a linear operator gives; None where it gives none."""
    left = node.args[0] if node.args else None
    right = node.args[1] if len(node.args) > 1 else None
    a, b = (samples[x] if isinstance(x, fx.Node) else Free() for x in (left, right))
    data = is_data(samples, node)
    if name in (*_KEEPING, "neg") and isinstance(a, Total):
        return replace(a, data=data)
    if name in ("add", "sub") and isinstance(a, Total | Free) and isinstance(b, Total | Free):
        terms = frozenset().union(*(s.terms for s in (a, b) if isinstance(s, Total)))
        constant = isinstance(a, Free) or isinstance(b, Free)
        trains = any(isinstance(s, Free) and s.grad for s in (a, b))
        if constant and data:
            return None  # a number more, once for each batch: no sum over the samples
        return Total(terms | {CONSTANT} if trains else terms, data)
    if name == "mul" and (isinstance(a, Total) and isinstance(b, Free) or isinstance(a, Free) and isinstance(b, Total)):
        return Total((a if isinstance(a, Total) else b).terms, data)  # type: ignore[union-attr]
    if name in ("div", "true_divide") and isinstance(a, Total) and len(node.args) == 2 and not node.kwargs:
        if isinstance(b, Free):
            return Total(a.terms, data)
        if getattr(b, "data", True) and isinstance(right, fx.Node):
            if a.data and not (isinstance(b, Total) and b.terms == {None}) or a.terms - {None} or rank_of(right) > 0:
                return None
            return Total(frozenset({right}), data)
    return None


def looked_up(samples: Samples, node: fx.Node, index: fx.Node, dim: int) -> State:
    """Free values looked up at the indices of samples, which take the place of dimension `dim`."""
    state = samples[index]
    if not isinstance(state, Rows):
        return Mixed(node, "what is looked up depends on the place of a sample in the batch")
    return Rows(state.dim + dim + 1, state.over, state.under, is_data(samples, node))


# -- the same elements in another shape ----------------------------------------------------------------------------------


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as")
def reshape(samples: Samples, node: fx.Node, given: Given) -> State:
    """All elements in their order."""
    source = node.args[0]
    state = samples[source]
    return samples.reshaped(node, source, state) if isinstance(state, Rows) else state


@rule("permute", "transpose", "t", "numpy_T", "swapaxes", "swapdims", "movedim", "mT", "adjoint")
def permute(samples: Samples, node: fx.Node, given: Given) -> State:
    """The dimensions in another order."""
    source = node.args[0]
    state, rank, name = samples[source], rank_of(source), operator_name(node)
    if not isinstance(state, Rows):
        return state
    order = list(range(rank))
    if name == "permute":
        order = [dim % rank for dim in node.args[1]]
    elif name in ("transpose", "swapaxes", "swapdims"):
        a, b = (dim % rank for dim in node.args[1:3])
        order[a], order[b] = b, a
    elif name in ("mT", "adjoint"):
        order[-1], order[-2] = order[-2], order[-1]
    elif name in ("t", "numpy_T"):
        order.reverse()
    else:
        return Mixed(node, f"whether `{name}` keeps samples apart is not known")
    return replace(state, dim=order.index(state.dim % rank) - rank)


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def made(samples: Samples, node: fx.Node, given: Given) -> State:
    """A new value, of which only the shape is given."""
    return samples.spread(node, is_data(samples, node))


@rule("expand", "expand_as", "broadcast_to")
def expand(samples: Samples, node: fx.Node, given: Given) -> State:
    """Dimensions of size 1 repeated; what is the same for all samples may be repeated for each."""
    state = samples[node.args[0]]
    if isinstance(state, Free):
        made = samples.spread(node, state.data)
        return replace(made, grad=state.grad) if isinstance(made, Free) else made
    if not isinstance(state, Rows) and any(map(samples.holds_batch, meta.tensor(node).shape)):
        return Mixed(node, "it repeats for each sample what is taken over all samples")
    return state


@rule("repeat")
def repeat(samples: Samples, node: fx.Node, given: Given) -> State:
    """Whole dimensions repeated."""
    state, times = samples[node.args[0]], node.args[1]
    return Mixed(node, "it repeats the batch") if isinstance(state, Rows) and times[state.dim] != 1 else state


@rule("repeat_interleave")
def repeat_interleave(samples: Samples, node: fx.Node, given: Given) -> State:
    """Each element of a dimension repeated."""
    state = samples[node.args[0]]
    kept = isinstance(given.get("repeats"), int) and isinstance(given.get("dim"), int)
    return state if not isinstance(state, Rows) or (kept and given["dim"] != state.dim) else Mixed(node, "it repeats samples")


@rule("select", "unbind")
def select(samples: Samples, node: fx.Node, given: Given) -> State:
    """One element of a dimension."""
    state = samples[node.args[0]]
    if not isinstance(state, Rows):
        return state
    dim = given["dim"]
    return Mixed(node, "it takes single samples") if dim == state.dim else replace(state, dim=state.dim + (dim > state.dim))


@rule("slice", "narrow", "split", "chunk", "split_with_sizes", "index_select", "flip", "roll", "softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod",
      "logcumsumexp", "sort", "argsort", "topk", "glu", "softmin", "tensor_split", "diff")
def along(samples: Samples, node: fx.Node, given: Given) -> State:
    """Works along some dimensions, which stay."""
    source = node.args[0]
    state, name = samples[source], operator_name(node)
    if isinstance(state, Free) and name == "index_select":
        return looked_up(samples, node, given["index"], given["dim"])
    others = [s for s in node.all_input_nodes[1:] if meta.tensor(s) is not None and not isinstance(samples[s], Free)]
    if others:
        return Mixed(node, f"`{name}` reads `{others[0].name}` of the samples")
    if not isinstance(state, Rows):
        linear = isinstance(state, Total) and name in ("slice", "narrow", "split", "chunk", "split_with_sizes", "index_select", "flip", "roll", "unbind")
        return state if linear else _of_totals(samples, node, [source])
    if name == "slice" and state.dim == given["dim"] and _whole(samples, given, meta.tensor(source).shape[state.dim]):
        return state
    dims = _dims(node, given, rank_of(source))
    if state.dim in dims:
        return Mixed(node, "it takes some of the samples") if name in ("slice", "narrow", "split", "chunk", "index_select") else crosses(node)
    return replace(state, data=is_data(samples, node))


def _whole(samples: Samples, given: Given, size: Any) -> bool:
    end = given.get("end")
    ends = end is None or isinstance(end, int) and end >= 2**62 or isinstance(end, fx.Node) and samples.same_size(meta.value(end), size)
    return given.get("start") in (None, 0) and given.get("step", 1) == 1 and ends


@rule("tril", "triu")
def triangle(samples: Samples, node: fx.Node, given: Given) -> State:
    """By place in the last two dimensions."""
    state = samples[node.args[0]]
    return crosses(node) if isinstance(state, Rows) and state.dim >= -2 else state


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pad(samples: Samples, node: fx.Node, given: Given) -> State:
    """The last dimensions made longer."""
    state, pads = samples[node.args[0]], node.args[1]
    return Mixed(node, "it makes the batch longer") if isinstance(state, Rows) and len(pads) // 2 >= -state.dim and any(pads[2 * -state.dim - 2:2 * -state.dim]) else state


@rule("cat", "concat", "stack")
def join(samples: Samples, node: fx.Node, given: Given) -> State:
    """Several values in one."""
    sources, name = nodes_in(given["tensors"]), operator_name(node)
    states = [samples[s] for s in sources]
    data = is_data(samples, node)
    if all(isinstance(s, Total | Free) for s in states):
        if data and any(isinstance(s, Free) for s in states):
            return Counted()
        terms = frozenset().union(*(s.terms for s in states if isinstance(s, Total)))
        trains = any(isinstance(s, Free) and s.grad for s in states)
        return Total(terms | {CONSTANT} if trains else terms, data)
    first = states[0]
    same = all(isinstance(s, Rows) and (s.dim, s.over, s.under, s.by) == (first.dim, first.over, first.under, first.by) for s in states)  # type: ignore[union-attr]
    if not same:
        return Mixed(node, f"`{name}` brings samples of different places together")
    dim = given["dim"] - rank_of(node) if given["dim"] >= 0 else given["dim"]
    if name == "stack":
        return replace(first, dim=first.dim - (dim >= first.dim), data=data)  # type: ignore[union-attr]
    return Mixed(node, "it puts batches behind each other") if dim == first.dim else replace(first, data=data)  # type: ignore[union-attr]


# -- sums over dimensions ------------------------------------------------------------------------------------------------


@rule("sum", "mean", "amax", "amin", "any", "all", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm", "argmax", "argmin",
      "max", "min", "median", "count_nonzero", "nansum", "nanmean", "mode", "kthvalue")
def reduce(samples: Samples, node: fx.Node, given: Given) -> State:
    """Dimensions taken together."""
    source, name = node.args[0], operator_name(node)
    state, rank = samples[source], rank_of(source)
    if name in ("max", "min") and "other" in given:
        return pointwise(samples, node, given)
    if isinstance(state, Total):
        return replace(state, data=is_data(samples, node)) if name in ("sum", "mean") else _of_totals(samples, node, [source])
    if not isinstance(state, Rows):
        return state
    dims = _dims(node, given, rank)
    if state.dim not in dims:
        if state.by is not None and name not in ("sum", "mean"):
            return Mixed(node, f"`{name}` of what is divided by a count is no longer a quotient by it")
        return replace(state, dim=state.dim + (0 if given.get("keepdim") else sum(dim > state.dim for dim in dims)), data=is_data(samples, node))
    if name == "sum" or name == "count_nonzero" and state.by is None:
        return Total(frozenset({state.by}), is_data(samples, node))
    if name == "mean" and state.by is None:
        size = samples.elements(meta.tensor(source).shape[dim] for dim in dims)
        return Total(frozenset({size}), is_data(samples, node))
    return crosses(node)
