"""The JSON tensor that describes an NF4 weight in a bitsandbytes safetensors file.

Beside a weight `W` such a file holds `W.absmax`, `W.quant_map` and `W.quant_state.bitsandbytes__nf4`;
the last is a uint8 tensor of JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from fxopt.errors import DataError

BLOCK = 64
NESTED_BLOCK = 256
KEY = "quant_state.bitsandbytes__nf4"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}


@dataclass(frozen=True)
class QuantState:
    """What the JSON says: the dense shape, the dtype to dequantize to, and the nested offset.

    `nested_offset` is None where the scales are plain fp32, else the mean that was subtracted
    before the scales themselves were quantized in blocks of `nested_blocksize`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nested_blocksize: int | None = None
    nested_offset: float | None = None


def quant_state_json(shape: tuple[int, ...], dtype: torch.dtype, nested_offset: float | None = None) -> torch.Tensor:
    """The uint8 tensor of JSON for a weight of this dense shape and compute dtype.

    Raises:
        DataError: a dtype that the format cannot name.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise DataError(f"an NF4 file cannot hold {dtype}", do=f"use one of {', '.join(_DTYPES)}")
    fields = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": name, "shape": list(shape)}
    if nested_offset is not None:
        fields |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nested_offset}
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def parse_quant_state(tensor: torch.Tensor, where: str | None = None) -> QuantState:
    """Read the JSON tensor back.

    Args:
        tensor: uint8, one dimension. where: the file and key, for the error message.

    Raises:
        DataError: not JSON, a missing or wrong field, another quantization type or block size.
    """
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise DataError(f"an NF4 state must be a flat uint8 tensor, not {found}", where=where)
    try:
        fields = json.loads(bytes(tensor.tolist()))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits.
        raise DataError(f"an NF4 state is not JSON: {error}", where=where) from error
    if not isinstance(fields, dict):
        raise DataError("an NF4 state is not a JSON object", where=where)
    for key, expected in (("quant_type", "nf4"), ("blocksize", BLOCK)):
        if fields.get(key) != expected:
            found = fields.get(key)
            raise DataError(f"{key} is {found!r}, not {expected!r}", where=where, do="quantize this weight again")
    shape, dtype = fields.get("shape"), fields.get("dtype")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise DataError(f"shape is {shape!r}, not a list of sizes", where=where)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise DataError(f"dtype is {dtype!r}, not one of {', '.join(_DTYPES)}", where=where)
    block, offset = fields.get("nested_blocksize"), fields.get("nested_offset")
    if (block is None) != (offset is None):
        raise DataError("only one of nested_blocksize and nested_offset is there", where=where)
    if block is not None:
        if type(block) is not int or block != NESTED_BLOCK or fields.get("nested_dtype", "float32") != "float32":
            found = f"{block!r} of {fields.get('nested_dtype')!r}"
            raise DataError(f"the scales are in blocks of {found}, not {NESTED_BLOCK} of 'float32'", where=where, do="quantize this weight again")
        if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:  # NaN compares false.
            raise DataError(f"nested_offset is {offset!r}, not a finite number", where=where)
        offset = float(offset)
    return QuantState(tuple(shape), _DTYPES[dtype], block, offset)
