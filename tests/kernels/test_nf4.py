"""NF4 is bitsandbytes' NF4: every code, every scale, every weight, every field of the file."""

from __future__ import annotations

import json
import math

import bitsandbytes.functional as bnb
import pytest
import torch
from oracle import same_bits

from fxopt.errors import CheckError, DataError
from fxopt.kernels.formats import FORMATS
from fxopt.kernels.formats.nf4 import LEVELS
from fxopt.kernels.formats.nf4_state import parse_quant_state, quant_state_json

SHAPES = [(64,), (128, 64), (5, 13), (33, 66), (3, 43), (1, 1), (7,), (257, 1025)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weights(shape, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))) * 0.05).to(dtype)


def quantize(weight):
    return FORMATS["nf4"].quantize(weight)[:2]


def dequantize(packed, absmax, shape, dtype):
    return torch.ops.fxopt.dequantize([packed, absmax, torch.tensor(LEVELS)], "nf4", list(shape), dtype)


def test_levels_are_theirs():
    assert same_bits(torch.tensor(LEVELS), bnb.get_4bit_type("nf4", device="cpu"))


@every_shape
@every_dtype
def test_quantize_is_bit_exact(shape, dtype):
    weight = weights(shape, dtype)
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed, absmax = quantize(weight)
    assert same_bits(absmax, state.absmax)
    assert packed.shape == theirs.shape
    count = weight.numel()
    assert same_bits(packed[: count // 2], theirs[: count // 2])
    if count % 2:  # The low nibble of the last byte is nobody's.
        assert same_bits(packed[-1] >> 4, theirs[-1] >> 4)


@every_shape
@every_dtype
def test_dequantize_is_bit_exact(shape, dtype):
    theirs, state = bnb.quantize_4bit(weights(shape, dtype), blocksize=64, quant_type="nf4")
    assert same_bits(dequantize(theirs, state.absmax, shape, dtype), bnb.dequantize_4bit(theirs, state).view(shape))


@every_shape
def test_they_read_what_we_write(shape):
    weight = weights(shape)
    packed, absmax = quantize(weight)
    state = bnb.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=bnb.get_4bit_type("nf4", device="cpu"),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
    )
    assert same_bits(bnb.dequantize_4bit(packed, state).view(shape), dequantize(packed, absmax, shape, torch.float32))


@pytest.mark.parametrize("many", [2**18 - 2, 2**18, 2**18 + 1, 2**19 + 77])
@every_dtype
def test_across_the_blocks_of_the_loop(many, dtype):
    theirs, state = bnb.quantize_4bit(weights((many,), dtype), blocksize=64, quant_type="nf4")
    assert same_bits(dequantize(theirs, state.absmax, (many,), dtype), bnb.dequantize_4bit(theirs, state).view(-1))


def test_a_block_of_zeros_stays_zero():
    weight = torch.zeros(3, 64)
    weight[1, 5] = 0.25
    packed, absmax = quantize(weight)
    assert torch.equal(dequantize(packed, absmax, weight.shape, torch.float32), weight)


def test_no_result_shares_memory_with_another():
    """Global scratch buffers race between streams and between layers."""
    packed, absmax = quantize(weights((64, 64)))
    one = dequantize(packed, absmax, (64, 64), torch.float32)
    kept = one.clone()
    other = dequantize(packed, -absmax, (64, 64), torch.float32)
    assert same_bits(one, kept) and torch.equal(other, -one)


@pytest.mark.parametrize(
    ("codes", "scales", "error"),
    [
        (torch.zeros(31, 1, dtype=torch.uint8), torch.ones(1), RuntimeError),
        (torch.zeros(32, 1, dtype=torch.uint8), torch.ones(2), RuntimeError),
        (torch.zeros(32, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8), CheckError),
        (torch.zeros(32, 1, dtype=torch.int8), torch.ones(1), CheckError),
    ],
)
def test_wrong_parts_are_refused(codes, scales, error):
    with pytest.raises(error):
        dequantize(codes, scales, (8, 8), torch.float32)


@every_dtype
def test_the_state_is_read_and_written_as_they_do(dtype):
    shape = (33, 66)
    _, state = bnb.quantize_4bit(weights(shape, dtype), blocksize=64, quant_type="nf4")
    theirs = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]
    mine = quant_state_json(shape, dtype)
    assert json.loads(bytes(mine.tolist())) == json.loads(bytes(theirs.tolist()))
    for tensor in (theirs, mine):
        parsed = parse_quant_state(tensor)
        assert (parsed.shape, parsed.dtype, parsed.nested_offset) == (shape, dtype, None)


def test_a_nested_state_is_read():
    _, state = bnb.quantize_4bit(weights((128, 64)), blocksize=64, quant_type="nf4", compress_statistics=True)
    parsed = parse_quant_state(state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"])
    assert parsed.nested_blocksize == state.state2.blocksize
    assert parsed.nested_offset == float(state.offset)


GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 4]}


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "tensor",
    [
        as_bytes("{"),
        as_bytes("[1]"),
        torch.tensor([255, 254], dtype=torch.uint8),
        torch.zeros(4),
        torch.zeros(2, 2, dtype=torch.uint8),
        *(
            as_bytes(json.dumps(GOOD | change))
            for change in (
                {"quant_type": "fp4"},
                {"blocksize": 128},
                {"shape": "4"},
                {"shape": [4, -4]},
                {"shape": [True]},
                {"dtype": "int8"},
                {"dtype": ["float32"]},
                {"nested_offset": 1.0},
                {"nested_offset": "x", "nested_blocksize": 256},
            )
        ),
        as_bytes("[" * 100_000),
    ],
)
def test_a_bad_state_is_a_data_error(tensor):
    with pytest.raises(DataError, match="where"):
        parse_quant_state(tensor, where="model.safetensors: layer.weight")


def test_a_dtype_that_the_format_cannot_name_is_refused():
    with pytest.raises(DataError):
        quant_state_json((4, 4), torch.float64)
