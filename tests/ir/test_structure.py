"""Calls are flattened as pytree does it, also where nothing is nested and the structure is known."""

from __future__ import annotations

import pytest
import torch

from fxopt.ir.structure import flattened
from fxopt.torch_private import pytree

X = torch.zeros(2)
CALLS = [((), {}), ((X,), {}), ((X, 1, None), {"b": None, "a": X}), ((X, 1, None), {"a": X, "b": None}), ((True,), {"s": "text", "f": 1.0}),
         ((torch.nn.Parameter(X),), {}), (([X, X],), {}), ((X,), {"a": {"b": X}})]


@pytest.mark.parametrize("call", CALLS)
def test_as_pytree(call) -> None:
    for _ in range(2):  # the second time the structure is known
        flat, spec = flattened(*call)
        wanted, structure = pytree.tree_flatten(call)
        assert spec == structure and hash(spec) == hash(structure) and len(flat) == len(wanted) and all(a is b for a, b in zip(flat, wanted))


def test_other_structures_are_others() -> None:
    specs = [flattened(*call)[1] for call in CALLS]
    assert all((a == b) == (i == j or {i, j} == {1, 5}) for i, a in enumerate(specs) for j, b in enumerate(specs))
