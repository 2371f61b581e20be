"""The compile gate sees every planted fault, and the kernels that launchers start."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from gate import budget
from gate.build import Job, build, job, written
from gate.record import Launch, cast, fake_calls, launches, rows, with_kernels, without_kernels
from implementations import FOREIGN
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.launch import TARGETS
from fxopt.kernels.op import Case

OPS = {op.name: op for op in CATALOG}
AMPERE, HOPPER = TARGETS[0], TARGETS[1]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def start(kernel, *args, **meta):
    return Launch(kernel, (1,), args, meta, frozenset())


def compiled(kernel, *args, target=HOPPER, **meta):
    work = job(start(kernel, *args, **meta), target)
    return work, build(work)


@triton.jit
def doubles(X, Y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(Y + o, tl.load(X + o, mask=o < n) * 2, mask=o < n)


@triton.jit
def in_place(X, Y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(X + o, mask=o < n)
    tl.store(X + o, x * 2, mask=o < n)
    tl.store(Y + o, x, mask=o < n)


@triton.jit
def sums_by_hand(X, Y, N: tl.constexpr):
    o = tl.arange(0, N)
    tile = tl.load(X + o[:, None] * N + o[None, :])
    tl.store(Y + o[:, None] * N + o[None, :], tile - tl.sum(tile, axis=0)[None, :] + tl.sum(tile, axis=1)[:, None])


@triton.jit
def product(A, B, C, N: tl.constexpr):
    o = tl.arange(0, N)
    at = o[:, None] * N + o[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at), input_precision="ieee").to(C.dtype.element_ty))


@triton.jit
def has_no_types(X, n):
    tl.store(X, n.to(tl.float32))


def tensors(count, *shape, dtype=torch.float32):
    with FakeTensorMode():
        return [torch.empty(shape, dtype=dtype) for _ in range(count)]


def test_a_good_kernel_passes_for_every_target():
    for target in TARGETS:
        work, found = compiled(doubles, *tensors(2, 100), 100, BLOCK=128, target=target)
        assert budget.faults(work, found, None) == []
        assert found["registers"] > 0 and not found["mma"] and not found["narrow"]


def test_spills_are_seen():
    work, found = compiled(sums_by_hand, *tensors(2, 128, 128), N=128, num_warps=1)
    assert any("spills" in fault for fault in budget.faults(work, found, None))


def test_too_much_shared_memory_is_seen():
    work, found = compiled(product, *tensors(3, 64, 64, dtype=torch.bfloat16), N=64)
    assert budget.faults(work, found, None) == []
    small = dataclasses.replace(work, target=dataclasses.replace(HOPPER, shared=found["shared"] - 1))
    assert any("shared memory, the device has" in fault for fault in budget.faults(small, found, None))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_tensor_cores_are_seen(target):
    work, found = compiled(product, *tensors(3, 64, 64, dtype=torch.bfloat16), N=64, target=target)
    assert found["narrow"] and found["mma"] > 0
    assert "tl.dot without tensor-core instructions" in budget.faults(work, found | {"mma": 0}, None)
    _, wide = compiled(product, *tensors(3, 64, 64), N=64, target=target)
    assert not wide["narrow"]


def test_a_kernel_that_does_not_compile_is_seen():
    work, found = compiled(has_no_types, *tensors(1, 4), 2)
    assert budget.faults(work, found, None) == []
    work, found = compiled(has_no_types, *tensors(1, 4), 1)  # An int 1 is a constant, which has no .to().
    assert any("does not compile" in fault for fault in budget.faults(work, found, None))


FOUND = {"registers": 40, "shared": 1024, "spills": 0, "mma": 4, "narrow": True}
WORK = Job("", "", (), (), HOPPER, "k")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 45}, "45 registers"),
        ({"shared": 1040}, "1040 bytes"),
        ({"mma": 0}, "no tensor-core"),
        ({"spills": 1}, "1 spills"),
        ({"failed": "x"}, "does not compile"),
    ],
)
def test_a_regression_is_seen(change, words):
    allowed = {"k": {"cuda:90": [40, 1024, 0, 4]}}
    assert budget.faults(WORK, FOUND, allowed) == []
    assert budget.faults(WORK, FOUND | {"registers": 44}, allowed) == []
    assert budget.faults(WORK, FOUND | {"registers": 32}, {"k": {"cuda:90": [20, 1024, 0, 4]}}) == []
    assert any(words in fault for fault in budget.faults(WORK, FOUND | change, allowed))


def test_an_unknown_kernel_and_a_forgotten_one_are_seen():
    assert any("not in gate/budget.json" in fault for fault in budget.faults(WORK, FOUND, {}))
    assert any("not in gate/budget.json" in fault for fault in budget.faults(WORK, FOUND, {"k": {"cuda:80": [1, 1, 0, 0]}}))
    assert budget.stale([WORK], {"k": {}, "old": {}}) == ["old"]


def test_the_budget_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "FILE", tmp_path / "budget.json")
    assert budget.read("3.7.1") == {}
    one, other = {"k": {"cuda:90": [1, 2, 0, 3]}}, {"l": {"cuda:80": [4, 5, 0, 0]}}
    budget.write("3.7.1", one)
    budget.write("3.6.0", other)
    assert budget.read("3.7.1") == one and budget.read("3.6.0") == other


def test_what_a_kernel_writes_is_known():
    x, y = tensors(2, 100)
    assert written(start(doubles, x, y, 100, BLOCK=128), HOPPER) == {"Y"}
    assert written(start(in_place, x, y, 100, BLOCK=128), HOPPER) == {"X", "Y"}


def test_the_inputs_of_a_launch_are_known():
    ((_, case),) = rows(OPS["swiglu"])
    forward, backward = launches(OPS["swiglu"], case, HOPPER)
    assert forward.kernel.fn.__name__ == "gated_forward" and forward.inputs == {"gate", "up"}
    assert backward.kernel.fn.__name__ == "gated_backward" and backward.inputs == {"dy", "gate", "up"}
    assert written(backward, AMPERE) == {"dgate", "dup"}


def test_rows_are_cast():
    ((_, case),) = rows(OPS["swiglu"])
    for dtype in (torch.bfloat16, torch.float16):
        assert {arg.dtype for arg in cast(case, dtype).args} == {dtype}
        halves = Case(torch.randn(3, 10).chunk(2, -1))
        for mine, theirs in zip(cast(halves, dtype).args, halves.args, strict=True):
            assert torch.equal(mine, theirs.to(dtype)) and mine.stride() == theirs.stride()
        keys = [job(launch, HOPPER).key for launch in launches(OPS["swiglu"], cast(case, dtype), HOPPER)]
        assert all({torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype] in key for key in keys)


def test_only_the_ops_that_say_why_have_no_kernels():
    assert {op.name for op in without_kernels()} == set(FOREIGN)
    assert {op.name for op in with_kernels()} | set(FOREIGN) == set(OPS)


@pytest.mark.parametrize("op", CATALOG, ids=lambda op: op.name)
def test_a_row_calls_forward_and_backward(op):
    for _, case in rows(op):
        for dtype in (torch.float32, torch.bfloat16):
            called = [kernel.name for kernel, _ in fake_calls(op, cast(case, dtype), FakeTensorMode())]
            assert called == [kernel.name for kernel in (op.kernels if case.grads else op.kernels[:1])]
