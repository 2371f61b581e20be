"""The norms of an adapted weight's rows in plain PyTorch."""

from __future__ import annotations

from fxopt.kernels.formats import named


def dora_norm(base, format, shape, lora_a, lora_b, scale, transposed):
    """Same arguments as `fxopt::dora_norm`; returns (norm,)."""
    weight = named(format).reference(base, shape, lora_a.dtype)
    delta = lora_b @ lora_a
    return (((weight.t() if transposed else weight) + scale * delta).norm(dim=1),)
