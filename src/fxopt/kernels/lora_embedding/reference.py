"""An embedding with a low-rank adapter in plain PyTorch.

LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685; on embeddings as in the paper's code.
"""

from __future__ import annotations

import torch.nn.functional as F

PATTERNS = ()  # The adapter pass makes it, out of embeddings.


def lora_embedding(weight, ids, lora_a, lora_b, scale, padding_idx):
    """Same arguments as `fxopt::lora_embedding`; returns (y,)."""
    padding = padding_idx if padding_idx >= 0 else None
    low = F.embedding(ids, lora_a.t(), padding)
    return ((F.embedding(ids, weight, padding) + scale * F.linear(low, lora_b)).to(weight.dtype),)
