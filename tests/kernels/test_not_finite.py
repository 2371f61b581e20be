"""Infinities and NaN in the inputs: they reach what they reach in the plain program, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gate.record import without_kernels
from implementations import every_implementation
from oracle import in_fp64
from test_contract import where_it_runs

from fxopt.kernels.in_place import InPlaceOp

SPECIAL = (float("inf"), float("-inf"), float("nan"))


def spoiled(case, places):
    """The case with a few elements of its floating tensors at these places replaced."""
    generator = torch.Generator().manual_seed(case.seed)
    args = []
    for place, arg in enumerate(case.args):
        if place in places and isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.element_size() > 1 and arg.numel():
            arg = arg.clone()
            chosen = torch.rand(arg.shape, generator=generator) < 0.5 / arg.shape[-1] if arg.dim() else torch.zeros((), dtype=torch.bool)
            values = torch.tensor(SPECIAL)[torch.randint(0, 3, arg.shape, generator=generator)]
            arg[chosen.to(arg.device)] = values[chosen].to(arg)
        args.append(arg)
    return dataclasses.replace(case, args=tuple(args))


@every_implementation
def test_what_is_not_finite_stays_so_and_spreads_no_further(where):
    if where.op in without_kernels():
        pytest.skip("torch's own kernels; what is not finite in one document stays there: test_packed_attention.py")

    def places(case):
        """Not the averages of an optimizer, nor the scales of a stored weight: those are finite."""
        if isinstance(where.op, InPlaceOp):
            return (1,)
        stored = [place for start, stop in case.lists for place in range(start, stop) if any(part.element_size() == 1 for part in case.args[start:stop])]
        return set(range(len(case.args))) - set(stored)

    def check(case):
        case = spoiled(case, places(case))
        mine, true = where.op(*case.packed()), where.op.reference(*case.packed(tuple(map(in_fp64, case.args))))
        plain = where.op.reference(*case.packed())
        for out, truth, eager in zip(mine, true, plain, strict=True):
            # In a narrow dtype a finite truth may overflow: there the plain program in that dtype is right, too.
            assert torch.equal(out.isfinite(), truth.isfinite()) or torch.equal(out.isfinite(), eager.isfinite())
            # Another order of sums may meet inf - inf where the truth is an infinity. NaN never becomes one.
            assert out[truth.isnan()].isnan().all()

    with torch.no_grad():
        where_it_runs(where, check, 100)
