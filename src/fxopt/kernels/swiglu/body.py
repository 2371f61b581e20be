"""SwiGLU from ATen calls."""

from __future__ import annotations

import torch

from fxopt.kernels import gated


def _activate(x, out):
    torch.ops.aten.silu.out(x, out=out)


def _differentiate(grad, x, out):
    torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)


def _both(x, value, slope):
    """silu = x s and its derivative s + silu (1 - s), from one sigmoid s. ATen's silu_backward computes it again."""
    torch.sigmoid(x, out=slope)
    torch.mul(x, slope, out=value)
    slope.lerp_(slope.new_ones(()), value)


def forward(gate, up):
    """SwiGLU: y = silu(gate) * up, with silu(z) = z * sigmoid(z).

    Args:
        gate, up: same shape [...] and dtype (fp16, bf16, fp32 or fp64), any strides.

    Returns:
        y: [...] in that dtype, contiguous; rounded after the activation and after the product, as in the plain form
        (on a GPU once, after both).

    Raises:
        CheckError, RuntimeError: the dtypes, the shapes differ.

    Source: Shazeer, 2020, https://arxiv.org/abs/2002.05202.
    """
    return gated.forward(gate, up, _activate)


def forward_fake(gate, up):
    gated.check(gate, up)
    return gate.new_empty(gate.shape)


def backward(dy, gate, up, output_mask):
    """Gradients (dgate, dup) of `swiglu`; None where the mask is off."""
    return gated.backward(dy, gate, up, _activate, _differentiate, output_mask, _both if gate.element_size() > 2 else None)


def backward_fake(dy, gate, up, output_mask):
    return gated.backward_fake(gate, output_mask)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
