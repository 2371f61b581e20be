"""NF4: 16 levels, one scale per 64 weights; "nf4_nested": the scales themselves in 8 bits.

4-bit NormalFloat and double quantization: Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E.
The layout is the one of bitsandbytes, bit for bit, so that files interoperate: blocks of 64 over the flattened tensor (they
may straddle rows), one absolute maximum a block, two codes a byte, the first element in the high nibble.

Nested: the mean of the scales is subtracted ("nested_offset"), the rest is stored as 8-bit codes of a dynamic map (Dettmers et
al., 2022, https://arxiv.org/abs/2110.02861, section 2.1), with one fp32 absolute maximum per 256 of them.

The levels are a part like any other, as in the files: a GPU kernel then reads its table from memory that the caller owns.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from fxopt.errors import DataError
from fxopt.kernels.blocks import BLOCK as _ELEMENTS
from fxopt.kernels.dtypes import wide
from fxopt.kernels.formats.format import Format, Part, anything, count, take
from fxopt.kernels.formats.nf4_state import BLOCK, KEY, NESTED_BLOCK, parse_quant_state, quant_state_json

# The 16 levels: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize(weight):
    """Quantize to NF4.

    Args:
        weight: any shape, floating point; n elements.

    Returns:
        codes: uint8 [(n + 1) // 2, 1]. absmax: fp32 [ceil(n / 64)]. quant_map: fp32 [16], the levels.
    """
    flat = weight.detach().reshape(-1).to(torch.float32)
    n = flat.numel()
    blocks = _blocks(weight.shape)
    padded = F.pad(flat, (0, blocks * BLOCK - n)).view(blocks, BLOCK)
    absmax = padded.abs().amax(dim=1) if blocks else flat.new_empty(0)
    # An all-zero block has no scale; its elements are level zero, code 7.
    inverse = torch.where(absmax == 0, torch.zeros_like(absmax), 1.0 / absmax)
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=flat.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(padded * inverse.unsqueeze(1), midpoints).to(torch.uint8).view(-1)
    codes = codes[: n + n % 2]
    if n % 2 and codes.numel() == n:
        codes = F.pad(codes, (0, 1))
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1), absmax, levels


def quantize_nested(weight):
    """Quantize to NF4 with 8-bit scales.

    Returns:
        codes, quant_map as of `quantize`; absmax: uint8 [b] with b = ceil(n / 64); nested_absmax: fp32 [ceil(b / 256)];
        nested_quant_map: fp32 [256]; nested_offset: fp32 [].
    """
    codes, absmax, levels = quantize(weight)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    rest, table = absmax - offset, dynamic_map(absmax.device)
    blocks = _nested_blocks(weight.shape)
    padded = F.pad(rest, (0, blocks * NESTED_BLOCK - rest.numel())).view(blocks, NESTED_BLOCK)
    nested = padded.abs().amax(dim=1) if blocks else rest.new_empty(0)
    inverse = torch.where(nested == 0, torch.zeros_like(nested), 1.0 / nested)
    midpoints = (table[1:] + table[:-1]) / 2
    small = torch.bucketize(padded * inverse.unsqueeze(1), midpoints).to(torch.uint8).view(-1)[: rest.numel()]
    return codes, small, levels, nested, table, offset


def dynamic_map(device=None):
    """fp32 [256], ascending: the signed 8-bit dynamic map, bit-equal to bitsandbytes'.

    A code is a sign, e zeros, a one and 6 - e fraction bits: the values are the midpoints of 2^(6 - e) equal parts of
    [0.1, 1], times 10^-e, for e = 0 ... 6; with 0 and 1 added and no -1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - e) + 1, dtype=torch.float32)
        part = (edges[:-1] + edges[1:]) / 2 * 10.0**-e
        values += [part, -part]
    return torch.cat(values).sort().values.to(device)


def reference(base, shape, dtype):
    """level[code] * absmax[block], in fp32 (fp64 if dtype is), rounded once to dtype. `base`: codes, absmax, quant_map."""
    codes, absmax, levels = base
    n, acc = count(shape), wide(dtype)
    codes = torch.stack((codes.reshape(-1) >> 4, codes.reshape(-1) & 15), dim=1).view(-1)[:n]
    return (levels.to(acc)[codes.long()] * absmax.to(acc).repeat_interleave(BLOCK)[:n]).to(dtype).view(shape)


