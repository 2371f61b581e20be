"""What products, look-ups, normalizations and losses do to samples: see `ir.samples`."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.sample_rules import RULES, Given, free_along, crosses, is_data, looked_up, nodes_in, pointwise, rank_of, rule
from fxopt.ir.samples import Counted, Free, Mixed, Order, Rows, Samples, State, Total, operator_name

__all__ = ["RULES"]


# -- products ------------------------------------------------------------------------------------------------------------


@rule("matmul", "mm", "bmm", "linear", "addmm", "baddbmm", "mv", "dot", "bilinear")
def product(samples: Samples, node: fx.Node, given: Given) -> State:
    """Matrix products: samples stay apart where they lie in a dimension that is not summed over."""
    name = operator_name(node)
    operands = list(node.args[1:3]) if name in ("addmm", "baddbmm") else list(node.args[:2])
    added = [node.args[0]] if name in ("addmm", "baddbmm") else list(node.args[2:3]) if name == "linear" else []
    states, ranks = [samples[x] for x in operands], [rank_of(x) for x in operands]
    rank, places = rank_of(node), set()
    if any(isinstance(s, Total | Counted) for s in (*states, *(samples[x] for x in added))) or name in ("mv", "dot", "bilinear"):
        return Mixed(node, f"`{name}` reads what is taken over the samples")
    for which, (x, state) in enumerate(zip(operands, states)):
        if not isinstance(state, Rows):
            continue
        if name == "linear":
            if which == 1 or state.dim == -1:
                return _joins(node)
            places.add((state.dim, state.over, state.under))
            continue
        if 1 in ranks:
            return _joins(node)
        summed, kept = (-1, -2) if which == 0 else (-2, -1)
        if state.dim == summed:
            return _joins(node)
        places.add((kept if state.dim == kept else state.dim, state.over, state.under))
    places |= {(s.dim, s.over, s.under) for s in (samples[x] for x in added) if isinstance(s, Rows)}
    if len(places) != 1 or any(isinstance(s, Rows) and s.by is not None for s in states):
        return _joins(node)
    dim, over, under = places.pop()
    for x, state in zip(operands, states):
        beside = dim < -2 or (dim == -2 and name == "linear")
        if isinstance(state, Free) and beside and name != "linear" and not free_along(x, dim):
            return Mixed(node, f"`{x.name}` has another value for each place in the batch")
        if isinstance(state, Rows) and not beside and sum(isinstance(s, Rows) for s in states) > 1:
            return _joins(node)
    if any(isinstance(samples[x], Free) and not free_along(x, dim) for x in added) or -dim > rank:
        return _joins(node)
    orders = {s.order for s in states if isinstance(s, Rows)}
    return Rows(dim, over, under, is_data(samples, node), order=orders.pop() if len(orders) == 1 else None)


def _joins(node: fx.Node) -> Mixed:
    return Mixed(node, f"`{operator_name(node)}` multiplies different samples with each other")


@rule("einsum")
def einsum(samples: Samples, node: fx.Node, given: Given) -> State:
    """Samples stay apart where one letter of the result runs through them in every operand that has samples."""
    equation, operands = node.args[0].replace(" ", ""), nodes_in(node.args[1])
    if "." in equation or "->" not in equation:
        return Mixed(node, "whether `einsum` keeps samples apart is not known")
    inputs, result = equation.split("->")
    found = set()
    for letters, x in zip(inputs.split(","), operands):
        state = samples[x]
        if isinstance(state, Rows) and state.by is None:
            found.add((letters[state.dim], state.over, state.under))
        elif not isinstance(state, Free):
            return _joins(node)
    letter = next(iter(found))[0]
    shared = any(letter in letters and isinstance(samples[x], Free) for letters, x in zip(inputs.split(","), operands))
    twice = any(letters.count(letter) > 1 for letters in (*inputs.split(","), result))
    if len(found) != 1 or letter not in result or shared or twice:
        return _joins(node)
    return Rows(result.index(letter) - len(result), *next(iter(found))[1:], is_data(samples, node))


@rule("scaled_dot_product_attention")
def attention(samples: Samples, node: fx.Node, given: Given) -> State:
    """Queries, keys and values by the dimensions before the last two; the mask by broadcasting."""
    parts = [given[key] for key in ("query", "key", "value", "attn_mask") if isinstance(given.get(key), fx.Node)]
    states = [samples[x] for x in parts]
    if not all(isinstance(s, Rows) and s.dim < -2 and s.by is None for s in states[:3]):
        return Mixed(node, "samples attend to each other")
    places = {(s.dim, s.over, s.under) for s in states if isinstance(s, Rows)}
    if len(places) > 1 or any(not isinstance(s, Rows | Free) or (isinstance(s, Free) and not free_along(x, states[0].dim)) for x, s in zip(parts, states)):
        return Mixed(node, "samples attend to each other")  # type: ignore[union-attr]
    return replace(states[0], data=is_data(samples, node))


# -- by place or by index ------------------------------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
      "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d",
      "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_adaptive_avg_pool2d", "group_norm", "pixel_shuffle", "pixel_unshuffle")
def per_image(samples: Samples, node: fx.Node, given: Given) -> State:
    """The first dimension runs through images, which the operator treats one by one."""
    source, name = node.args[0], operator_name(node)
    state = samples[source]
    others = [s for s in node.all_input_nodes[1:] if meta.tensor(s) is not None and not isinstance(samples[s], Free)]
    batched = not name.startswith("conv") or rank_of(source) == rank_of(node.args[1])
    if others or not isinstance(state, Rows) or state.dim != -rank_of(source) or not batched or state.by is not None:
        return Mixed(node, f"`{name}` has samples elsewhere than in the first dimension")
    return replace(state, dim=-rank_of(node), data=is_data(samples, node))


@rule("layer_norm", "rms_norm")
def norm(samples: Samples, node: fx.Node, given: Given) -> State:
    """Statistics over the last dimensions."""
    state = samples[node.args[0]]
    last = len(given["normalized_shape"])
    if not isinstance(state, Rows) or -state.dim <= last or state.by is not None or any(not isinstance(samples[s], Free) for s in node.all_input_nodes[1:]):
        return crosses(node)
    return replace(state, data=is_data(samples, node))


@rule("batch_norm", "_batch_norm_impl_index", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional")
def batch_norm(samples: Samples, node: fx.Node, given: Given) -> State:
    """Statistics over the batch in training, those kept outside of it."""
    state = samples[node.args[0]]
    training = given.get("training", given.get("train", True))
    if training or given.get("running_mean") is None:
        return Mixed(node, "batch norm in training mode takes its statistics over the samples")
    return replace(state, data=is_data(samples, node)) if isinstance(state, Rows) and state.dim == -rank_of(node.args[0]) and state.by is None else crosses(node)


@rule("embedding")
def embedding(samples: Samples, node: fx.Node, given: Given) -> State:
    """A row of a table for each index."""
    if not isinstance(samples[given["weight"]], Free):
        return Mixed(node, "the table is made of the samples")
    return looked_up(samples, node, given["indices"], -2)


@rule("one_hot")
def one_hot(samples: Samples, node: fx.Node, given: Given) -> State:
    """One more dimension at the end."""
    state = samples[node.args[0]]
    return replace(state, dim=state.dim - 1) if isinstance(state, Rows) else Mixed(node, "`one_hot` of what is taken over the samples")


@rule("gather", "scatter", "scatter_add", "take_along_dim", "scatter_reduce")
def gather(samples: Samples, node: fx.Node, given: Given) -> State:
    """Along one dimension, at indices that each sample has for itself."""
    parts = [x for x in node.all_input_nodes if meta.tensor(x) is not None]
    states, dim = [samples[x] for x in parts], given.get("dim")
    first = states[0]
    same = all(isinstance(s, Rows) and (s.dim, s.over, s.under) == (first.dim, first.over, first.under) and s.by is None for s in states)  # type: ignore[union-attr]
    if not same or not isinstance(dim, int) or dim == first.dim or first.under != 1:  # type: ignore[union-attr]
        return Mixed(node, f"`{operator_name(node)}` looks up other samples")
    return replace(first, data=is_data(samples, node))


@rule("slice_scatter", "select_scatter")
def put_in(samples: Samples, node: fx.Node, given: Given) -> State:
    """A part of a value replaced by another value."""
    x, source, dim = node.args[0], node.args[1], given["dim"]
    state, other = samples[x], samples[source]
    if not isinstance(state, Rows) or state.by is not None or dim == state.dim:
        return Mixed(node, f"`{operator_name(node)}` puts single samples into what is of all")
    own = state.dim + (operator_name(node) == "select_scatter" and dim > state.dim)
    if isinstance(other, Free) and not free_along(source, own) or not isinstance(other, Free) and other != Rows(own, state.over, state.under, getattr(other, "data", True)):
        return Mixed(node, f"`{operator_name(node)}` puts other samples in")
    return replace(state, data=is_data(samples, node))


@rule("index", "_unsafe_index")
def index(samples: Samples, node: fx.Node, given: Given) -> State:
    """Indexing with tensors, behind leading whole dimensions."""
    x, indices = given["self"], list(given["indices"])
    at = [i for i, each in enumerate(indices) if each is not None]
    rank, state = rank_of(x), samples[x]
    known = [indices[i] for i in at]
    if any(meta.tensor(each).dtype in (torch.bool, torch.uint8) for each in known):
        return Mixed(node, "which rows are left is decided by the samples")
    if at != list(range(at[0], at[0] + len(at))) or not all(isinstance(samples[each], Free | Rows) for each in known) or getattr(state, "by", None) is not None:
        return Mixed(node, "whether indexing keeps samples apart is not known")
    behind = rank - at[-1] - 1  # dimensions of x that follow the indexed ones
    places = {(s.dim, s.over, s.under) for s in (samples[each] for each in known) if isinstance(s, Rows)}
    data = is_data(samples, node)
    if isinstance(state, Free) and len(places) == 1 and not any(getattr(samples[each], "index", False) for each in known):
        dim, over, under = places.pop()
        return Rows(dim - behind, over, under, data)
    if not isinstance(state, Rows):
        return Mixed(node, "what is looked up depends on the place of a sample in the batch")
    own = state.dim + rank
    wide = max(rank_of(each) for each in known)
    if own in at:  # each sample at its own place: x[arange(batch), ...]
        chosen = samples[indices[own]]
        if isinstance(chosen, Rows) and chosen.index and len(places) == 1 and (state.over, state.under) == (1, 1):
            return Rows(chosen.dim - behind, data=data)
        return Mixed(node, "it looks up other samples")
    if places:
        return Mixed(node, "it looks up other samples")
    return replace(state, dim=state.dim if own > at[-1] else state.dim + len(at) - wide, data=data)


@rule("arange")
def arange(samples: Samples, node: fx.Node, given: Given) -> State:
    """Counting; through the samples if it ends at their number."""
    val = meta.tensor(node)
    if val is None or not samples.holds_batch(val.shape[0]):
        return Free()
    plain = given.get("start", 0) in (0, None) and given.get("step", 1) == 1 and samples.size(val.shape[0]) == samples.batch
    return Rows(-1, index=True) if plain else Order(None, "counting") if given.get("start", 0) in (0, None) and given.get("step", 1) == 1 else Mixed(
        node, "it counts through something made of the samples")


# -- losses --------------------------------------------------------------------------------------------------------------


@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "soft_margin_loss", "poisson_nll_loss",
      "hinge_embedding_loss")
def elementwise_loss(samples: Samples, node: fx.Node, given: Given) -> State:
    """Element by element, then perhaps the mean of all, or the sum."""
    x, target = node.args[:2]
    state = pointwise(samples, node, given)
    if isinstance(state, Mixed) or given["reduction"] == 0:
        return state
    if not isinstance(state, Rows) or state.by is not None or not all(map(samples.same_size, meta.tensor(x).shape, meta.tensor(target).shape)) or rank_of(x) != rank_of(target):
        return Mixed(node, "input and target of the loss have different shapes")
    if given["reduction"] == 2:
        return Total(frozenset({None}), state.data)
    return Total(frozenset({samples.elements(meta.tensor(x).shape)}), state.data)


@rule("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
def class_loss(samples: Samples, node: fx.Node, given: Given) -> State:
    """A class for each row. The mean is over the rows with a label, each by the weight of its class: see `denominators`."""
    x, target, weight = given["self"], given["target"], given.get("weight")
    state, labels = samples[x], samples[target]
    classes = -1 if rank_of(x) < 2 else 1 - rank_of(x)
    if not isinstance(state, Rows) or not isinstance(labels, Rows) or state.dim == classes or state.by is not None or labels.by is not None:
        return Mixed(node, "logits or labels of the loss are not those of samples")
    soft = meta.tensor(target).is_floating_point()  # probabilities, of the shape of the logits
    if (state.dim, state.over, state.under) != (labels.dim - (not soft and state.dim < classes), labels.over, labels.under):
        return Mixed(node, "logits and labels of the loss are of different samples")
    if weight is not None and not (isinstance(samples[weight], Free) and samples[weight].data):
        return Mixed(node, "the weights of the classes are trained")
    data = is_data(samples, node)
    if given["reduction"] == 0:
        return Rows(state.dim + (state.dim < classes), state.over, state.under, data)
    if given["reduction"] == 2:
        return Total(frozenset({None}), data)
    if soft:
        shape = meta.tensor(target).shape
        return Total(frozenset({samples.elements([*shape[:classes], *(shape[classes + 1:] if classes != -1 else ())])}), data)
    if not labels.data:
        return Mixed(node, "which labels count is computed by the model")
    return Total(frozenset({node}), data)
