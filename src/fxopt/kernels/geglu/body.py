"""GeGLU from ATen calls."""

from __future__ import annotations

import functools
import math

import torch

from fxopt.errors import CheckError
from fxopt.kernels import gated

APPROXIMATIONS = ("none", "tanh")


# gelu by tanh is x sigmoid(z), z = x (_LINEAR + _CUBIC x^2): 0.5 (1 + tanh(z / 2)) = sigmoid(z).
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = _LINEAR * 0.044715


def _activate(approximate, x, out):
    if x.dtype == torch.float64 and approximate == "none":
        torch.mul(x, -math.sqrt(0.5), out=out).erfc_().mul_(x).mul_(0.5)
    elif approximate == "none" or x.element_size() == 2:
        torch.ops.aten.gelu.out(x, approximate=approximate, out=out)
    else:
        torch.mul(x, x, out=out).mul_(_CUBIC).add_(_LINEAR).mul_(x).sigmoid_().mul_(x)


def _both(x, value, slope):
    """gelu by tanh and its derivative s (1 + x z' (1 - s)) from one sigmoid s. ATen's tanh takes eight times as long as its
    sigmoid (3.2 and 0.4 ms on 1.6M elements, one thread), and its gelu_backward computes it again."""
    torch.mul(x, x, out=value)
    torch.mul(value, 3 * _CUBIC, out=slope).add_(_LINEAR).mul_(x)
    value.mul_(_CUBIC).add_(_LINEAR).mul_(x)
    slope.mul_(torch.sigmoid(-value)).add_(1)
    value.sigmoid_()
    slope.mul_(value)
    value.mul_(x)


def _differentiate(approximate, grad, x, out):
    if x.dtype == torch.float64:  # ATen's 1 + erf and 1 + tanh cancel in the tail.
        out.copy_(grad * (_slope_by_erf(x) if approximate == "none" else _slope_by_tanh(x)))
        return
    torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out)


def _slope_by_erf(x):
    """Phi(x) + x phi(x)."""
    return 0.5 * torch.erfc(x * -math.sqrt(0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _slope_by_tanh(x):
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _both(x, value, slope)
    return slope


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
    both = _both if approximate == "tanh" and gate.element_size() > 2 else None
    return gated.backward(dy, gate, up, activate, differentiate, output_mask, both)


def backward_fake(dy, gate, up, approximate, output_mask):
    return gated.backward_fake(gate, output_mask)


def setup_context(ctx, inputs, output):
    gate, up, ctx.approximate = inputs
    ctx.save_for_backward(gate, up)