def reference_nested(base, shape, dtype):
    """As `reference`, with absmax = nested_quant_map[code] * nested_absmax[block] + nested_offset."""
    codes, small, levels, nested, table, offset = base
    acc = wide(dtype)
    scale = nested.to(acc).repeat_interleave(NESTED_BLOCK)[: small.numel()]
    return reference((codes, table.to(acc)[small.long()] * scale + offset.to(acc), levels), shape, dtype)


@functools.lru_cache(maxsize=4)
def _nibbles(device: torch.device) -> torch.Tensor:
    """int32 [512]: high and low nibble of each byte. Read only: shared by all calls."""
    byte = torch.arange(256, dtype=torch.int32)
    return torch.stack((byte >> 4, byte & 15), dim=1).view(-1).to(device)


def dequantize(base, shape, dtype):
    """The ATen body: same as `reference`, bit for bit.

    A byte selects two fp32 levels at once from a table of 256 pairs, viewed as float64, so that one index moves 8 bytes; the
    scales follow while the values are in cache. Measured on [2048, 2048] against the C++ (AVX-512) of bitsandbytes 0.50, best of
    60, interleaved, two cores that others used too: to fp32 1.10 ms against 0.56 on one thread (2.0x), 0.71 to 0.75 against 0.27
    to 0.45 on two (1.7x to 2.7x); to bf16 1.36 against 0.51 (2.7x), 0.76 against 0.24 (3.1x). Of the 1.10, copying the codes to
    indices takes 0.09, selecting 0.64 (about a cycle an index), the scales 0.27. Slower: quadruples from a table of 65,536
    (selecting 1.25: it does not fit in L1), take, advanced indexing, embedding (1.9 to 3.3), blocks of 2^17 or less.
    """
    codes, absmax, levels = base
    if dtype == torch.float64:  # Only serves as a truth to compare with.
        return reference(base, shape, dtype)
    n = count(shape)
    out = torch.empty(n, dtype=dtype, device=codes.device)
    whole = n // BLOCK * BLOCK
    _dequantize_blocks(codes.view(-1)[: whole // 2], absmax[: whole // BLOCK], levels, out[:whole])
    if whole < n:
        rest = (codes.view(-1)[whole // 2 :], absmax[-1:], levels)
        out[whole:].copy_(reference(rest, (n - whole,), dtype))
    return out.view(shape)


def _dequantize_blocks(codes, absmax, levels, out):
    """As `dequantize`, of whole blocks, into `out`."""
    # index_select does not use threads; gather does, along other dimensions than the one it selects from.
    rows = 1 if torch.get_num_threads() == 1 else 16
    step = _ELEMENTS if rows == 1 else 2 * _ELEMENTS
    table = levels.index_select(0, _nibbles(levels.device)).view(torch.float64)
    size = min(step, out.numel())
    index = torch.empty(size // 2, dtype=torch.int32 if rows == 1 else torch.int64, device=codes.device)
    room = None if out.dtype == torch.float32 else torch.empty(size, dtype=torch.float32, device=codes.device)
    pieces = zip(codes.split(step // 2), absmax.unsqueeze(1).split(step // BLOCK), out.split(step), strict=True)
    for piece, scale, result in pieces if out.numel() else ():
        values = result if room is None else room[: result.numel()]
        chosen = index[: piece.numel()].copy_(piece)
        if rows == 1:
            torch.index_select(table, 0, chosen, out=values.view(torch.float64))
        else:  # A whole block is 32 bytes of codes: it divides into the rows.
            torch.gather(table.expand(rows, 256), 1, chosen.view(rows, -1), out=values.view(torch.float64).view(rows, -1))
        values.view(-1, BLOCK).mul_(scale)
        if room is not None:
            result.copy_(values)


def dequantize_nested(base, shape, dtype):
    """The ATen body: the scales first, 1/64 of the work, then as `dequantize`."""
    codes, small, levels, nested, table, offset = base
    if dtype == torch.float64:
        return reference_nested(base, shape, dtype)
    scales = table.index_select(0, small.int())
    whole = scales.numel() // NESTED_BLOCK * NESTED_BLOCK
    scales[:whole].view(-1, NESTED_BLOCK).mul_(nested[: whole // NESTED_BLOCK].unsqueeze(1))
    if whole < scales.numel():
        scales[whole:].mul_(nested[-1])
    return dequantize((codes, scales.add_(offset), levels), shape, dtype)


def _blocks(shape):
    return (count(shape) + BLOCK - 1) // BLOCK


def _nested_blocks(shape):
    return (_blocks(shape) + NESTED_BLOCK - 1) // NESTED_BLOCK


def _save(base, shape, dtype):
    codes, absmax, levels = base
    return {"": codes, ".absmax": absmax, ".quant_map": levels, f".{KEY}": quant_state_json(tuple(shape), dtype)}


def _save_nested(base, shape, dtype):
    codes, small, levels, nested, table, offset = base
    state = quant_state_json(tuple(shape), dtype, float(offset))
    return {"": codes, ".absmax": small, ".quant_map": levels, ".nested_absmax": nested, ".nested_quant_map": table, f".{KEY}": state}


def _load_common(entries, shape):
    """The state, the codes and the levels of both forms."""
    state = parse_quant_state(take(entries, f".{KEY}", torch.uint8))
    if state.shape != tuple(shape):
        raise DataError(f"the quantized weight has shape {state.shape}, not {tuple(shape)}", do="read it into the model that it was saved from")
    codes = take(entries, "", torch.uint8)
    if codes.numel() != (count(shape) + 1) // 2:
        raise DataError(f"{codes.numel()} bytes of codes for {count(shape)} weights", do="the file is damaged")
    levels = take(entries, ".quant_map", torch.float32, (16,))
    if levels.tolist() != list(LEVELS):
        raise DataError("the levels are not those of NF4", do="quantize this weight again")
    return state, codes.reshape(-1, 1), levels


def _load(entries, shape):
    state, codes, levels = _load_common(entries, shape)
    if state.nested_offset is not None:
        raise DataError("the scales of this weight are quantized", do="read it as nf4_nested")
    return codes, take(entries, ".absmax", torch.float32, (_blocks(shape),)), levels


def _load_nested(entries, shape):
    state, codes, levels = _load_common(entries, shape)
    if state.nested_offset is None:
        raise DataError("the scales of this weight are not quantized", do="read it as nf4")
    small = take(entries, ".absmax", torch.uint8, (_blocks(shape),))
    nested = take(entries, ".nested_absmax", torch.float32, (_nested_blocks(shape),))
    table = take(entries, ".nested_quant_map", torch.float32, (256,))
    return codes, small, levels, nested, table, torch.tensor(state.nested_offset, dtype=torch.float32)


_CODES = Part("codes", torch.uint8, lambda shape: ((count(shape) + 1) // 2, 1))
_LEVELS = Part("quant_map", torch.float32, lambda shape: (16,))
_SUFFIXES = ("", ".absmax", ".quant_map", f".{KEY}")

NF4 = Format(
    name="nf4",
    parts=(_CODES, Part("absmax", torch.float32, lambda shape: (_blocks(shape),)), _LEVELS),
    quantize=quantize,
    reference=reference,
    dequantize=dequantize,
    bits=lambda shape: 4 + 32 * _blocks(shape) / max(1, count(shape)),
    error=0.0920,
    fits=anything,
    save=_save,
    load=_load,
    suffixes=_SUFFIXES,
    claims=lambda entries: f".{KEY}" in entries and ".absmax" in entries and entries[".absmax"].dtype != torch.uint8,
)
NF4_NESTED = Format(
    name="nf4_nested",
    parts=(
        _CODES,
        Part("absmax", torch.uint8, lambda shape: (_blocks(shape),)),
        _LEVELS,
        Part("nested_absmax", torch.float32, lambda shape: (_nested_blocks(shape),)),
        Part("nested_quant_map", torch.float32, lambda shape: (256,)),
        Part("nested_offset", torch.float32, lambda shape: ()),
    ),
    quantize=quantize_nested,
    reference=reference_nested,
    dequantize=dequantize_nested,
    bits=lambda shape: 4 + (8 * _blocks(shape) + 32 * _nested_blocks(shape)) / max(1, count(shape)),
    error=0.0920,
    fits=anything,
    save=_save_nested,
    load=_load_nested,
    suffixes=(*_SUFFIXES, ".nested_absmax", ".nested_quant_map"),
    claims=lambda entries: f".{KEY}" in entries and ".absmax" in entries and entries[".absmax"].dtype == torch.uint8,
)
