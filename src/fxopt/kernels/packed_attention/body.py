"""Packed attention from torch's attention kernels: one segment after the other, never a matrix of all tokens by all tokens."""

from __future__ import annotations

import math

import torch

from fxopt.errors import CheckError
from fxopt.kernels.dtypes import wide
from fxopt.kernels.packed_attention import torch_kernels
from fxopt.kernels.packed_attention.runs import runs


def forward(query, key, value, segments, scale, causal):
    """Attention in which each token sees the tokens of its own segment: softmax(scale q k^T) v over those.

    Args:
        query: [batch, heads, seq, width], fp16, bf16, fp32 or fp64.
        key: [batch, kv heads, seq, width]; value: [batch, kv heads, seq, any width]; dtype of query. kv heads divides heads:
            each key serves as many queries in a row.
        segments: [1 or batch, seq], integer or bool: tokens with equal numbers belong together, wherever they stand.
        scale: of the scores; None is 1 / sqrt(width).
        causal: a token does not see later ones.

    Returns:
        out: [batch, heads, seq, width of value], stored as [batch, seq, heads, width]. lse: [batch, heads, seq], the log of the
        sum of the exponentials of a token's scores, fp32 (fp64 for fp64); kept for backward.

    Raises:
        CheckError: shapes that do not fit.

    Saved for backward: the arguments, out and lse. A segment costs time of its length squared. The kernels are torch's; where
    they do not take a call (values of another width; fp32 and fp64 on a GPU) plain products hold the scores of one segment.

    Source: Dao et al., 2022, https://arxiv.org/abs/2205.14135 (the kernels); Krell et al., 2021,
    https://arxiv.org/abs/2107.02027 (packing without contamination).
    """
    check(query, key, value, segments)
    out, lse = forward_fake(query, key, value, segments, scale, causal)
    found = runs(segments)
    query, key, value = found.together(query, key, value)
    for rows, tokens in found.pieces(query.shape[0]):
        out[rows, :, tokens], lse[rows, :, tokens] = _attend(*(x[rows, :, tokens] for x in (query, key, value)), scale, causal)
    return tuple(found.apart(out, lse))


def check(query, key, value, segments):
    """Raises where shapes do not fit."""
    batch, heads, seq, width = query.shape
    fits = key.shape[:1] == value.shape[:1] == (batch,) and key.shape[2:] == (seq, width) and value.shape[1:3] == key.shape[1:3]
    if not fits or heads % max(key.shape[1], 1) or segments.shape not in ((1, seq), (batch, seq)):
        shapes = ", ".join(f"{list(x.shape)}" for x in (query, key, value, segments))
        raise CheckError(f"packed_attention takes query, key and value of one length, and a segment for each token; got {shapes}")


def backward(dout, query, key, value, segments, out, lse, scale, causal, output_mask):
    """(dquery, dkey, dvalue), each None where the mask is off."""
    grads = backward_fake(dout, query, key, value, segments, out, lse, scale, causal, output_mask)
    found = runs(segments)
    dout, query, key, value, out, lse = found.together(dout, query, key, value, out, lse)
    for rows, tokens in found.pieces(query.shape[0]):
        parts = _pull(*(x[rows, :, tokens] for x in (dout, query, key, value, out, lse)), scale, causal)
        for grad, part in zip(grads, parts, strict=True):
            if grad is not None:
                grad[rows, :, tokens] = part
    return tuple(found.apart(*grads))


def _attend(query, key, value, scale, causal):
    """(out, lse) of one segment."""
    if torch_kernels.on_cpu(query, key, value):
        return torch_kernels.cpu_forward(query, key, value, scale, causal)
    scores = _scores(query, key, scale, causal)
    out = scores.softmax(-1) @ _grouped(value, query)
    return out.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)


def _pull(dout, query, key, value, out, lse, scale, causal):
    """The gradients of one segment. With P the probabilities: dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(P * dP)),
    dQ = scale dS K, dK = scale dS^T Q. A token alone has the probability 1, whatever its score."""
    kv_heads = key.shape[1]
    if query.shape[2] == 1:
        return torch.zeros_like(query), torch.zeros_like(key), dout.unflatten(1, (kv_heads, -1)).to(lse.dtype).sum(2)
    if torch_kernels.on_cpu(query, key, value):
        return torch_kernels.cpu_backward(dout, query, key, value, out, lse, scale, causal)
    probabilities = _scores(query, key, scale, causal).softmax(-1)  # exp(scores - lse) would round large scores twice
    dwide, qwide = (x.to(lse.dtype).unflatten(1, (kv_heads, -1)) for x in (dout, query))
    dvalue = (probabilities.mT @ dwide).sum(2)
    dscores = dwide @ _grouped(value, query).mT
    dscores.sub_((dscores * probabilities).sum(-1, keepdim=True)).mul_(probabilities).mul_(_factor(query, scale))
    return (dscores @ _grouped(key, query)).flatten(1, 2), (dscores.mT @ qwide).sum(2), dvalue


def _scores(query, key, scale, causal):
    """scale q k^T, [batch, kv heads, group, seq, seq] in the accumulator's dtype, -inf where a token may not look."""
    seq = query.shape[2]
    scores = query.to(wide(query.dtype)).unflatten(1, (key.shape[1], -1)) @ _grouped(key, query).mT
    scores.mul_(_factor(query, scale))
    if causal:
        scores.masked_fill_(torch.ones(seq, seq, dtype=torch.bool, device=query.device).triu_(1), -math.inf)
    return scores


def _grouped(x, query):
    """Keys or values for every query of their group, in the accumulator's dtype, [batch, kv heads, 1, seq, width]."""
    return x.to(wide(query.dtype)).unsqueeze(2)


def _factor(query, scale):
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _tokens_first(x, heads, width):
    """New memory [batch, heads, seq, width], stored as [batch, seq, heads, width]."""
    return x.new_empty(x.shape[0], x.shape[2], heads, width).transpose(1, 2)


def forward_fake(query, key, value, segments, scale, causal):
    lse = query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=wide(query.dtype)).transpose(1, 2)
    return _tokens_first(query, query.shape[1], value.shape[-1]), lse


def backward_fake(dout, query, key, value, segments, out, lse, scale, causal, output_mask):
    return tuple(_tokens_first(x, *x.shape[1::2]) if wanted else None for x, wanted in zip((query, key, value), output_mask, strict=True))


def setup_context(ctx, inputs, output):
    query, key, value, segments, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, segments, *output)
