"""Cross entropy of logits in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels.dtypes import wide

PATTERNS = ()  # The casts, the cap and the flattening around it vary too much: a pass builds it.


def cross_entropy(logits, target, ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss):
    """Same arguments as `fxopt::cross_entropy`; returns (loss,)."""
    logits = logits.to(wide(logits.dtype)) * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    rows, labels = logits.flatten(0, -2) if logits.dim() > 1 else logits.unsqueeze(0), target.reshape(-1)
    loss = F.cross_entropy(
        rows, labels, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss:
        loss = loss + z_loss * _square_of_lse(rows, labels != ignore_index, reduction)
    return (loss.view(target.shape) if reduction == "none" else loss,)


def _square_of_lse(rows, kept, reduction):
    """The z-loss (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, section 5), reduced over the rows kept."""
    squares = torch.where(kept, rows.logsumexp(1).square(), 0.0)
    if reduction == "none":
        return squares
    return squares.sum() / kept.sum() if reduction == "mean" else squares.sum()
