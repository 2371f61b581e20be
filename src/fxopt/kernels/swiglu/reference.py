"""SwiGLU in plain PyTorch, and the ways in which programs write it.

Shazeer, 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels.op import Bind, Pattern


def swiglu(gate, up):
    """Same arguments as `fxopt::swiglu`; returns (y,)."""
    return (F.silu(gate) * up,)


def _silu_up(gate, up):
    return F.silu(gate) * up


def _up_silu(gate, up):
    return up * F.silu(gate)


def _sigmoid_up(gate, up):
    return gate * torch.sigmoid(gate) * up


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
        arguments={"gate": Bind("gate"), "up": Bind("up")},
        check=_check,
    )
    for fn in (_silu_up, _up_silu, _sigmoid_up)
)
