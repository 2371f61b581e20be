"""Language-model head and cross entropy in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F

from fxopt.kernels.cross_entropy.reference import cross_entropy

PATTERNS = ()  # The shift, the flattening and the mask around it vary too much: a pass builds it.


def linear_cross_entropy(
    hidden,
    weight,
    bias,
    target,
    ignore_index,
    reduction,
    label_smoothing,
    softcap,
    logit_scale,
    z_loss,
    chunk,
    rows,
    grad_mask,
    statistics,
):
    """Same arguments as `fxopt::linear_cross_entropy`; returns (loss,). chunk, rows, grad_mask and statistics have no meaning here."""
    logits = F.linear(hidden, weight, bias)
    return cross_entropy(logits, target, ignore_index, reduction, label_smoothing, softcap, logit_scale, z_loss)
