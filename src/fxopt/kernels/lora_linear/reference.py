"""Linear layers with low-rank adapters in plain PyTorch.

LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685; on a quantized base: Dettmers et al., 2023,
https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels import dropout as dropouts
from fxopt.kernels.formats import named
from fxopt.kernels.lora_linear.grouping import first_parts

PATTERNS = ()  # The adapter pass makes it, out of linear layers.


def lora_linear(x, bases, formats, shapes, biases, lora_a, lora_b, scales, transposed, dropout, seeds):
    """Same arguments as `fxopt::lora_linear`; returns (y of each sibling)."""
    ys = []
    places = [*first_parts(formats), len(bases)]
    for i, name in enumerate(formats):
        weight = named(name).reference(bases[places[i] : places[i + 1]], shapes[2 * i : 2 * i + 2], x.dtype)
        base = torch.matmul(x, weight if transposed else weight.t())
        base = base + biases[i] if biases else base
        kept = x.to(lora_a[i].dtype)
        if dropout:
            mask = dropouts.mask(seeds[i], x.shape[:-1].numel(), x.shape[-1], dropout, kept.dtype)
            kept = kept * mask.view(x.shape)
        low = F.linear(F.linear(kept, lora_a[i]), lora_b[i])
        ys.append((base + scales[i] * low).to(x.dtype))
    return tuple(ys)
