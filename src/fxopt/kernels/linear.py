"""The base of a linear layer, dense or NF4, and its three products: what the linear ops share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.errors import CheckError
from fxopt.kernels.blocks import as_rows
from fxopt.kernels.nf4.body import dequantize


def out_features(weight, absmax, shape, transposed):
    """Size of the last dimension of y; dense weights ignore `shape`."""
    sizes = weight.shape if absmax is None else shape
    return sizes[1] if transposed else sizes[0]


def in_features(weight, absmax, shape, transposed):
    sizes = weight.shape if absmax is None else shape
    return sizes[0] if transposed else sizes[1]


def check(x, weight, absmax, shape, transposed):
    """Raise unless x fits the weight."""
    if absmax is None and weight.dtype != x.dtype:
        raise CheckError(f"x is {x.dtype} and the weight is {weight.dtype}", do="cast x to the weight's dtype")
    sizes = weight.shape if absmax is None else shape
    torch._check(len(sizes) == 2, lambda: f"a linear weight has two dimensions, not {len(sizes)}")
    wanted = in_features(weight, absmax, shape, transposed)
    torch._check(x.shape[-1] == wanted, lambda: f"x has {x.shape[-1]} features, the weight takes {wanted}")


def dense(weight, absmax, shape, dtype):
    """The weight as a dense matrix in dtype; a temporary where it is quantized."""
    return weight if absmax is None else dequantize(weight, absmax, shape, dtype)


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
