"""GeGLU in plain PyTorch, and the ways in which programs write it.

Shazeer, 2020, https://arxiv.org/abs/2002.05202; the tanh form: Hendrycks and Gimpel, 2016,
https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fxopt.kernels.op import Bind, Pattern


def geglu(gate, up, approximate):
    """Same arguments as `fxopt::geglu`; returns (y,).

    fp64 is the truth that others are compared with. It must not cancel, as 1 + erf(x) and 1 + tanh(x) do where both are near 0.
    """
    if gate.dtype != torch.float64:
        return (F.gelu(gate, approximate=approximate) * up,)
    if approximate == "none":
        return (gate * 0.5 * torch.erfc(gate * -math.sqrt(0.5)) * up,)
    return (gate * torch.sigmoid(math.sqrt(8.0 / math.pi) * (gate + 0.044715 * gate**3)) * up,)


def _erf(gate, up):
    return F.gelu(gate) * up


def _erf_swapped(gate, up):
    return up * F.gelu(gate)


def _tanh(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def _tanh_swapped(gate, up):
    return up * F.gelu(gate, approximate="tanh")


def _erf_spelled(gate, up):
    return gate * 0.5 * (1.0 + torch.erf(gate / math.sqrt(2.0))) * up


def _tanh_spelled(gate, up):
    inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))
    return 0.5 * gate * (1.0 + torch.tanh(inner)) * up


def _check(bound):
    gate, up = bound["gate"], bound["up"]
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ"
    return None


PATTERNS = tuple(
    Pattern(
        name=fn.__name__.lstrip("_"),
        fn=fn,
        inputs={name: ((3, 5, 22), torch.float32) for name in ("gate", "up")},
        arguments={"gate": Bind("gate"), "up": Bind("up"), "approximate": approximate},
        check=_check,
    )
    for fn, approximate in (
        (_erf, "none"),
        (_erf_swapped, "none"),
        (_tanh, "tanh"),
        (_tanh_swapped, "tanh"),
        (_erf_spelled, "none"),
        (_tanh_spelled, "tanh"),
    )
)
