"""Codes to values inside Triton kernels: what the kernels of `dequantize` and `quantized_linear` share.

Every function gives fp32 values, bit-equal to the formats' references where the kernel is compiled without fused
multiply-add (`enable_fp_fusion=False`; only nested scales, a product and a sum that both round, need that).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nf4_levels(codes, levels):
    """Bytes [a, b] to levels [a, 2 b]: the high nibble first.

    The table is read from memory: 64 bytes, one line of L1. Fifteen selects a weight cost more than the load.
    """
    wide = codes.to(tl.int32)
    return tl.interleave(tl.load(levels + (wide >> 4)), tl.load(levels + (wide & 15)))


@triton.jit
def nf4_scales(block, mask, absmax, nested, table, offset, NESTED: tl.constexpr):
    """Scales of these blocks of 64; nested: 8-bit codes of a table, times a scale per 256 blocks, plus an offset."""
    scale = tl.load(absmax + block, mask=mask, other=0)
    if NESTED:
        value = tl.load(table + scale.to(tl.int32))
        scale = value * tl.load(nested + block // 256, mask=mask, other=0.0) + tl.load(offset)
    return scale


@triton.jit
def e4m3(codes):
    """Bits of float8_e4m3fn to fp32.

    Not by the type, which an A100 lacks: shifted by seven, a code is the fp16 of its value / 256, subnormals included.
    """
    wide = codes.to(tl.int32)
    half = (((wide & 127) << 7) | ((wide & 128) << 8)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where((wide & 127) == 127, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def half_at(blocks, place, mask):
    """The fp16 in two bytes, little-endian, as fp32. (Blocks of 18, 34 or 210 bytes start at any even address.)"""
    low = tl.load(blocks + place, mask=mask, other=0).to(tl.int32)
    high = tl.load(blocks + place + 1, mask=mask, other=0).to(tl.int32)
    return (low | (high << 8)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
