"""Tensors of more than 2^31 elements: no offset of any kernel wraps around.

The tensors are fake and the first, middle and last programs run; an address outside its tensor is an error
(`interpreter/memory.py`). Planted faults are in test_interpreter.py.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from gate.record import cast, run_launchers, with_kernels
from interpreter.runner import Interpreter
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.kernels.launch import Target

# So many processors that programs which loop over rows do few turns.
WIDE = Target("cuda", 90, 227 * 1024, 1 << 14)


@pytest.mark.parametrize("op", with_kernels(), ids=lambda op: op.name)
def test_no_offset_wraps_around(op):
    mode = FakeTensorMode()
    with mode:
        cases = [(label, cast(case, torch.bfloat16)) for label, case in importlib.import_module(f"{op.folder}.cases").huge()]
    assert cases
    for label, case in cases:
        sizes = [arg.numel() for arg in case.args if isinstance(arg, torch.Tensor)]
        assert max(sizes) > 2**31 or op.name == "dequantize", label
        interpreter = Interpreter(virtual=True)
        run_launchers(op, case, WIDE, lambda kernel, args: interpreter, mode)
        assert interpreter.launches, label
