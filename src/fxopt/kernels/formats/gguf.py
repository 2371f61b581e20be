"""The blocks of GGUF files, used as they lie in the file: Q4_0, Q4_1, Q8_0 (32 weights), Q4_K, Q6_K (256 weights).

A row of the weight is a whole number of blocks, so rows of raw bytes can be permuted, cut and stacked as the rows of the weight.
All products of scales and codes below are exact in fp32 (11 bits of an fp16 scale, at most 8 of a sub-scale, at most 6 of
a code), so a value is rounded at most once, whatever the order or fusion of the operations.

The layouts are those of ggml's `ggml-common.h` (described, not copied).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.kernels.dtypes import wide
from fxopt.kernels.formats.format import Format, Part, take


# Weights that the ATen body writes at once. Decoding takes a dozen operators, mostly on bytes: measured to fp32 [2048, 2048] on
# one thread in ms, q4_0 2^18 2.83, 2^20 2.55, whole 2.74; q4_k 2.65, 2.00, 1.93; q6_k 4.51, 3.70, 4.00.
_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Layout:
    """A kind of block.

    Args:
        name: of the format. number: the type's number in a file. weights, bytes: per block.
        halves: offsets of its fp16 fields.
        decode: writes the values of blocks uint8 [n, bytes] into a contiguous fp32 or fp64 tensor [n, weights].
        encode: values fp32 [n, weights] to blocks, or None.
        error: see `Format`.
    """

    name: str
    number: int
    weights: int
    bytes: int
    halves: tuple[int, ...]
    decode: Callable[[Tensor, Tensor], object]
    encode: Callable[[Tensor], Tensor] | None = None
    error: float = math.nan


def _half(blocks, at, acc):
    """The fp16 field at this byte, [n, 1] in acc."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(acc)


def _nibbles(packed, out):
    """[n, m] bytes to codes [n, 2, m], into out: the low nibbles, then the high ones."""
    return out.copy_(torch.stack((packed & 15, packed >> 4), dim=1).view(out.shape))


def _decode_q4_0(blocks, out):
    _nibbles(blocks[:, 2:], out).sub_(8).mul_(_half(blocks, 0, out.dtype))


def _decode_q4_1(blocks, out):
    _nibbles(blocks[:, 4:], out).mul_(_half(blocks, 0, out.dtype)).add_(_half(blocks, 2, out.dtype))


def _decode_q8_0(blocks, out):
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_half(blocks, 0, out.dtype))


def _decode_q4_k(blocks, out):
    """Eight runs of 32: value = d * scale * code - dmin * min, with 6-bit scales and minima in 12 bytes.

    Of each byte of the first two groups of four, the low 6 bits are a scale (a minimum) of the first four runs, the high 2 bits
    are the top of one of the last four, whose low 4 bits are in the third group.
    """
    acc = out.dtype
    first, second, third = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scale = torch.cat((first & 63, (third & 15) | (first >> 2 & 48)), dim=1).to(acc).mul_(_half(blocks, 0, acc))
    least = torch.cat((second & 63, (third >> 4) | (second >> 2 & 48)), dim=1).to(acc).mul_(_half(blocks, 2, acc))
    codes = _nibbles(blocks[:, 16:].reshape(-1, 32), out.view(-1, 2, 32)).view(-1, 8, 32)
    codes.mul_(scale.unsqueeze(2)).sub_(least.unsqueeze(2))


def _decode_q6_k(blocks, out):
    """Sixteen runs of 16: value = d * scale * (code - 32), 8-bit scales; low 4 bits of a code in `ql`, high 2 in `qh`.

    Each half (128 weights) has 64 bytes of ql, 32 of qh; its four quarters are the low nibbles of the first 32 bytes, of the
    last 32, the high nibbles of both, and take bits 0-1, 2-3, 4-5, 6-7 of qh.
    """
    ql, qh = blocks[:, :128].view(-1, 2, 64), blocks[:, 128:192].view(-1, 2, 32)
    codes = blocks.new_empty(len(blocks), 2, 4, 32)
    for quarter in range(4):
        part = ql[:, :, 32 * (quarter % 2) :][:, :, :32]
        low = part & 15 if quarter < 2 else part >> 4
        top = (qh << 4 if quarter == 0 else qh << 2 if quarter == 1 else qh if quarter == 2 else qh >> 2) & 48
        torch.bitwise_or(low, top, out=codes[:, :, quarter])
    scale = blocks[:, 192:208].view(torch.int8).to(out.dtype).mul_(_half(blocks, 208, out.dtype))
    out.copy_(codes.view(-1, 256)).sub_(32).view(-1, 16, 16).mul_(scale.unsqueeze(2))


