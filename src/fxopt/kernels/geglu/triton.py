"""GeGLU on a GPU: the gated kernels of `swiglu`, with another activation."""

from __future__ import annotations

from fxopt.kernels.geglu.body import check
from fxopt.kernels.swiglu.triton import launch_backward, launch_forward

_KINDS = {"none": "erf", "tanh": "tanh"}


def forward(gate, up, approximate):
    """`body.forward`, rounded once."""
    check(gate, up, approximate)
    return launch_forward(gate, up, _KINDS[approximate])


def backward(dy, gate, up, approximate, output_mask):
    """`body.backward`, rounded once."""
    return launch_backward(dy, gate, up, _KINDS[approximate], output_mask)
