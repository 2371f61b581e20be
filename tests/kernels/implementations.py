"""Where an op runs in the contract tests: its ATen body, its Triton kernels in the interpreter, its Triton kernels on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch
from gate.record import with_kernels
from interpreter.runner import interpreted

from fxopt.kernels.catalog import CATALOG
from fxopt.kernels.op import Case, FusedOp

# Kernels that use float atomics, or memory that programs pass to each other, and why they may.
RACY: dict[str, str] = {}

# Ops that torch's own kernels run on a GPU, and why: there is nothing to interpret or to compile.
FOREIGN: dict[str, str] = {"packed_attention": "attention stays with torch, whose kernels are as fast as the hardware"}


@dataclass(frozen=True)
class Implementation:
    """An op and what runs it: "aten", "interpreter" or "gpu"; and the share of a test's cases that it runs on."""

    op: FusedOp
    kind: str
    share: float = 1.0

    def running(self, must_start: str = "ops") -> AbstractContextManager[object]:
        """Inside, calls of the op on this implementation's device run this implementation; see `interpreted`."""
        return interpreted([self.op], racy=RACY, must_start=must_start) if self.kind == "interpreter" else contextlib.nullcontext()

    def on_device(self, case: Case) -> Case:
        """The same call with its tensors where the implementation reads them, strides kept."""
        if self.kind != "gpu":
            return case
        return dataclasses.replace(case, args=tuple(_to_gpu(arg) if isinstance(arg, torch.Tensor) else arg for arg in case.args))


# The interpreter takes a second for a handful of cases: all of them on every op take half of the CI's time. `pytest -m slow` runs all.
INTERPRETED = 0.15
COMPOSED = 0.25  # of the ATen bodies' cases


def _to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    cells = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).cuda()
    return cells.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def implementations(ops: Iterable[FusedOp]) -> list[object]:
    """Every implementation of these ops, as parameters of a test."""
    found: list[object] = []
    for op in ops:
        found.append(pytest.param(Implementation(op, "aten", COMPOSED), id=f"{op.name}-aten"))
        found.append(pytest.param(Implementation(op, "aten"), id=f"{op.name}-aten-all", marks=pytest.mark.slow))
        if op in with_kernels():
            found.append(pytest.param(Implementation(op, "interpreter", INTERPRETED), id=f"{op.name}-interpreter"))
            found.append(pytest.param(Implementation(op, "interpreter"), id=f"{op.name}-interpreter-all", marks=pytest.mark.slow))
        found.append(pytest.param(Implementation(op, "gpu"), id=f"{op.name}-gpu", marks=pytest.mark.gpu))
    return found


every_implementation = pytest.mark.parametrize("where", implementations(CATALOG))
differentiable = pytest.mark.parametrize("where", implementations(op for op in CATALOG if op.backward is not None))
