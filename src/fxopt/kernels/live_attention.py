"""`fxopt::live_attention`: attention of some rows of a batch to all keys of their own sequence.

The queries are rows as `live_rows` chooses them, one after the other. One segment of keys at a time is attended to by the queries that lie in it: no
padding, and never a score between two sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.library import Library, register_autograd, register_fake

from fxopt.errors import CheckError
from fxopt.kernels.dtypes import wide
from fxopt.kernels.op import NAMESPACE
from fxopt.kernels.packed_attention.runs import runs
from fxopt.kernels.packed_attention.torch_kernels import cpu_backward, cpu_forward, on_cpu
from fxopt.torch_private import FakeTensor

_LIBRARY = Library(NAMESPACE, "FRAGMENT")
for _schema in (
    "live_attention(Tensor query, Tensor key, Tensor value, Tensor place, Tensor real, Tensor? segments, Tensor? mask, float? scale, bool causal) -> (Tensor, Tensor)",
    "live_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor place, Tensor real, Tensor? segments, Tensor? mask, Tensor out, "
    "Tensor lse, float? scale, bool causal, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def live_attention(query, key, value, place, real, segments, mask, scale, causal):
    """softmax(scale q k^T + mask) v of the rows at `place`.

    Args:
        query: [1, heads, n, width], fp16, bf16, fp32 or fp64. key, value: [batch, kv heads, seq, width], dtype of query; kv heads divides heads.
        place: [n] int64, in order: where a query's row lies in the flattened [batch, seq]. real: [n] bool: not a row of none, whose result is 0.
        segments: [1 or batch, seq]: keys with equal numbers belong together, and a query sees those of its own place; None: a sequence each.
        mask: [1 or batch, 1 or heads, 1 or seq, seq], bool (may be seen) or floating point (added to the scores); None. With segments: None.
        scale: of the scores; None is 1 / sqrt(width). causal: a row does not see later ones.

    Returns:
        out: [1, heads, n, width of value]. lse: [1, heads, n], the log of the sum of the exponentials of a row's scores, fp32 (fp64 for fp64).

    Raises:
        CheckError: shapes that do not fit.

    Source: Dao et al., 2022, https://arxiv.org/abs/2205.14135 (the kernels and their backward).
    """
    _check(query, key, value, place, segments, mask)
    if (order := _order(segments)) is not None:
        turn, *args = _sorted(order, query, key, value, place, real, segments)
        found = live_attention(*args, mask, scale, causal)
        return tuple(torch.empty_like(x).index_copy_(2, turn, x) for x in found)
    out, lse = _fake(query, key, value, place, real, segments, mask, scale, causal)
    out.zero_(), lse.zero_()
    for row, keys, at, allowed, square in _pieces(query, key, place, real, segments, mask, causal):
        out[:, :, at], lse[:, :, at] = _attend(query[:, :, at], key[row, :, keys], value[row, :, keys], allowed, scale, square)
    return out, lse


def live_attention_backward(dout, query, key, value, place, real, segments, mask, out, lse, scale, causal, output_mask):
    """(dquery, dkey, dvalue), each None where the output mask is off."""
    if (order := _order(segments)) is not None:
        turn, *args = _sorted(order, query, key, value, place, real, segments)
        dout, out, lse = (x.index_select(2, turn) for x in (dout, out, lse))
        grads = live_attention_backward(dout, *args, mask, out, lse, scale, causal, output_mask)
        dquery, *others = grads
        return None if dquery is None else torch.empty_like(dquery).index_copy_(2, turn, dquery), *runs(segments).apart(*others)
    wanted = tuple(torch.zeros_like(x) for x in (query, key, value))
    for row, keys, at, allowed, square in _pieces(query, key, place, real, segments, mask, causal):
        parts = _pull(*(x[:, :, at] for x in (dout, query)), key[row, :, keys], value[row, :, keys], out[:, :, at], lse[:, :, at], allowed, scale, square)
        for grad, part, (here, tokens) in zip(wanted, parts, ((slice(None), at), (row, keys), (row, keys)), strict=True):
            grad[here, :, tokens] = part
    return tuple(grad if given else None for grad, given in zip(wanted, output_mask, strict=True))


def _check(query, key, value, place, segments, mask):
    batch, kv_heads, seq, width = key.shape
    fits = query.dim() == 4 and query.shape[0] == 1 and query.shape[3] == width and query.shape[1] % max(kv_heads, 1) == 0 and place.shape == query.shape[2:3]
    fits = fits and value.shape[:3] == key.shape[:3] and (segments is None or mask is None and segments.shape in ((1, seq), (batch, seq)))
    if not fits:
        shapes = ", ".join(f"{list(x.shape)}" for x in (query, key, value, place, *(x for x in (segments, mask) if x is not None)))
        raise CheckError(f"live_attention takes rows of queries, and the keys and values of whole sequences; got {shapes}")


def _pieces(query, key, place, real, segments, mask, causal) -> Iterator[tuple[slice, slice, slice, torch.Tensor | None, bool]]:
    """For each segment with queries: (row, keys, queries, what is added to the scores or None, whether a plain causal kernel does).

    Waits for the device once. In a dry run, which has no values, every sequence has an equal share of the queries.
    """
    batch, seq = key.shape[0], key.shape[2]
    count = query.shape[2]
    if isinstance(place, FakeTensor):
        share = max(count // max(batch, 1), 1)
        for row in range(min(batch, max(count // share, 1))):
            yield slice(row, row + 1), slice(0, seq), slice(row * share, (row + 1) * share), query.new_empty(1, 1, share, seq), False
        return
    rows, places = place[real].cpu() // max(seq, 1), place[real].cpu() % max(seq, 1)
    bounds = [(0, seq)] * batch if segments is None else _bounds(segments, batch)
    for row in range(batch):
        first, last = (int(x) for x in torch.searchsorted(rows, torch.tensor([row, row + 1])))
        here = places[first:last]
        edges = bounds[row]
        for start, stop in zip(edges, edges[1:]):
            low, high = (int(x) + first for x in torch.searchsorted(here, torch.tensor([start, stop])))
            if low == high:
                continue
            inside = here[low - first: high - first]
            square = causal and mask is None and high - low == stop - start
            end = int(inside[-1]) + 1 if causal else stop  # keys behind the last query are seen by none
            at, device = inside.to(key.device), key.device
            added = None if mask is None else _rows(mask[row if mask.shape[0] > 1 else 0], at)[None, :, :, start:end]
            if added is not None and added.dtype == torch.bool:
                added = torch.zeros(added.shape, dtype=query.dtype, device=device).masked_fill_(~added, -math.inf)
            if causal and not square:
                later = torch.arange(start, end, device=device)[None] > at[:, None]
                added = torch.zeros(later.shape, dtype=query.dtype, device=device)[None, None] if added is None else added.to(query.dtype)
                added = added.masked_fill(later, -math.inf)
            yield slice(row, row + 1), slice(start, end), slice(low, high), added, square


def _rows(mask: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return mask.index_select(1, at) if mask.shape[1] > 1 else mask.expand(-1, at.shape[0], -1)


def _bounds(segments: torch.Tensor, batch: int) -> list[tuple[int, ...]]:
    bounds = runs(segments).bounds
    return list(bounds) if len(bounds) == batch else [bounds[0]] * batch


def _order(segments: torch.Tensor | None) -> torch.Tensor | None:
    """The keys by segment, where those of one do not lie side by side."""
    return None if segments is None else runs(segments).order


def _sorted(order, query, key, value, place, real, segments):
    """(order of the queries, then the arguments up to `segments` with keys by segment and queries by the places that these have now)."""
    seq = key.shape[2]
    inverse = order.argsort(1).expand(key.shape[0], seq).flatten()
    moved = torch.where(real, place // seq * seq + inverse[place], key.shape[0] * seq)
    turn = moved.argsort(stable=True)
    keys, values = runs(segments).together(key, value)
    new = moved[turn].where(real[turn], 0)
    return turn, query.index_select(2, turn), keys, values, new, real[turn], segments.to(torch.int64).gather(1, order)


def _attend(query, key, value, added, scale, causal):
    if on_cpu(query, key, value):
        return cpu_forward(query, key, value, scale, causal, added)
    scores = _scores(query, key, added, scale, causal)
    out = scores.softmax(-1) @ _grouped(value, query)
    return out.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)


def _pull(dout, query, key, value, out, lse, added, scale, causal):
    """With P the probabilities: dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(P * dP)), dQ = scale dS K, dK = scale dS^T Q."""
    if on_cpu(query, key, value):
        return cpu_backward(dout, query, key, value, out, lse, scale, causal, added)
    kv_heads = key.shape[1]
    probabilities = _scores(query, key, added, scale, causal).softmax(-1)
    dwide, qwide = (x.to(lse.dtype).unflatten(1, (kv_heads, -1)) for x in (dout, query))
    dvalue = (probabilities.mT @ dwide).sum(2)
    dscores = dwide @ _grouped(value, query).mT
    dscores.sub_((dscores * probabilities).sum(-1, keepdim=True)).mul_(probabilities).mul_(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    return (dscores @ _grouped(key, query)).flatten(1, 2), (dscores.mT @ qwide).sum(2), dvalue


def _scores(query, key, added, scale, causal):
    """[1, kv heads, group, n, keys] in the accumulator's dtype."""
    scores = query.to(wide(query.dtype)).unflatten(1, (key.shape[1], -1)) @ _grouped(key, query).mT
    scores.mul_(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if added is not None:
        scores.add_(added.unsqueeze(2) if added.shape[1] == 1 else added.unflatten(1, (key.shape[1], -1)))
    return scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=key.device).triu_(1), -math.inf) if causal else scores


