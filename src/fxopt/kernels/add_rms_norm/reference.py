"""A residual add and the RMSNorm of its result, in plain PyTorch.

Root mean square layer normalization: Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467. The op has no patterns: a
program's norm is found first, whatever its form, and the add in front of it by data flow (`passes/residual.py`).
"""

from __future__ import annotations

from fxopt.kernels.rms_norm.reference import rms_norm


def add_rms_norm(x, residual, weight, eps, offset, casting):
    """Same arguments as `fxopt::add_rms_norm`; returns (y, sum)."""
    total = x + residual
    return *rms_norm(total, weight, eps, offset, casting), total
