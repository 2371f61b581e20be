"""Rotary position embedding from ATen calls on views: no rotated copy, no concatenation."""

from __future__ import annotations

import torch

from fxopt.errors import CheckError


def _pair(x, rotary, interleaved):
    """The two members of every rotated pair, as views of the first `rotary` columns."""
    if interleaved:
        return x[..., 0:rotary:2], x[..., 1:rotary:2]
    return x[..., : rotary // 2], x[..., rotary // 2 : rotary]


def _tables(table, interleaved, half_tables):
    return (table, table) if half_tables else _pair(table, table.shape[-1], interleaved)


def _check(x, cos, sin, half_tables):
    rotary = cos.shape[-1] * (2 if half_tables else 1)
    torch._check(cos.shape == sin.shape, lambda: f"cos is {tuple(cos.shape)} and sin is {tuple(sin.shape)}")
    torch._check(rotary % 2 == 0, lambda: f"an odd number of columns ({rotary}) cannot be rotated in pairs")
    torch._check(rotary <= x.shape[-1], lambda: f"{rotary} columns to rotate, but x has {x.shape[-1]}")
    return rotary


def _turn(x, cos, sin, interleaved, half_tables, transpose):
    """Rotate x, or apply the transpose of that linear map (not its inverse: the two halves of the
    tables may differ): forward (x1 c1 - x2 s1, x2 c2 + x1 s2), transpose (y1 c1 + y2 s2, y2 c2 - y1 s1).
    """
    rotary = _check(x, cos, sin, half_tables)
    out = torch.empty_like(x)
    if rotary < x.shape[-1]:
        out[..., rotary:].copy_(x[..., rotary:])
    x1, x2 = _pair(x, rotary, interleaved)
    out1, out2 = _pair(out, rotary, interleaved)
    (c1, c2), (s1, s2) = (_tables(table, interleaved, half_tables) for table in (cos, sin))
    sign = 1.0 if transpose else -1.0
    first, second = (s2, s1) if transpose else (s1, s2)
    _combine(out1, x1, c1, x2, first, sign)
    _combine(out2, x2, c2, x1, second, -sign)
    return out


def _combine(out, a, cos, b, sin, sign):
    if torch.promote_types(a.dtype, cos.dtype) == out.dtype and out.dtype in (torch.float32, torch.float64):
        torch.mul(a, cos, out=out)
        out.addcmul_(b, sin, value=sign)
    else:
        # One rounding: addcmul on a rounded product would make it two.
        wide = torch.promote_types(torch.promote_types(out.dtype, cos.dtype), torch.float32)
        out.copy_(torch.addcmul(a.to(wide) * cos, b.to(wide), sin.to(wide), value=sign))


def forward(q, k, cos, sin, interleaved, half_tables):
    """Rotary position embedding of queries and keys.

    For every pair (x1, x2) of columns: (x1 cos - x2 sin, x2 cos + x1 sin). Columns past the rotary
    width are copied.

    Args:
        q: [batch, heads, seq, head_dim]; or any layout that the tables broadcast to.
        k: [batch, kv_heads, seq, head_dim], or None.
        cos, sin: broadcastable to q and k but for the last dimension, [batch or 1, 1, seq, width].
            With half_tables, width is rotary_dim / 2 and both members of a pair use the same value;
            without, width is rotary_dim and the two halves (or interleaved columns) may differ.
        interleaved: pairs are columns (2i, 2i + 1); otherwise (i, i + rotary_dim / 2).
        half_tables: see cos, sin.

    Returns:
        q_out, k_out: in q's and k's dtype, strides as `empty_like` gives. k_out is [0] without k.
        Low precision is rounded once.

    Raises:
        RuntimeError: the tables are odd, differ in shape or are wider than q. CheckError: the
        tables require grad (they have no derivative here).

    Source: Su et al., 2021, https://arxiv.org/abs/2104.09864.
    """
    q_out = _turn(q, cos, sin, interleaved, half_tables, False)
    return q_out, (q.new_empty(0) if k is None else _turn(k, cos, sin, interleaved, half_tables, False))


def forward_fake(q, k, cos, sin, interleaved, half_tables):
    for x in (q,) if k is None else (q, k):
        _check(x, cos, sin, half_tables)
    return torch.empty_like(q), (q.new_empty(0) if k is None else torch.empty_like(k))


def backward(dq, dk, cos, sin, interleaved, half_tables):
    """Gradients (dq, dk) of `rope`, each None where its grad_output is None."""
    return tuple(
        None if grad is None else _turn(grad, cos, sin, interleaved, half_tables, True) for grad in (dq, dk)
    )


def backward_fake(dq, dk, cos, sin, interleaved, half_tables):
    return tuple(None if grad is None else torch.empty_like(grad) for grad in (dq, dk))


def setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.interleaved, ctx.half_tables = inputs
    if any(ctx.needs_input_grad[2:4]):
        raise CheckError(
            "the cos or sin table of fxopt::rope requires grad, but it has no derivative here",
            do="detach the tables, or keep the plain PyTorch form where they are trained",
        )
    ctx.save_for_backward(cos, sin)
