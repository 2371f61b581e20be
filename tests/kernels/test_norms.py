"""The norms, with and without a residual add: rows of any width, two results of which one is unused, sums over many rows."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from implementations import Implementation, implementations
from interpreter.runner import interpreted
from oracle import failures, in_fp64, same_bits
from test_contract import recorded

from fxopt.kernels import tiles
from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.launch import TARGETS, running
from fxopt.kernels.layer_norm import triton as layer_norm_kernels
from fxopt.kernels.op import Case
from fxopt.kernels.rms_norm import triton as rms_norm_kernels
from fxopt.kernels.tolerance import excess

OPS = {op.name: op for op in CATALOG}
NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
# What follows the weight (and bias) in an op's arguments.
REST = {"rms_norm": (1e-5, 0.0, "none"), "layer_norm": (1e-5,)}


def each(*names):
    return pytest.mark.parametrize("where", implementations(OPS[name] for name in names))


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(op, shape, dtype=torch.float32):
    """Arguments of a norm: one or two operands, then the parameters."""
    operands = [normal(*shape, dtype=dtype, seed=seed) for seed in range(2 if op.name.startswith("add_") else 1)]
    name = op.name.removeprefix("add_")
    parameters = [normal(shape[-1], dtype=dtype, seed=seed) for seed in range(10, 11 if name == "rms_norm" else 12)]
    return operands, parameters, REST[name]


# -- rows of any width -----------------------------------------------------------------------------------------------


WIDE = {
    "fp32": ((5, 33), torch.float32, 1, False),
    "strided": ((3, 40), torch.float32, 2, False),
    "bf16, expanded": ((2, 3, 64), torch.bfloat16, 1, True),
}


@pytest.mark.parametrize("what", WIDE)
@pytest.mark.parametrize("name", NORMS)
def test_rows_that_registers_do_not_hold(name, what, monkeypatch):
    """With a limit of 16 columns instead of 8,192 or more."""
    for module in (rms_norm_kernels, layer_norm_kernels):
        monkeypatch.setattr(module, "WIDEST", 16)
        monkeypatch.setattr(module, "WIDEST_BACKWARD", 16)
    monkeypatch.setattr(layer_norm_kernels, "WIDEST_WITH_SUMS", 16)
    shape, dtype, step, expanded = WIDE[what]
    operands, parameters, rest = call(OPS[name], (*shape[:-1], step * shape[-1]), dtype)
    tensors = [part[..., ::step] for part in (*operands, *parameters)]
    case = Case((*tensors, *rest), tuple(range(len(tensors))), expanded)
    with interpreted([OPS[name]]) as calls:
        assert failures(OPS[name], case) == []
    kind = name.removeprefix("add_")
    sums = "weight_gradient" if kind == "rms_norm" else "parameter_gradients"
    assert calls.runner.launches == {f"{kind}_forward": 1, f"{kind}_backward_wide": 1, f"{kind}_{sums}": 1}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("width", [1, 64, 576, 577, 4096, 8191, 16384, 20000, 100_000])
def test_tiles(width, target):
    with running(None, target):
        for widest, per_thread in ((16384, 16), (8192, 16), (4096, 8)):
            tile = tiles.row_tile(width, widest, per_thread)
            threads = tile.warps * target.warp
            assert threads <= 1024 and tile.rows * tile.width <= 2 * per_thread * max(threads, 64)
            assert tile.whole == (tile.width >= width) and (tile.whole or tile.rows == 1)
            assert threads * tiles.REGISTERS <= 65536 or target.backend == "hip"


@pytest.mark.parametrize("rows", [1, 16, 17, 1000, 2**20, 2**31])
@pytest.mark.parametrize("width", [1, 576, 16384])
def test_partial_sums_are_few_and_cover_the_rows(rows, width):
    for target in TARGETS:
        with running(None, target):
            chunk = tiles.rows_per_sum(rows, width)
            assert chunk % tiles.SUM_ROWS == 0
            assert -(-rows // chunk) * width * 4 <= max(2 * width, rows * width) * 2, "writing the partial sums costs more than reading the rows"
            assert 1 <= tiles.programs_over(rows, 4) <= max(1, -(-rows // 4))


# -- which kernels run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMS)
def test_frozen_parameters_cost_nothing(name):
    op = OPS[name]
    operands, parameters, rest = call(op, (40, 8))
    kind, width = name.removeprefix("add_"), 8
    with interpreted([op]) as calls, recorded(op.backward.overload):
        operands[0].requires_grad_()
        op(*operands, *parameters, *rest)[0].sum().backward()
        assert calls.runner.launches == {f"{kind}_forward": 1, f"{kind}_backward": 1}
        operands[0].requires_grad_(False)
        for part in parameters:
            part.requires_grad_()
        op(*operands, *parameters, *rest)[0].sum().backward()
    sums = "weight_gradient" if kind == "rms_norm" else "parameter_gradients"
    assert calls.runner.launches == {f"{kind}_forward": 2, f"{kind}_backward": 1, f"{kind}_{sums}": 1}
    assert all(part.grad.shape == (width,) for part in parameters)


# -- two results -----------------------------------------------------------------------------------------------------


@each("add_rms_norm", "add_layer_norm")
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["y", "sum", "both"])
def test_a_result_that_is_not_used_has_no_gradient(where: Implementation, used):
    op = where.op
    device = "cuda" if where.kind == "gpu" else "cpu"

    def gradients(function, change=lambda arg: arg):
        operands, parameters, rest = call(op, (6, 33))
        leaves = [change(part).to(device).detach().requires_grad_() for part in (*operands, *parameters)]
        out = function(*leaves, *rest)
        loss = sum(((i + 1) * out[i].double()).square().sum() for i in used)
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    with where.running(), recorded(op.backward.overload) as calls:
        mine = gradients(op)
    assert len(calls) == (0 in used) and all((args[1] is None) == (1 not in used) for args, _ in calls)
    plain, true = gradients(op.reference), gradients(op.reference, in_fp64)
    for m, p, t in zip(mine, plain, true, strict=True):
        assert (m is None) == (t is None)
        assert m is None or excess(m, t, float((p.double() - t).abs().max())) <= 0
    assert same_bits(mine[0], mine[1])


@each("add_rms_norm", "add_layer_norm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_an_add_and_a_norm(where: Implementation, dtype):
    """Bit for bit: the sum is rounded before the norm reads it."""
    op, norm = where.op, OPS[where.op.name.removeprefix("add_")]
    operands, parameters, rest = call(op, (7, 130), dtype)
    device = "cuda" if where.kind == "gpu" else "cpu"
    operands, parameters = ([part.to(device) for part in parts] for parts in (operands, parameters))
    with where.running():
        y, total = op(*operands, *parameters, *rest)
    with Implementation(norm, where.kind).running():
        (expected,) = norm(total, *parameters, *rest)
    assert same_bits(total, operands[0] + operands[1]) and same_bits(y, expected)


@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_operands_are_not_broadcast(name):
    (x, residual), parameters, rest = call(OPS[name], (6, 8))
    with pytest.raises(RuntimeError, match="residual is"):
        OPS[name](x, residual[:1], *parameters, *rest)
    with pytest.raises(Exception, match="residual is torch.bfloat16"):
        OPS[name](x, residual.bfloat16(), *parameters, *rest)


# -- sums over many rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [True, False], ids=["with dx", "without"])
@pytest.mark.parametrize("kind", ["aten", "interpreter"])
@pytest.mark.parametrize("name", NORMS)
def test_parameter_gradients_are_summed_in_fp32(name, kind, together):
    """400 rows on one processor: each of its programs adds up 100 or more."""
    op = OPS[name]
    operands, parameters, rest = call(op, (400, 2048), torch.bfloat16)
    operands = [operands[0].abs(), *map(torch.zeros_like, operands[1:])]  # The sum is exact.

    def gradient(function, change=lambda arg: arg):
        leaves = [change(part) for part in (*operands, *parameters)]
        for part in leaves[0 if together else len(operands) :]:
            part.requires_grad_()
        out = function(*leaves, *rest)[0]
        return torch.autograd.grad(out, leaves[len(operands) :], torch.ones_like(out))

    one = dataclasses.replace(TARGETS[1], processors=1)
    with interpreted([op], one) if kind == "interpreter" else contextlib.nullcontext():
        mine = gradient(op)
    for m, t in zip(mine, gradient(op.reference, in_fp64), strict=True):
        assert excess(m, t, float(torch.finfo(torch.float32).eps * 400 * t.abs().max())) <= 0
