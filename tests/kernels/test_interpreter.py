"""The interpreter computes as a GPU does, and sees every planted fault."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from interpreter.builder import NotImitated, bf16_to_fp32, fp32_to_bf16
from interpreter.memory import KernelFault
from interpreter.runner import SMALL, Interpreter, interpreted
from oracle import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.launch import launch, running
from fxopt.kernels.swiglu import body
from fxopt.kernels.swiglu import triton as swiglu_kernels

SWIGLU = next(op for op in CATALOG if op.name == "swiglu")


def start(kernel, grid, *args, virtual=False, racy=(), **meta):
    with running(Interpreter(virtual, racy), SMALL):
        launch(kernel, grid, *args, **meta)


# -- arithmetic ------------------------------------------------------------------------------------------------------


def test_bfloat16_is_converted_as_torch_does():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    wide = every.view(torch.bfloat16).float()
    assert same_bits(torch.from_numpy(bf16_to_fp32(every.numpy())), wide)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 1e-40, 1.00390625, 1.01171875])
    drawn = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32).view(torch.float32)
    values = torch.cat([special, drawn])
    mine = torch.from_numpy(fp32_to_bf16(values.numpy())).view(torch.bfloat16)
    theirs = values.bfloat16()
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert same_bits(mine[~mine.isnan()], theirs[~theirs.isnan()])


@triton.jit
def arithmetic(X, Y, SUM, PRODUCT, LESS, SMALLEST, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    inside = o < n
    x, y = tl.load(X + o, mask=inside), tl.load(Y + o, mask=inside)
    tl.store(SUM + o, x + y, mask=inside)
    tl.store(PRODUCT + o, x * y, mask=inside)
    tl.store(LESS + o, (x < y).to(tl.float32), mask=inside)
    tl.store(SMALLEST + o, tl.minimum(x, y), mask=inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arithmetic_is_that_of_the_dtype(dtype):
    x, y = (torch.randn(100, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    out = [torch.empty(100, dtype=dtype) for _ in range(4)]
    start(arithmetic, (1,), x, y, *out, 100, BLOCK=128)
    for mine, theirs in zip(out, (x + y, x * y, (x < y).to(dtype), torch.minimum(x, y)), strict=True):
        assert same_bits(mine, theirs)


@triton.jit
def product(A, B, C, PRECISION: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    at = o[:, None] * N + o[None, :]
    c = tl.dot(tl.load(A + at), tl.load(B + at), input_precision=PRECISION)
    tl.store(C + at, c.to(C.dtype.element_ty))


def dot(dtype, precision="ieee", n=16):
    a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    c = torch.empty(n, n, dtype=dtype)
    start(product, (1,), a, b, c, precision, n)
    return float((c.double() - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()) / torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_product_accumulates_in_fp32(dtype):
    assert dot(dtype) < 4


def test_a_product_in_tf32_is_seen():
    assert dot(torch.float32, "tf32") > 100


def test_a_small_product_is_refused():
    with pytest.raises((AssertionError, triton.compiler.errors.CompilationError), match=r"[kK] >= 16"):
        dot(torch.float32, n=8)


@triton.jit
def sum_as_stored(X, OUT, BLOCK: tl.constexpr):
    tl.store(OUT, tl.sum(tl.load(X + tl.arange(0, BLOCK)), axis=0))


def test_a_sum_of_16_bit_floats_is_refused():
    out = torch.empty(1)
    start(sum_as_stored, (1,), torch.ones(16), out, BLOCK=16)
    assert out.item() == 16
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(NotImitated, match="fp32"):
            start(sum_as_stored, (1,), torch.ones(16, dtype=dtype), torch.empty(1, dtype=dtype), BLOCK=16)


@triton.jit
def largest(X, OUT, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(OUT, tl.max(tl.load(X + o, mask=o < n, other=float("-inf")), axis=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_maximum_skips_nan_as_a_gpu_does(dtype):
    x, out = torch.tensor([-2.0, float("nan"), -1.0], dtype=dtype), torch.empty(1, dtype=dtype)
    start(largest, (1,), x, out, 3, BLOCK=4)
    assert out.item() == -1


@triton.jit
def scalars(OUT, eps, one, many):
    tl.store(OUT, tl.cast(eps, tl.float64))
    tl.store(OUT + 1, tl.cast(many + one, tl.float64))


def test_scalars_arrive_as_a_launch_passes_them():
    out = torch.empty(2, dtype=torch.float64)
    start(scalars, (1,), out, 1e-5, 1, 2**40)
    assert out.tolist() == [torch.tensor(1e-5).double().item(), 2**40 + 1]


@triton.jit
def one_has_no_type(OUT, n):
    tl.store(OUT, n.to(tl.float32))


def test_an_int_of_one_is_a_constant():
    start(one_has_no_type, (1,), torch.empty(1), 2)
    with pytest.raises(triton.compiler.errors.CompilationError):
        start(one_has_no_type, (1,), torch.empty(1), 1)


@triton.jit(do_not_specialize=["n"])
def any_int_has_a_type(OUT, n):
    tl.store(OUT, n.to(tl.float32))


def test_but_not_where_the_kernel_says_so():
    out = torch.empty(1)
    start(any_int_has_a_type, (1,), out, 1)
    assert out.item() == 1


@triton.jit
def changes_a_type(X, OUT, n):
    total = 0
    for i in range(n):
        total += tl.load(X + i)
    tl.store(OUT, total)


def test_a_loop_that_changes_a_type_is_seen():
    with pytest.raises(triton.compiler.errors.CompilationError):
        start(changes_a_type, (1,), torch.ones(3), torch.empty(1), 3)


def test_the_language_is_as_before():
    before = {owner: dict(vars(owner)) for owner in (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype)}
    start(largest, (1,), torch.ones(3), torch.empty(1), 3, BLOCK=4)
    with pytest.raises(KernelFault):
        start(reads_beyond, (1,), torch.ones(3), torch.empty(3), 3, BLOCK=4)
    assert all(dict(vars(owner)) == names for owner, names in before.items())


# -- memory ----------------------------------------------------------------------------------------------------------


@triton.jit
def reads_beyond(X, Y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + o, tl.load(X + o), mask=o < n)


@triton.jit
def writes_beyond(X, Y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + o, tl.load(X + o, mask=o < n, other=0.0), mask=o < n + 1)


@triton.jit
def overlaps(X, Y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(Y + o, tl.load(X + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def passes_on(X, Y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + o, tl.load(Y + o - BLOCK, mask=(o >= BLOCK) & (o < n), other=0.0), mask=o < n)


@triton.jit
def reads_ahead(X, Y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + o, tl.load(Y + o + BLOCK, mask=o + BLOCK < n, other=0.0), mask=o < n)


@triton.jit
def stores_twice(X, Y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + o // 2, tl.load(X + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def adds_floats(X, Y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(Y + o * 0, tl.load(X + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def another_argument(X, Y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gap = Y.to(tl.int64) - X.to(tl.int64)
    tl.store(X + (o - gap // 4) // 2, tl.load(X + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def copies(X, Y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + o, tl.load(X + o, mask=o < n, other=0.0), mask=o < n)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (reads_beyond, r"program \(3, 0, 0\): load with 28 of 32 addresses outside X"),
        (writes_beyond, r"store with 1 of 5 addresses outside Y"),
        (overlaps, "another program stored"),
        (passes_on, "loads what another program stores"),
        (reads_ahead, "stores where another program loads"),
        (stores_twice, "twice"),
        (adds_floats, "adds floats in an order that varies"),
        (another_argument, "store with"),
    ],
    ids=lambda part: getattr(getattr(part, "fn", None), "__name__", ""),
)
def test_a_wrong_access_is_seen(kernel, message):
    with pytest.raises(KernelFault, match=message):
        start(kernel, (4,), torch.randn(100), torch.zeros(100), 100, BLOCK=32)


def test_a_right_access_is_not():
    x, y = torch.randn(100), torch.empty(100)
    start(copies, (4,), x, y, 100, BLOCK=32)
    assert same_bits(x, y)


def test_the_neighbour_in_a_storage_is_outside():
    whole = torch.zeros(8, 4)
    start(copies, (1,), whole[:4].flatten(), whole[4:].flatten(), 16, BLOCK=16)
    with pytest.raises(KernelFault, match="outside Y"):
        start(copies, (1,), torch.ones(17), whole[:4].view(16), 17, BLOCK=32)
    with pytest.raises(KernelFault, match="outside Y"):
        start(copies, (1,), torch.ones(4), whole[:, 0], 4, BLOCK=4)


def test_a_declared_kernel_may_add_floats():
    y = torch.zeros(1)
    start(adds_floats, (4,), torch.ones(100), y, 100, BLOCK=32, racy=["adds_floats"])
    assert y.item() == 100


@triton.jit
def counts(X, COUNT, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = o < n
    tl.atomic_add(COUNT + tl.load(X + o, mask=inside, other=0), 1, mask=inside)


def test_programs_may_count():
    classes = torch.randint(0, 5, (100,), generator=torch.Generator().manual_seed(0))
    count = torch.zeros(5, dtype=torch.int32)
    start(counts, (4,), classes, count, 100, BLOCK=32)
    assert torch.equal(count.long(), classes.bincount(minlength=5))


@triton.jit
def no_other(X, OUT, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(OUT, tl.sum(tl.load(X + o, mask=o < n), axis=0))


def test_a_lane_that_nothing_was_loaded_into_is_undefined():
    out = torch.empty(1)
    start(no_other, (1,), torch.ones(3), out, 3, BLOCK=4)
    assert out.isnan().all()


# -- offsets ---------------------------------------------------------------------------------------------------------


@triton.jit
def rows_in_int32(X, Y, width, BLOCK: tl.constexpr):
    row, o = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(Y + row * width + o, tl.load(X + row * width + o, mask=o < width), mask=o < width)


@triton.jit
def rows_in_int64(X, Y, width, BLOCK: tl.constexpr):
    row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    tl.store(Y + row * width + o, tl.load(X + row * width + o, mask=o < width), mask=o < width)


def test_an_offset_that_wraps_around_is_seen():
    with FakeTensorMode():
        x, y = (torch.empty(80_000, 36_864, dtype=torch.bfloat16) for _ in range(2))
    start(rows_in_int64, (80_000,), x, y, 36_864, BLOCK=65_536, virtual=True)
    with pytest.raises(KernelFault, match=r"program \(79999, 0, 0\): load with 36864 of 36864 addresses outside X"):
        start(rows_in_int32, (80_000,), x, y, 36_864, BLOCK=65_536, virtual=True)


# -- launchers -------------------------------------------------------------------------------------------------------


def planted(monkeypatch, launcher):
    monkeypatch.setattr(swiglu_kernels, "forward", launcher)
    with interpreted([SWIGLU], must_start="operators"):
        return SWIGLU(torch.randn(3, 5), torch.randn(3, 5))[0]


def test_a_launcher_that_starts_nothing_is_seen(monkeypatch):
    with pytest.raises(AssertionError, match="no Triton kernel was started: swiglu in torch.float32"):
        planted(monkeypatch, lambda gate, up: SWIGLU.reference(gate, up)[0])


def test_a_launcher_that_hands_over_to_the_body_is_seen(monkeypatch):
    with pytest.raises(AssertionError, match="called the ATen body"):
        planted(monkeypatch, lambda gate, up: body.forward(gate, up))


def test_memory_that_nothing_wrote_is_nan(monkeypatch):
    def forward(gate, up):
        y = gate.new_empty(gate.shape)
        launch(copies, (1,), gate, y, 10, BLOCK=16)
        return y

    y = planted(monkeypatch, forward)
    assert y.flatten()[:10].isfinite().all() and y.flatten()[10:].isnan().all()


def test_ops_are_as_before():
    def call():
        return SWIGLU(torch.ones(3, 5), torch.ones(3, 5))[0]

    forward, before = body.forward, call()
    with interpreted([SWIGLU]) as calls:
        inside = call()
    assert calls.runner.launches.total() == 1
    assert body.forward is forward and same_bits(before, call())
    assert torch.allclose(inside, before, rtol=torch.finfo(torch.float32).eps)
    assert not torch.are_deterministic_algorithms_enabled()
