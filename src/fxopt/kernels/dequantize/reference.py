"""Dequantization in plain PyTorch: each format's own reference."""

from __future__ import annotations

from fxopt.kernels.formats import named


def dequantize(base, format, shape, dtype):
    """Same arguments as `fxopt::dequantize`; returns (weight,)."""
    return (named(format).reference(base, shape, dtype),)
