"""Packed attention as programs write it: a dense mask. The causal pass finds it by what the mask says, not by a pattern."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def packed_attention(query, key, value, segments, scale, causal):
    """Scaled dot product attention under a boolean mask [1 or batch, 1, seq, seq] of equal segments."""
    allowed = segments[:, None, :, None] == segments[:, None, None, :]
    if causal:
        seq = query.shape[-2]
        allowed = allowed & torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()
    grouped = query.shape[1] != key.shape[1]
    # torch's fast kernels want whole rows, which models have; without them this would measure another, plain one.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return (F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale, enable_gqa=grouped),)
