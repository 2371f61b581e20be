"""What precision is worth in time: from the rates of the dtypes, products and bytes."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn as nn

from fxopt.ir.capture import Call, capture
from fxopt.passes.pipeline import run
from fxopt.runtime.machine import Machine
from fxopt.runtime.precision_time import predicted

FLOPS = 2 * 8 * 64 * 64  # of one product


@pytest.mark.parametrize("bf16", [4e9, 1e9, 25e7])
def test_products_count_at_the_rate_of_their_dtype(bf16: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    program = run("canonicalize | precision(bf16)", capture(model, Call.of((torch.randn(8, 64),), {})))
    (line,) = predicted(program, [], Machine({"float32": 1e9, "bfloat16": bf16}, 1e30, 1e30, 0.0))
    before, after, change, way = re.search(r"capture (\S+) s before, (\S+) s after: (\S+) s (less|more)", line).groups()
    assert (before, after) == (f"{2 * FLOPS / 1e9:.2g}", f"{2 * FLOPS / bf16:.2g}") and change == f"{abs(2 * FLOPS / 1e9 - 2 * FLOPS / bf16):.2g}"
    assert way == ("less" if bf16 >= 1e9 else "more")
    assert "bfloat16" in line and predicted(run("canonicalize", program.parent.parent), []) == []
