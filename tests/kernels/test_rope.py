"""The launcher of `fxopt::rope`: one launch, layouts that models and autograd give, and nothing compiled for another length."""

from __future__ import annotations

import pytest
import torch
from gate.build import job
from gate.record import launches
from interpreter.runner import interpreted
from oracle import failures, same_bits

from fxopt.kernels.launch import TARGETS
from fxopt.kernels.op import Case
from fxopt.kernels.rope import OP


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(*shape):
    return normal(*shape, seed=1), normal(*shape, seed=2)


LAYOUTS = {
    "one head, a table for each sequence": (normal(3, 1, 5, 8), normal(3, 1, 5, 8, seed=3), *tables(3, 1, 5, 8)),
    "92 columns": (normal(2, 5, 7, 92), normal(2, 1, 7, 92, seed=3), *tables(1, 1, 7, 92)),
    "46 of 92 columns": (normal(2, 5, 7, 92), normal(2, 1, 7, 92, seed=3), *tables(2, 1, 7, 46)),
    "as a projection gives them": (normal(2, 7, 5, 8).transpose(1, 2), normal(2, 7, 1, 8, seed=3).transpose(1, 2), *tables(1, 1, 7, 8)),
    "heads last": (normal(2, 7, 5, 8), normal(2, 7, 1, 8, seed=3), *tables(1, 7, 1, 8)),
    "two dimensions": (normal(7, 8), None, *tables(7, 8)),
    "six dimensions": (normal(2, 3, 2, 2, 5, 8).permute(3, 1, 0, 2, 4, 5), normal(2, 3, 2, 2, 5, 8, seed=3)[:, ::2], *tables(1, 1, 2, 1, 5, 8)),
    "a table for each head": (normal(2, 3, 5, 8), None, *tables(1, 3, 5, 8)),
    "one position for all": (normal(2, 3, 5, 8), normal(2, 1, 5, 8, seed=3), *tables(1, 1, 1, 8)),
    "tables of other strides": (normal(2, 3, 5, 8), None, normal(5, 8, seed=1)[None, None], normal(8, 5, seed=2).t()[None, None]),
    "q and k of other widths": (normal(2, 3, 5, 12), normal(2, 1, 5, 8, seed=3), *tables(1, 1, 5, 8)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("expanded", [False, True])
def test_layouts(layout, interleaved, expanded):
    q, k, cos, sin = LAYOUTS[layout]
    case = Case((q, k, cos, sin, interleaved, False), (0,) if k is None else (0, 1), expanded)
    half = Case((q, k, cos[..., ::2], sin[..., 1::2], interleaved, True), case.grads, expanded)
    with interpreted([OP]) as record:
        assert failures(OP, case) == failures(OP, half) == []
        if q.dim() <= 4:
            assert record.runner.launches["rope_kernel"] == 4, "q and k take one launch in each direction"


def test_one_tensor_as_q_and_k_gives_two():
    x, (cos, sin) = normal(2, 3, 5, 8), tables(1, 1, 5, 8)
    with interpreted([OP]):
        q, k = OP(x, x, cos, sin, False, False)
    assert same_bits(q, k) and q.data_ptr() != k.data_ptr()


def test_mixed_dtypes_take_a_launch_each():
    q, k, (cos, sin) = normal(2, 3, 5, 8).bfloat16(), normal(2, 1, 5, 8).double(), tables(1, 1, 5, 8)
    with interpreted([OP]) as record:
        mine = OP(q, k, cos, sin, False, False)
        assert record.runner.launches["rope_kernel"] == 2
    assert [out.dtype for out in mine] == [torch.bfloat16, torch.float64]
    assert torch.equal(mine[0], OP(q, None, cos, sin, False, False)[0])


@pytest.mark.parametrize("batch", [1, 3])
def test_another_length_compiles_nothing(batch):
    keys = set()
    for length in (16, 48, 100, 117):
        q, k = (normal(batch, length, heads, 64).transpose(1, 2) for heads in (9, 3))
        case = Case((q, k, *tables(1, 1, length, 64), False, False), (0, 1))
        keys |= {job(each, TARGETS[1]).key for each in launches(OP, case, TARGETS[1])}
    assert len(keys) == 2  # forward and backward
