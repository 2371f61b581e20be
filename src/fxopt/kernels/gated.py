"""activation(gate) * up, block by block: what the gated units share.

Only gate and up are kept for backward; plain PyTorch keeps the activation as well, a third more.
Gated linear units: Shazeer, 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fxopt.errors import CheckError
from fxopt.kernels.blocks import as_rows, blocks
from fxopt.kernels.dtypes import wide


def check(gate, up):
    """Raise unless gate and up agree in shape and dtype (an op does not broadcast)."""
    if gate.dtype != up.dtype:
        raise CheckError(f"gate is {gate.dtype} and up is {up.dtype}", do="cast one to the other's dtype")
    torch._check(gate.shape == up.shape, lambda: f"gate is {tuple(gate.shape)} and up is {tuple(up.shape)}")


def forward(gate, up, activate: Callable):
    """`activate(tensor, out)` writes the activation of a contiguous block."""
    check(gate, up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not gate.dim():
        gate, up = gate.view(1), up.view(1)
    acc, gates, ups = wide(gate.dtype), as_rows(gate), as_rows(up)
    out = y.view(gates.shape)
    for block in blocks(*gates.shape):
        if acc == gate.dtype:
            activate(gates[block], out[block])
            out[block].mul_(ups[block])
        else:
            part = gates[block].to(acc)
            activate(part, part)
            out[block].copy_(part.mul_(ups[block]))
    return y


def backward(dy, gate, up, activate: Callable, differentiate: Callable, output_mask):
    """dgate = dy * up * activate'(gate), dup = dy * activate(gate), in fp32 (fp64) inside a block.

    `differentiate(grad, gate, out)` writes grad * activate'(gate); out may be grad.
    """
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if on else None for on in output_mask)
    if not gate.dim():
        dy, gate, up = dy.view(1), gate.view(1), up.view(1)
    acc, grads, gates, ups = wide(gate.dtype), as_rows(dy), as_rows(gate), as_rows(up)
    for block in blocks(*gates.shape):
        grad, part = grads[block].to(acc), gates[block].to(acc)
        if dup is not None:
            out = _target(dup, gates.shape, block, acc)
            activate(part, out)
            _store(dup, gates.shape, block, out.mul_(grad))
        if dgate is not None:
            out = _target(dgate, gates.shape, block, acc)
            torch.mul(grad, ups[block], out=out)
            differentiate(out, part, out)
            _store(dgate, gates.shape, block, out)
    return dgate, dup


def _target(result, shape, block, acc):
    view = result.view(shape)[block]
    return view if result.dtype == acc else torch.empty(view.shape, dtype=acc, device=view.device)


def _store(result, shape, block, values):
    if result.dtype != values.dtype:
        result.view(shape)[block].copy_(values)


def backward_fake(gate, output_mask):
    return tuple(gate.new_empty(gate.shape) if on else None for on in output_mask)
