"""Dequantization gives the same bits in plain PyTorch, in the ATen body on any number of threads, and in the Triton kernels."""

from __future__ import annotations

import pytest
import torch
from interpreter.runner import SMALL, Interpreter
from oracle import same_bits
from torch import Tensor

from fxopt.kernels.dequantize import body, triton
from fxopt.kernels.dequantize.cases import base_of
from fxopt.kernels.dequantize.triton import dense
from fxopt.kernels.formats import FORMATS, Format, named
from fxopt.kernels.launch import running

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.05


def in_triton(base, format: Format, shape, dtype: torch.dtype) -> Tensor:
    with running(Interpreter(), SMALL):
        return dense(base, format.name, list(shape), dtype)


@every_format
def test_triton_gives_the_bits_of_the_reference(format: Format) -> None:
    shapes = ((5, 256), (3, 1536), (2, 3, 256), (1, 1), (7, 13), (33, 66), (65, 64), (0, 256))
    for shape in (shape for shape in shapes if format.fits(shape) is None):
        base = base_of(format, normal(*shape))
        for dtype in DTYPES:
            assert same_bits(in_triton(base, format, shape, dtype), format.reference(base, shape, dtype)), (shape, dtype)


def test_every_code_of_fp8() -> None:
    """Subnormals, the two zeros, the two NaNs."""
    codes, usual, extreme = torch.arange(256, dtype=torch.uint8).repeat(2, 1), torch.tensor([[1.0], [0.037]]), torch.tensor([[1.0], [-3e38]])
    # without NaN and with usual scales the ATen body takes its fast way
    for rows, scale in ((codes, usual), (codes & 126, usual), (codes & 126, extreme)):
        right = rows.view(torch.float8_e4m3fn).float() * scale
        for read in (named("fp8").reference, named("fp8").dequantize, lambda *args: in_triton(args[0], named("fp8"), *args[1:])):
            values = read((rows, scale), (2, 256), torch.float32)
            assert same_bits(values.nan_to_num(nan=7.0, posinf=torch.inf, neginf=-torch.inf), right.nan_to_num(nan=7.0, posinf=torch.inf, neginf=-torch.inf))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["nf4", "nf4_nested", "int8", "fp8"])
@pytest.mark.parametrize("columns", [64, 96, 65, 2**18 + 64, 2**19 + 77])
def test_two_threads_give_the_bits_of_one(name: str, columns: int, two_threads) -> None:
    format, shape = named(name), (2, columns)
    base = format.quantize(normal(*shape))
    for dtype in DTYPES:
        assert same_bits(format.dequantize(base, shape, dtype), format.reference(base, shape, dtype))


@every_format
def test_the_result_shares_no_memory(format: Format) -> None:
    """Also of "dense", through the op; and parts may have any strides."""
    shape = (4, 256)
    base = base_of(format, normal(*shape))
    before = [part.clone() for part in base]
    for parts in (base, [torch.stack((part, part), dim=-1)[..., 0] for part in base]):
        weight = torch.ops.fxopt.dequantize(list(parts), format.name, list(shape), torch.float32)
        assert same_bits(weight, format.reference(before, shape, torch.float32))
        weight.fill_(7)
        assert all(map(same_bits, parts, before))


def test_a_dense_weight_of_any_strides_becomes_contiguous() -> None:
    weight = normal(5, 13).t().contiguous().t()
    for dtype in DTYPES:
        for kernel in (body, triton):
            found = kernel.forward([weight], "dense", [5, 13], dtype)
            assert found.is_contiguous() and found.data_ptr() != weight.data_ptr()
            assert same_bits(found, weight.to(dtype))