def _grouped(x, query):
    return x.to(wide(query.dtype)).unsqueeze(2)


def _fake(query, key, value, place, real, segments, mask, scale, causal):
    lse = query.new_empty(1, query.shape[2], query.shape[1], dtype=wide(query.dtype)).transpose(1, 2)
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2), lse


def _backward_fake(dout, query, key, value, place, real, segments, mask, out, lse, scale, causal, output_mask):
    return tuple(torch.empty_like(x) if wanted else None for x, wanted in zip((query, key, value), output_mask, strict=True))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, place, real, segments, mask, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, place, real, segments, mask, *output)


def _gradients(ctx: Any, dout: Any, dlse: Any) -> Any:
    query, key, value, place, real, segments, mask, out, lse = ctx.saved_tensors
    if dout is None:
        return (None,) * 9
    found = torch.ops.fxopt.live_attention_backward.default(dout, query, key, value, place, real, segments, mask, out, lse, ctx.scale, ctx.causal,
                                                            list(ctx.needs_input_grad[:3]))
    return *found, *(None,) * 6


_LIBRARY.impl("live_attention", live_attention, "CompositeExplicitAutograd")
_LIBRARY.impl("live_attention_backward", live_attention_backward, "CompositeExplicitAutograd")
register_fake(f"{NAMESPACE}::live_attention", _fake, lib=_LIBRARY)
register_fake(f"{NAMESPACE}::live_attention_backward", _backward_fake, lib=_LIBRARY)
register_autograd(f"{NAMESPACE}::live_attention", _gradients, setup_context=_setup, lib=_LIBRARY)
OVERLOAD = torch.ops.fxopt.live_attention.default
