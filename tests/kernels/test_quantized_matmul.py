"""Products with stored weights on a GPU: the way that is taken, and its values, with everything a caller can add to them."""

from __future__ import annotations

import pytest
import torch
from interpreter.runner import SMALL, Interpreter
from torch import Tensor

from fxopt.kernels.dequantize.cases import base_of
from fxopt.kernels.formats import named
from fxopt.kernels.launch import TARGETS, Target, running
from fxopt.kernels.quantized_linear.triton import PROLOGUE, matmul, prologue_rows
from fxopt.kernels.tolerance import eager_error, excess

# So many processors that the depth is cut into parts.
MANY = Target("cuda", 90, 227 * 1024, 132)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
formats = pytest.mark.parametrize("format", PROLOGUE)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def plain(x, weight, transposed, low, factor, scale, bias, dtype):
    """The same in PyTorch, in one dtype."""
    x, weight, low, factor, bias = (None if part is None else part.to(dtype) for part in (x, weight, low, factor, bias))
    y = x @ (weight if transposed else weight.t())
    if low is not None:
        y = y + scale * (low @ factor.t())
    return y if bias is None else y + bias


def check(format: str, dtype: torch.dtype, rows: int, shape, transposed: bool, device: Target = SMALL, rank: int = 0, wide_factor: bool = False, bias: bool = False):
    """Run `matmul`, compare it with fp64; gives the kernels that it started."""
    base = base_of(named(format), normal(*shape, scale=0.1))
    depth, outputs = shape if transposed else shape[::-1]
    x = normal(rows, depth, seed=1).to(dtype)
    factors = torch.float32 if wide_factor else dtype
    low = normal(rows, rank, seed=2).to(factors) if rank else None
    factor = normal(rank, outputs, seed=3, scale=0.1).to(factors).t() if rank else None
    added = normal(outputs, seed=4).to(dtype) if bias else None
    runner = Interpreter()
    with running(runner, device):
        got = matmul(x, base, format, list(shape), transposed, low, factor, 2.0, added)
    assert got.shape == (rows, outputs) and got.dtype == dtype and got.is_contiguous()
    exact = named(format).reference(base, shape, torch.float64)
    rounded = named(format).reference(base, shape, dtype)
    truth = plain(x, exact, transposed, low, factor, 2.0, added, torch.float64)
    error = eager_error(plain(x, rounded, transposed, low, factor, 2.0, added, dtype), truth, dtype)
    assert excess(got, truth, error) <= 0
    return set(runner.launches)


@formats
@dtypes
@pytest.mark.parametrize("transposed", [False, True])
def test_few_rows_are_multiplied_as_they_are_decoded(format: str, dtype: torch.dtype, transposed: bool) -> None:
    for rows, shape in ((1, (96, 64)), (17, (70, 320)), (33, (256, 128))):
        if rows <= prologue_rows(format, shape, dtype, SMALL):
            assert check(format, dtype, rows, shape, transposed, bias=rows == 17) == {"product_kernel"}


@formats
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [3, 16, 70])
def test_an_adapter_is_added_in_the_product(format: str, transposed: bool, rank: int) -> None:
    for wide_factor in (False, True):
        assert check(format, torch.bfloat16, 5, (65, 128), transposed, rank=rank, wide_factor=wide_factor, bias=wide_factor) == {"product_kernel"}


@formats
@pytest.mark.parametrize("transposed", [False, True])
def test_the_depth_is_cut_where_there_are_processors_to_spare(format: str, transposed: bool) -> None:
    """The parts are added; the adapter and the bias are added once."""
    shape = (1100, 64) if transposed else (64, 1152)
    assert check(format, torch.bfloat16, 3, shape, transposed, device=MANY, rank=4, bias=True) == {"product_kernel"}


@pytest.mark.parametrize("name", ["nf4", "int8", "q4_0", "q6_k"])
@pytest.mark.parametrize("transposed", [False, True])
def test_many_rows_and_other_weights_go_through_scratch(name: str, transposed: bool) -> None:
    """Nf4 where a row is not whole blocks, blocks of GGUF files, and more rows than the prologue takes."""
    cases = {"nf4": (5, (7, 33)), "int8": (257, (32, 64)), "q4_0": (5, (24, 96)), "q6_k": (5, (9, 256))}
    kernel = {"nf4": "nf4_kernel", "int8": "per_row_kernel"}.get(name, "blocks_kernel")
    for rank, wide_factor in ((0, False), (4, False), (4, True)):
        assert check(name, torch.bfloat16, *cases[name], transposed, rank=rank, wide_factor=wide_factor, bias=rank > 0) == {kernel}


def test_any_strides_of_x() -> None:
    base, shape = base_of(named("nf4"), normal(64, 128)), [64, 128]
    x = normal(128, 5).bfloat16().t()
    with running(Interpreter(), SMALL):
        for strided in (x, normal(5, 256).bfloat16()[:, ::2], normal(1, 128).bfloat16().expand(5, 128)):
            assert torch.equal(matmul(strided, base, "nf4", shape, False), matmul(strided.contiguous(), base, "nf4", shape, False))


def test_no_rows_and_nan() -> None:
    base, shape = base_of(named("nf4"), normal(64, 128)), [64, 128]
    with running(Interpreter(), SMALL):
        assert matmul(normal(0, 128), base, "nf4", shape, False).shape == (0, 64)
        x = normal(3, 128).bfloat16()
        x[1, 7] = torch.nan
        y = matmul(x, base, "nf4", shape, False)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("device", TARGETS, ids=lambda device: f"{device.backend}:{device.arch}")
def test_where_scratch_begins(device: Target) -> None:
    """More decoding where a device executes more instructions a byte; never less than a tile, never for what has no kernel."""
    shape = [4096, 4096]
    rows = {(format, dtype): prologue_rows(format, shape, dtype, device) for format in PROLOGUE for dtype in (torch.float32, torch.bfloat16)}
    assert all(rows["nf4", dtype] == rows["nf4_nested", dtype] for dtype in (torch.float32, torch.bfloat16))
    assert all(limit >= 16 for limit in rows.values())
    assert rows["nf4", torch.bfloat16] == {80: 64, 90: 192, 100: 64, "gfx942": 32}[device.arch]
    assert prologue_rows("nf4", [4096, 4128], torch.bfloat16, device) == 0
    assert prologue_rows("q4_0", shape, torch.bfloat16, device) == prologue_rows("dense", shape, torch.bfloat16, device) == 0
