"""int8 and fp8 (e4m3): one code a weight, one scale a row. A row is everything along the last dimension.

int8: symmetric, by the largest magnitude of the row: Dettmers et al., 2022, https://arxiv.org/abs/2208.07339, section 2.1. Stored
as bitsandbytes stores a `Linear8bitLt`: `weight` int8, `SCB` the fp32 magnitudes, `weight_format` 0 (row-major). Its products
with 16-bit activations use codes * (SCB / 127), and so do we; `int8_vectorwise_dequant` there multiplies in another order.

fp8: e4m3 without infinities (Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433), scaled so that the largest magnitude of
a row is the largest finite value, 448. Stored as compressed-tensors ("float-quantized", strategy "channel") and the FBGEMM
integration of transformers store it: `weight` float8_e4m3fn, `weight_scale` [rows, 1], value = code * scale. In graphs the codes
are uint8, the same bits: few operators take float8, and an A100 has no such type.
"""

from __future__ import annotations

import torch

from fxopt.errors import DataError
from fxopt.kernels.blocks import as_rows, blocks
from fxopt.kernels.dtypes import wide
from fxopt.kernels.formats.format import Format, Part, count, take

LARGEST = 448.0
_SCALES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_int8(weight):
    """Weight [..., columns] to codes int8, same shape, and absmax fp32 [...]."""
    wide_weight = weight.detach().to(torch.float32)
    absmax = _absmax(wide_weight)
    # A row of zeros has no scale, and codes 0.
    inverse = torch.where(absmax == 0, torch.zeros_like(absmax), 127.0 / absmax)
    return (wide_weight * inverse.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8), absmax


def quantize_fp8(weight):
    """Weight [..., columns] to codes uint8 (the bits of float8_e4m3fn), same shape, and scale fp32 [..., 1]."""
    wide_weight = weight.detach().to(torch.float32)
    absmax = _absmax(wide_weight).unsqueeze(-1)
    scale = torch.where(absmax == 0, torch.ones_like(absmax), absmax / LARGEST)
    # Beyond the largest value the cast gives NaN; rounding may lead a hair beyond it.
    return (wide_weight / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8), scale


def _absmax(weight):
    return weight.abs().amax(dim=-1) if weight.shape[-1] else weight.new_zeros(weight.shape[:-1])


def reference_int8(base, shape, dtype):
    """code * (absmax / 127), in fp32 (fp64 if dtype is), rounded once to dtype. `base`: codes, absmax."""
    codes, absmax = base
    acc = wide(dtype)
    return (codes.to(acc) * (absmax.to(acc) * (1.0 / 127.0)).unsqueeze(-1)).to(dtype)


def reference_fp8(base, shape, dtype):
    """code * scale, in fp32 (fp64 if dtype is), rounded once to dtype. `base`: codes, scale."""
    codes, scale = base
    acc = wide(dtype)
    return (codes.view(torch.float8_e4m3fn).to(acc) * scale.to(acc)).to(dtype)


def dequantize_int8(base, shape, dtype):
    """The ATen body: bit-equal to `reference_int8`."""
    if dtype == torch.float64:
        return reference_int8(base, shape, dtype)
    return _scaled(base[0], base[1] * (1.0 / 127.0), dtype)


def dequantize_fp8(base, shape, dtype):
    """The ATen body: bit-equal to `reference_fp8`.

    ATen converts float8 one by one: 10.8 ms for [2048, 2048] on one thread. Shifted by seven bits the code is the fp16 of its
    value / 256, and those are converted in vectors: 1.3 ms. (NaN is lost on the way, and an enormous scale could overflow:
    then the slow way.)
    """
    codes, scale = base
    if dtype == torch.float64 or not codes.numel():
        return reference_fp8(base, shape, dtype)
    large = scale * 256
    if int(codes.bitwise_and(127).max()) == 127 or not bool(large.isfinite().all()):
        return reference_fp8(base, shape, dtype)
    return _scaled(codes.view(torch.int8), large, dtype, _as_halves)


def _as_halves(codes):
    """The fp16 whose bits are: sign, 0, the seven other bits of the code, seven zeros."""
    return codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)


def _scaled(codes, scale, dtype, read=lambda codes: codes):
    """read(codes) * scale by blocks of rows that stay in cache."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows, result, scales = as_rows(codes), as_rows(out), scale.reshape(-1, 1)
    for block in blocks(*rows.shape):
        if dtype == torch.float32:
            result[block].copy_(read(rows[block])).mul_(scales[block])
        else:
            result[block].copy_(read(rows[block]).to(torch.float32).mul_(scales[block]))
    return out


def _fits(shape):
    return None if len(shape) >= 2 else "a vector has no rows to scale"


def _save_int8(base, shape, dtype):
    codes, absmax = base
    return {"": codes, "../SCB": absmax, "../weight_format": torch.tensor(0, dtype=torch.uint8)}


def _load_int8(entries, shape):
    layout = entries.get("../weight_format")
    if layout is not None and (layout.numel() != 1 or int(layout) != 0):
        raise DataError(f"weight_format is {layout.tolist()}, not 0 (rows)", do="save the model again with a present bitsandbytes")
    return take(entries, "", torch.int8, shape), take(entries, "../SCB", torch.float32, shape[:-1])


def _save_fp8(base, shape, dtype):
    return {"": base[0].view(torch.float8_e4m3fn), "_scale": base[1]}


def _load_fp8(entries, shape):
    scale = entries.get("_scale")
    if scale is not None and scale.dtype in _SCALES and scale.numel() == count(shape[:-1]):
        scale = scale.to(torch.float32).reshape(*shape[:-1], 1)  # Also [rows], and 16-bit scales: both exact.
        entries = {**entries, "_scale": scale}
    return take(entries, "", torch.float8_e4m3fn, shape).view(torch.uint8), take(entries, "_scale", torch.float32, (*shape[:-1], 1))


def _bits(shape):
    return 8 + 32 / max(1, shape[-1])


INT8 = Format(
    name="int8",
    parts=(Part("codes", torch.int8, tuple), Part("absmax", torch.float32, lambda shape: tuple(shape[:-1]))),
    quantize=quantize_int8,
    reference=reference_int8,
    dequantize=dequantize_int8,
    bits=_bits,
    error=0.0083,
    fits=_fits,
    save=_save_int8,
    load=_load_int8,
    suffixes=("", "../SCB", "../weight_format"),
    claims=lambda entries: "../SCB" in entries and "" in entries and entries[""].dtype == torch.int8,
)
FP8 = Format(
    name="fp8",
    parts=(Part("codes", torch.uint8, tuple), Part("scale", torch.float32, lambda shape: (*shape[:-1], 1))),
    quantize=quantize_fp8,
    reference=reference_fp8,
    dequantize=dequantize_fp8,
    bits=_bits,
    error=0.0264,
    fits=_fits,
    save=_save_fp8,
    load=_load_fp8,
    suffixes=("", "_scale"),
    claims=lambda entries: "_scale" in entries and "" in entries and entries[""].dtype == torch.float8_e4m3fn,
)
