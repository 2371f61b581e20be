"""Language-model head and cross entropy in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels.dtypes import wide

PATTERNS = ()  # The shift, the flattening and the mask around it vary too much: a pass builds it.


def linear_cross_entropy(
    hidden, weight, bias, target, ignore_index, reduction, label_smoothing, softcap, logit_scale, chunk, grad_mask
):
    """Same arguments as `fxopt::linear_cross_entropy`; returns (loss,). chunk and grad_mask have no
    meaning here."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits.to(wide(logits.dtype)).flatten(0, -2),
        target.flatten(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return (loss.view(target.shape) if reduction == "none" else loss,)
