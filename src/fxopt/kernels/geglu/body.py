"""GeGLU from ATen calls."""

from __future__ import annotations

import functools

import torch

from fxopt.errors import CheckError
from fxopt.kernels import gated

APPROXIMATIONS = ("none", "tanh")


def _activate(approximate, x, out):
    torch.ops.aten.gelu.out(x, approximate=approximate, out=out)


def _differentiate(approximate, grad, x, out):
    torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out)


def check(gate, up, approximate):
    """Raise CheckError unless `geglu` takes these."""
    if approximate not in APPROXIMATIONS:
        raise CheckError(f"geglu has no approximation {approximate!r}", do=f"use one of {', '.join(APPROXIMATIONS)}")
    gated.check(gate, up)


def forward(gate, up, approximate):
    """GeGLU: y = gelu(gate) * up.

    Args:
        gate, up: same shape [...] and dtype (fp16, bf16, fp32 or fp64), any strides.
        approximate: "none" for z * Phi(z) by erf, "tanh" for the tanh approximation.

    Returns:
        y: [...] in that dtype, contiguous; rounded after the activation and after the product, as in the plain form
        (on a GPU once, after both).

    Raises:
        CheckError, RuntimeError: unknown approximation, the dtypes, the shapes differ.

    Source: Shazeer, 2020, https://arxiv.org/abs/2002.05202.
    """
    check(gate, up, approximate)
    return gated.forward(gate, up, functools.partial(_activate, approximate))


def forward_fake(gate, up, approximate):
    check(gate, up, approximate)
    return gate.new_empty(gate.shape)


def backward(dy, gate, up, approximate, output_mask):
    """Gradients (dgate, dup) of `geglu`; None where the mask is off."""
    activate, differentiate = (functools.partial(fn, approximate) for fn in (_activate, _differentiate))
    return gated.backward(dy, gate, up, activate, differentiate, output_mask)


def backward_fake(dy, gate, up, approximate, output_mask):
    return gated.backward_fake(gate, output_mask)


def setup_context(ctx, inputs, output):
    gate, up, ctx.approximate = inputs
    ctx.save_for_backward(gate, up)