def _inverse(d):
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


def _bytes(d):
    return d.to(torch.float16).reshape(-1).view(torch.uint8).view(-1, 2)


def _packed(codes):
    """[n, 32] codes to [n, 16] bytes."""
    codes = codes.to(torch.uint8)
    return codes[:, :16] | codes[:, 16:] << 4


def _encode_q4_0(values):
    """The value of largest magnitude becomes code 0, that is -8 d."""
    extreme = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    d = extreme / -8
    return torch.cat((_bytes(d), _packed((values * _inverse(d)).add_(8.5).trunc_().clamp_(0, 15))), dim=1)


def _encode_q4_1(values):
    least = values.amin(dim=1, keepdim=True)
    d = (values.amax(dim=1, keepdim=True) - least) / 15
    codes = ((values - least) * _inverse(d)).add_(0.5).trunc_().clamp_(0, 15)
    return torch.cat((_bytes(d), _bytes(least), _packed(codes)), dim=1)


def _encode_q8_0(values):
    d = values.abs().amax(dim=1, keepdim=True) / 127
    scaled = values * _inverse(d)
    magnitude = scaled.abs()  # Halves are rounded away from zero.
    codes = (magnitude - magnitude.floor()).mul_(2).floor_().add_(magnitude.floor()).mul_(scaled.sign())
    return torch.cat((_bytes(d), codes.to(torch.int8).view(torch.uint8)), dim=1)


LAYOUTS = (
    Layout("q4_0", 2, 32, 18, (0,), _decode_q4_0, _encode_q4_0, 0.0860),
    Layout("q4_1", 3, 32, 20, (0, 2), _decode_q4_1, _encode_q4_1, 0.0783),
    Layout("q8_0", 8, 32, 34, (0,), _decode_q8_0, _encode_q8_0, 0.0054),
    Layout("q4_k", 12, 256, 144, (0, 2), _decode_q4_k),
    Layout("q6_k", 14, 256, 210, (208,), _decode_q6_k),
)


def _format(layout: Layout) -> Format:
    def stored(shape):
        return (*shape[:-1], shape[-1] // layout.weights * layout.bytes)

    def quantize(weight):
        values = weight.detach().to(torch.float32).reshape(-1, layout.weights)
        return (layout.encode(values).view(stored(weight.shape)),)

    def reference(base, shape, dtype):
        """The values of the blocks, in fp32 (fp64 if dtype is), rounded once to dtype."""
        blocks = base[0].reshape(-1, layout.bytes)
        out = torch.empty(len(blocks), layout.weights, dtype=wide(dtype), device=blocks.device)
        layout.decode(blocks, out)
        return out.to(dtype).view(shape)

    def dequantize(base, shape, dtype):
        """The ATen body: the same by parts that stay in cache."""
        blocks, step = base[0].reshape(-1, layout.bytes), _ELEMENTS // layout.weights
        out = torch.empty(len(blocks), layout.weights, dtype=dtype, device=blocks.device)
        room = None if dtype == wide(dtype) else torch.empty(min(step, len(blocks)), layout.weights, device=blocks.device)
        for part, values in zip(blocks.split(step), out.split(step), strict=True) if len(blocks) else ():
            if room is None:
                layout.decode(part, values)
            else:
                layout.decode(part, room[: len(part)])
                values.copy_(room[: len(part)])
        return out.view(shape)

    def fits(shape):
        if not shape:
            return "a scalar has no blocks"
        return None if shape[-1] % layout.weights == 0 else f"rows of {shape[-1]} are not whole blocks of {layout.weights}"

    return Format(
        name=layout.name,
        parts=(Part("blocks", torch.uint8, stored),),
        quantize=None if layout.encode is None else quantize,
        reference=reference,
        dequantize=dequantize,
        bits=lambda shape: 8 * layout.bytes / layout.weights,
        error=layout.error,
        fits=fits,
        save=lambda base, shape, dtype: {"": base[0]},
        load=lambda entries, shape: (take(entries, "", torch.uint8, stored(shape)),),
    )


GGUF = tuple(_format(layout) for layout in LAYOUTS)
