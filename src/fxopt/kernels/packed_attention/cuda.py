"""Packed attention on a GPU: all segments in one launch of torch's variable-length attention.

fxopt has no attention kernel of its own: torch's are as fast as the hardware. The first call with some segments waits for the
device: their number is a shape of what the kernel takes, and the longest one decides its grid. The other layers of the step do
not wait. For the same reason it cannot be captured in a CUDA graph, which would keep the segments of its capture. What that kernel does not take (fp32,
fp64, heads wider than 256 or not a multiple of 8) goes segment by segment, as on a CPU.
"""

from __future__ import annotations

import itertools

import torch

from fxopt.errors import CheckError
from fxopt.kernels.packed_attention import body, torch_kernels
from fxopt.kernels.packed_attention.runs import Runs, runs


def forward(query, key, value, segments, scale, causal):
    """As `body.forward`."""
    _refuse_capture(query)
    if not torch_kernels.varlen(query, value):
        return body.forward(query, key, value, segments, scale, causal)
    body.check(query, key, value, segments)
    batch, found = query.shape[0], runs(segments)
    out, lse = torch_kernels.varlen_forward(*map(_flat, found.together(query, key, value)), *_offsets(found, query), scale, causal)
    return tuple(found.apart(_batched(out, batch), lse.unflatten(1, (batch, -1)).transpose(0, 1)))


def backward(dout, query, key, value, segments, out, lse, scale, causal, output_mask):
    """As `body.backward`; the kernel makes all three gradients."""
    _refuse_capture(query)
    if not torch_kernels.varlen(query, value):
        return body.backward(dout, query, key, value, segments, out, lse, scale, causal, output_mask)
    batch, found = query.shape[0], runs(segments)
    *flat, lse = found.together(dout, query, key, value, out, lse)
    lse = lse.transpose(0, 1).flatten(1).contiguous()
    grads = torch_kernels.varlen_backward(*map(_flat, flat), lse, *_offsets(found, query), scale, causal)
    return tuple(found.apart(*(_batched(grad, batch) if wanted else None for grad, wanted in zip(grads, output_mask, strict=True))))


def _refuse_capture(query):
    if query.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise CheckError("packed_attention reads its segments on the host: a CUDA graph would keep those of its capture", do="call it outside of the graph")


def _flat(x):
    """[batch, heads, seq, width] as [tokens, heads, width]."""
    return x.transpose(1, 2).flatten(0, 1)


def _batched(x, batch):
    """[tokens, heads, width] as [batch, heads, seq, width]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _offsets(found: Runs, query):
    """(offsets int32, longest) of all runs of the batch in a row."""
    batch, seq = query.shape[0], query.shape[2]
    bounds = found.bounds * (batch // len(found.bounds))
    offsets = [row * seq + start for row, starts in enumerate(bounds) for start in starts[:-1]]
    lengths = [stop - start for starts in found.bounds for start, stop in itertools.pairwise(starts)]
    return torch.tensor([*offsets, batch * seq], dtype=torch.int32).to(query.device, non_blocking=True), max(lengths)
