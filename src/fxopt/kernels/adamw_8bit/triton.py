"""8-bit AdamW on a GPU: one launch over a flat buffer; codes are decoded and encoded in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from fxopt.kernels.adamw.triton import scalars, step_of_adamw, store_rounded
from fxopt.kernels.adamw_8bit import body
from fxopt.kernels.adamw_8bit.codes import BLOCK
from fxopt.kernels.in_place import writes
from fxopt.kernels.launch import cdiv, launch
from fxopt.kernels.stochastic import key

# Blocks of a program: 4 elements for each thread of 4 warps. With 8 the search by halves takes 128 registers, and unrolled it
# spills on sm_90.
BLOCKS = 2
WARPS = 4


@triton.jit
def _nearest(x, map_ptr):
    """The code of the value of the map that is nearest to x, the lower one of two. A search by halves: nine loads from a
    table of 1 KB, which stays in the first cache."""
    code = tl.zeros_like(x).to(tl.int32)
    value = tl.load(map_ptr + code)
    for power in range(8):
        probe = code + (128 >> power)
        found = tl.load(map_ptr + probe)
        code = tl.where(x >= found, probe, code)
        value = tl.where(x >= found, found, value)
    above = tl.load(map_ptr + tl.minimum(code + 1, 255))
    return tl.where(x > (value + above) * 0.5, tl.minimum(code + 1, 255), code)


@triton.jit
def _absmax(x):
    """The largest magnitude of each row; NaN for a row with an element that is not finite."""
    bad = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1)
    return tl.where(bad > 0, float("nan"), tl.max(tl.abs(x), 1))


@triton.jit(do_not_specialize=["key"])
def adamw_8bit_kernel(param_ptr, grad_ptr, m_ptr, m_absmax_ptr, v_ptr, v_absmax_ptr, maps_ptr, factor_ptr, n, blocks, key,
                      decay, beta1, rest1, beta2, rest2, eps, rate, root2,
                      BLOCKS: tl.constexpr, BLOCK: tl.constexpr, FACTOR: tl.constexpr, STOCHASTIC: tl.constexpr):
    """One step for `BLOCKS` blocks of a flat buffer of n elements."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, there = index < n, block < blocks
    unsigned_ptr = maps_ptr + 256
    param = tl.load(param_ptr + index, mask, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + index, mask, 0.0).to(tl.float32)
    m = tl.load(maps_ptr + tl.load(m_ptr + index, mask, 0).to(tl.int32))
    v = tl.load(unsigned_ptr + tl.load(v_ptr + index, mask, 0).to(tl.int32))
    m *= tl.load(m_absmax_ptr + block, there, 0.0)[:, None]
    v *= tl.load(v_absmax_ptr + block, there, 0.0)[:, None]
    if FACTOR:
        grad *= tl.load(factor_ptr).to(tl.float32)
    param, m, v = step_of_adamw(param, grad, m, v, decay, beta1, rest1, beta2, rest2, eps, rate, root2)
    store_rounded(param_ptr + index, param, mask, index, key, STOCHASTIC)
    # One average after the other: fewer registers are alive. A block of zeros is divided by the smallest normal number.
    m = tl.where(mask, m, 0.0)
    absmax = _absmax(m)
    tl.store(m_absmax_ptr + block, absmax, there)
    code = _nearest(m / tl.maximum(absmax, 1.1754943508222875e-38)[:, None], maps_ptr)
    tl.store(m_ptr + index, code.to(tl.uint8), mask)
    v = tl.where(mask, v, 0.0)
    absmax = _absmax(v)
    tl.store(v_absmax_ptr + block, absmax, there)
    code = _nearest(v / tl.maximum(absmax, 1.1754943508222875e-38)[:, None], unsigned_ptr)
    tl.store(v_ptr + index, tl.where((v > 0) & (code == 0), 1, code).to(tl.uint8), mask)


@writes(0, 2, 3, 4, 5)
def update(
    param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, maps, grad_factor, lr, beta1, beta2, eps, weight_decay,
    step, seed,
):  # fmt: skip
    """See `body.update`. The values of the maps are not compared with `dynamic_maps()`, only their shape."""
    body.check(param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, maps, grad_factor, step)
    launch(
        adamw_8bit_kernel,
        (cdiv(exp_avg_absmax.numel(), BLOCKS),),
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_absmax,
        exp_avg_sq,
        exp_avg_sq_absmax,
        maps,
        maps if grad_factor is None else grad_factor,
        param.numel(),
        exp_avg_absmax.numel(),
        key(seed or 0),
        *map(float, scalars(lr, beta1, beta2, eps, weight_decay, step)),
        BLOCKS=BLOCKS,
        BLOCK=BLOCK,
        FACTOR=grad_factor is not None,
        STOCHASTIC=seed is not None,
        num_warps=WARPS,
    )
