"""NF4 in plain PyTorch: the format, quantization and its inverse.

4-bit NormalFloat: Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, appendix E. The layout
is the one of bitsandbytes, bit for bit, so that files interoperate: blocks of 64 over the flattened
tensor (they may straddle rows), one fp32 absolute maximum a block, two codes a byte, the first
element in the high nibble.
"""

from __future__ import annotations

import math

import torch

BLOCK = 64
# The 16 levels: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to NF4.

    Args:
        weight: any shape, floating point; n elements.

    Returns:
        packed: uint8 [(n + 1) // 2, 1]. absmax: fp32 [ceil(n / 64)].
    """
    flat = weight.detach().reshape(-1).to(torch.float32)
    count = flat.numel()
    blocks = -(-count // BLOCK)
    padded = torch.nn.functional.pad(flat, (0, blocks * BLOCK - count)).view(blocks, BLOCK)
    absmax = padded.abs().amax(dim=1) if blocks else flat.new_empty(0)
    # An all-zero block has no scale; its elements are level zero, code 7.
    inverse = torch.where(absmax == 0, torch.zeros_like(absmax), 1.0 / absmax)
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=flat.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(padded * inverse.unsqueeze(1), midpoints).to(torch.uint8).view(-1)
    codes = codes[: count + count % 2]
    if count % 2 and codes.numel() == count:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1), absmax


def dequantize(packed, absmax, shape, dtype):
    """Same arguments as `fxopt::nf4_dequantize`; returns (weight,)."""
    count = math.prod(shape)
    wide = absmax.dtype if dtype == torch.float64 else torch.float32
    levels = torch.tensor(LEVELS, dtype=wide, device=packed.device)
    codes = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), dim=1).view(-1)[:count]
    scale = absmax.to(wide).repeat_interleave(BLOCK)[:count]
    return ((levels[codes.long()] * scale).to(dtype).view(shape),)
