"""Stochastic rounding of fp32 to bf16 or fp16: up or down with the odds of the distance, so that small updates count on average.

Rounded to nearest, a bf16 weight ignores every update below 1/256 of itself (Zamirai et al., 2020, "Revisiting BFloat16
Training", https://arxiv.org/abs/2010.06192). The random bits are a hash of (seed, index), the same on every device: the
32-bit finalizer of MurmurHash3 (Appleby, 2011).
"""

from __future__ import annotations

import torch

# Odd multipliers of the finalizer, and 2^32 / golden ratio, which spreads neighbouring seeds.
MIX1, MIX2, SPREAD = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9
_MASK = 0xFFFFFFFF
# Bits of an fp32 fraction that these dtypes do not have; the smallest normal number of fp16, and its distance to the next.
DROPPED = {torch.bfloat16: 16, torch.float16: 13}
SMALLEST_FP16, STEP_FP16 = 2.0**-14, 2.0**-24


def key(seed: int) -> int:
    """A seed, spread over 31 bits: an int32 for every kernel, whatever the seed."""
    word = (seed * SPREAD) & _MASK
    word = ((word ^ word >> 16) * MIX1) & _MASK
    word = ((word ^ word >> 13) * MIX2) & _MASK
    return (word ^ word >> 16) & 0x7FFFFFFF


def random_bits(start: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """16 random bits for each of the elements start, start + 1, ...: int32 [count]."""
    # int32 products wrap around as unsigned ones do; its shifts bring in copies of the sign, which are masked off.
    word = torch.arange(start, start + count, device=device).int().bitwise_xor_(key(seed))
    word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF)).mul_(MIX1 - 2**32)
    word.bitwise_xor_((word >> 13).bitwise_and_(0x7FFFF)).mul_(MIX2 - 2**32)
    return word.bitwise_xor_(word >> 16).bitwise_and_(0xFFFF)


def round_stochastically(x: torch.Tensor, dtype: torch.dtype, start: int, seed: int) -> torch.Tensor:
    """fp32 [n] to bf16 or fp16 [n]; NaN and infinity stay what they are.

    Random bits are added to the bits of the fraction that dtype does not have, which are then cut off. Numbers below the
    normal ones of fp16 are equidistant: they are counted in that distance, and the count goes up or down.

    Args:
        x: fp32. start: index of x's first element in the buffer that `seed` belongs to.
    """
    noise, cut = random_bits(start, x.numel(), seed, x.device), DROPPED[dtype]
    bits = x.view(torch.int32) + (noise & ((1 << cut) - 1))
    rounded = bits.bitwise_and_(-1 << cut).view(torch.float32)
    if dtype == torch.float16:
        # 12 random bits: beside a count of under 1,024 they fit into fp32.
        count = (x.abs() / STEP_FP16 + (noise >> 4) * 2.0**-12).floor_() * STEP_FP16
        rounded = torch.where(x.abs() < SMALLEST_FP16, torch.where(x < 0, -count, count), rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
