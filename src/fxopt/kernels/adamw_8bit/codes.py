"""Block-wise 8-bit numbers: a code for each element, an absolute maximum for each block of 256.

The dynamic map of Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization", https://arxiv.org/abs/2110.02861,
section 2: seven decades below 1, each with twice as many equidistant values as the one below; zero and one. The signed form
has the same values below zero (but one), the unsigned form twice as many above.
"""

from __future__ import annotations

import functools

import torch

BLOCK = 256
DECADES = 7


def dynamic_map(signed: bool) -> torch.Tensor:
    """The 256 values of the map, rising: fp32 [256]. Equal to bitsandbytes' `create_dynamic_map(signed)`."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        middles = 10.0 ** (decade - DECADES + 1) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def dynamic_maps(device: torch.device | str | None = None) -> torch.Tensor:
    """The signed and the unsigned map, fp32 [2, 256]."""
    return _maps().to(device)


@functools.cache
def _maps() -> torch.Tensor:
    return torch.stack((dynamic_map(True), dynamic_map(False)))


def count(elements: int) -> int:
    """Blocks of a buffer."""
    return -(-elements // BLOCK)


def decode(codes: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """uint8 codes [n] of blocks with these maxima [blocks], as values of a map [256] in its dtype: [n]."""
    found = values.index_select(0, codes.reshape(-1).int())
    whole = codes.numel() // BLOCK * BLOCK
    found[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK].unsqueeze(1))
    if whole < codes.numel():
        found[whole:].mul_(absmax[-1])
    return found


def encode(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> None:
    """Write the codes [n] and maxima [blocks] of x [n], fp32: the nearest value of the dynamic map, the lower one of two.

    An element of the unsigned form that is not zero gets no code of zero: a second moment that is lost makes the next
    update of its element up to 1 / sqrt(1 - beta2) times too long (30 times for 0.999), or as long as exp_avg / eps where
    the next gradient is zero. bitsandbytes rounds such elements to zero.
    A block with an element that is not finite gets NaN as its maximum: all of it decodes to NaN.
    """
    whole = x.numel() // BLOCK * BLOCK
    for part, out, top in (
        (x[:whole].view(-1, BLOCK), codes[:whole].view(-1, BLOCK), absmax[: whole // BLOCK]),
        (x[whole:].view(1, -1), codes[whole:].view(1, -1), absmax[whole // BLOCK :]),
    ):
        if part.numel():
            _encode(part, out, top, signed)


def _encode(x, codes, absmax, signed):
    torch.linalg.vector_norm(x, float("inf"), dim=1, out=absmax)
    absmax.masked_fill_(absmax.isinf(), float("nan"))
    scaled = x / absmax.clamp_min(torch.finfo(x.dtype).tiny).unsqueeze(1)
    low, middle = _lookup(signed)
    cell = (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF).view(-1)
    above = scaled.view(-1) > middle.index_select(0, cell)
    torch.add(low.index_select(0, cell), above, out=codes.view(-1))
    if not signed:
        torch.maximum(codes, x.gt(0).to(torch.uint8), out=codes)


@functools.cache
def _lookup(signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """For each upper half of an fp32 number: the code of the smallest number in that cell, uint8 [65536], and the one
    middle between two values of the map in it, above which the next code begins, fp32 [65536]; infinity if there is none.

    Cells are 2^-8 to 2^-7 wide, relatively, values of the map at least 0.7% apart: two middles do not meet in one cell.
    """
    values = dynamic_map(signed)
    middles = (values[1:] + values[:-1]) / 2
    bits = torch.arange(1 << 16, dtype=torch.int32) << 16
    first, last = bits.view(torch.float32), (bits | 0xFFFF).view(torch.float32)
    least, most = torch.minimum(first, last), torch.maximum(first, last)
    low, high = torch.bucketize(least, middles), torch.bucketize(most, middles)
    middle = torch.where(high > low, middles[low.clamp(max=254)], float("inf"))
    return low.to(torch.uint8), middle
