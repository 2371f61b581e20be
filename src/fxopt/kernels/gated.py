"""activation(gate) * up, block by block: what the gated units share.

Only gate and up are kept for backward; plain PyTorch keeps the activation as well, a third more.
The price is one more activation in backward. Forward + backward on [1024, 4096], one thread, fp32 and
bf16, plain PyTorch's time over this one's: silu 0.97 and 0.71, tanh gelu 0.75 and 0.68 when memory is
warm; silu 2.2 in fp32 when plain PyTorch's larger temporaries are faulted in anew.
Low precision rounds where plain PyTorch does: widening each block to fp32 took bf16 silu to 0.58.
Gated linear units: Shazeer, 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxopt.errors import CheckError
from fxopt.kernels.blocks import as_rows, blocks


def check(gate, up):
    """Raise unless gate and up agree in shape and dtype (an op does not broadcast)."""
    if gate.dtype != up.dtype:
        raise CheckError(f"gate is {gate.dtype} and up is {up.dtype}", do="cast one to the other's dtype")
    torch._check(gate.shape == up.shape, lambda: f"gate is {tuple(gate.shape)} and up is {tuple(up.shape)}")


def forward(gate, up, activate: Callable):
    """`activate(tensor, out)` writes the activation of a block."""
    check(gate, up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not gate.dim():
        gate, up = gate.view(1), up.view(1)
    gates, ups = as_rows(gate), as_rows(up)
    out = y.view(gates.shape)
    for block in blocks(*gates.shape):
        activate(gates[block], out[block])
        out[block].mul_(ups[block])
    return y


def backward(dy, gate, up, activate: Callable, differentiate: Callable, output_mask, both: Callable | None = None):
    """dgate = dy * up * activate'(gate), dup = dy * activate(gate).

    `differentiate(grad, gate, out)` writes grad * activate'(gate); out may be grad. `both(gate, value, slope)`, where they
    share work, writes activate(gate) and activate'(gate); it serves where both gradients are asked for.
    """
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if on else None for on in output_mask)
    if not gate.dim():
        dy, gate, up = dy.view(1), gate.view(1), up.view(1)
    grads, gates, ups = as_rows(dy), as_rows(gate), as_rows(up)
    for block in blocks(*gates.shape):
        if both is not None and all(output_mask):
            value, slope = dup.view(gates.shape)[block], dgate.view(gates.shape)[block]
            both(gates[block], value, slope)
            value.mul_(grads[block])
            slope.mul_(ups[block]).mul_(grads[block])
            continue
        if dup is not None:
            out = dup.view(gates.shape)[block]
            activate(gates[block], out)
            out.mul_(grads[block])
        if dgate is not None:
            out = dgate.view(gates.shape)[block]
            torch.mul(grads[block], ups[block], out=out)
            differentiate(out, gates[block], out)
    return dgate, dup


def backward_fake(gate, output_mask):
    return tuple(gate.new_empty(gate.shape) if on else None for on in output_mask)
