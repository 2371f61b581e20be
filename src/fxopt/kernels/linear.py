"""The products of a linear layer: what the linear ops share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.kernels.blocks import as_rows


def apply(x, matrix, bias, transposed):
    """x W^T + bias, or x W + bias: by the very call of the plain program, hence bit-identical to it."""
    if not transposed:
        return F.linear(x, matrix, bias)
    rows = as_rows(x)
    rows = rows.mm(matrix) if bias is None else torch.addmm(bias, rows, matrix)
    return rows.view(*x.shape[:-1], matrix.shape[1])


def pull_back(grads, matrix, transposed):
    """dx = dy W (dy W^T if transposed) for dy [rows, out]."""
    return grads.mm(matrix.t() if transposed else matrix)


def weight_gradient(grads, rows, transposed):
    """dW = dy^T x ([in, out] if transposed): only for a dense weight that is trained."""
    return rows.t().mm(grads) if transposed else grads.t().mm(rows)


def bias_gradient(grads, bias_dtype):
    """Sum over rows, in fp32 for low precision."""
    acc = torch.float64 if grads.dtype == torch.float64 else torch.float32
    return grads.sum(0, dtype=acc).to(bias_dtype)
