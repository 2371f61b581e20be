"""A residual add and the LayerNorm of its result, in plain PyTorch.

Layer normalization: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450. The op has no patterns: a program's norm is
found first, whatever its form, and the add in front of it by data flow (`passes/residual.py`).
"""

from __future__ import annotations

from fxopt.kernels.layer_norm.reference import layer_norm


def add_layer_norm(x, residual, weight, bias, eps):
    """Same arguments as `fxopt::add_layer_norm`; returns (y, sum)."""
    total = x + residual
    return *layer_norm(total, weight, bias, eps), total
