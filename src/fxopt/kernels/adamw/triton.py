"""AdamW on a GPU: one launch over a flat buffer; each element of each tensor is read once and written once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fxopt.kernels.adamw import body
from fxopt.kernels.in_place import writes
from fxopt.kernels.launch import cdiv, launch
from fxopt.kernels.stochastic import MIX1, MIX2, SMALLEST_FP16, STEP_FP16, key

# Elements of a program: 8 for each thread of 4 warps, two loads of 16 bytes from each fp32 tensor.
BLOCK = 1024
WARPS = 4

_MIX1, _MIX2 = tl.constexpr(MIX1), tl.constexpr(MIX2)
_SMALLEST, _STEP = tl.constexpr(SMALLEST_FP16), tl.constexpr(STEP_FP16)


@triton.jit
def store_rounded(ptr, x, mask, index, key, STOCHASTIC: tl.constexpr):
    """Store fp32 numbers in the pointer's dtype; stochastically as `stochastic.round_stochastically` does, bit for bit."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if STOCHASTIC and dtype != tl.float32:
        word = (index ^ key).to(tl.uint32)
        word = (word ^ (word >> 16)) * _MIX1
        word = (word ^ (word >> 13)) * _MIX2
        noise = (word ^ (word >> 16)) & 0xFFFF
        cut: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
        low: tl.constexpr = (1 << cut) - 1
        bits = x.to(tl.uint32, bitcast=True) + (noise & low)
        rounded = (bits & (0xFFFFFFFF - low)).to(tl.float32, bitcast=True)
        if dtype == tl.float16:
            count = tl.floor(tl.abs(x) / _STEP + (noise >> 4).to(tl.float32) * (1.0 / 4096)) * _STEP
            rounded = tl.where(tl.abs(x) < _SMALLEST, tl.where(x < 0, -count, count), rounded)
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)
    tl.store(ptr, x.to(dtype), mask)


@triton.jit
def step_of_adamw(param, grad, exp_avg, exp_avg_sq, decay, beta1, rest1, beta2, rest2, eps, rate, root2):
    """The new (param, exp_avg, exp_avg_sq), all fp32."""
    exp_avg = beta1 * exp_avg + rest1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * (grad * grad)
    return param * decay - rate * exp_avg / (tl.sqrt(exp_avg_sq) / root2 + eps), exp_avg, exp_avg_sq


@triton.jit(do_not_specialize=["key"])
def adamw_kernel(param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, factor_ptr, n, key,
                 decay, beta1, rest1, beta2, rest2, eps, rate, root2,
                 BLOCK: tl.constexpr, FACTOR: tl.constexpr, STOCHASTIC: tl.constexpr):
    """One step for `BLOCK` elements of a flat buffer of n."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    param = tl.load(param_ptr + index, mask, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + index, mask, 0.0).to(tl.float32)
    exp_avg, exp_avg_sq = tl.load(exp_avg_ptr + index, mask, 0.0), tl.load(exp_avg_sq_ptr + index, mask, 0.0)
    if FACTOR:
        grad *= tl.load(factor_ptr).to(tl.float32)
    param, exp_avg, exp_avg_sq = step_of_adamw(
        param, grad, exp_avg, exp_avg_sq, decay, beta1, rest1, beta2, rest2, eps, rate, root2)
    tl.store(exp_avg_ptr + index, exp_avg, mask)
    tl.store(exp_avg_sq_ptr + index, exp_avg_sq, mask)
    store_rounded(param_ptr + index, param, mask, index, key, STOCHASTIC)


def scalars(lr, beta1, beta2, eps, weight_decay, step):
    """decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, rate, root of the second correction: rounded to fp32 only here. (In
    fp32, 1 - 0.999 is off by 1e-5.)"""
    return (
        1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, eps,
        lr / (1 - beta1**step), math.sqrt(1 - beta2**step),
    )  # fmt: skip


@writes(0, 2, 3)
def update(param, grad, exp_avg, exp_avg_sq, grad_factor, lr, beta1, beta2, eps, weight_decay, step, seed):
    """See `body.update`. An fp64 parameter is handed to it: numbers reach a kernel in fp32."""
    if param.dtype == torch.float64:
        return body.update(param, grad, exp_avg, exp_avg_sq, grad_factor, lr, beta1, beta2, eps, weight_decay, step, seed)
    body.check(param, grad, exp_avg, exp_avg_sq, grad_factor, step)
    launch(
        adamw_kernel,
        (cdiv(param.numel(), BLOCK),),
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        exp_avg if grad_factor is None else grad_factor,
        param.numel(),
        key(seed or 0),
        *map(float, scalars(lr, beta1, beta2, eps, weight_decay, step)),
        BLOCK=BLOCK,
        FACTOR=grad_factor is not None,
        STOCHASTIC=seed is not None,
        num_warps=WARPS,
    )
