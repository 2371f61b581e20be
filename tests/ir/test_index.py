"""What a graph says of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from fuzz.operators import OPERATORS, samples
from fxopt.ir.index import _FOURIER, _GUESSED
from fxopt.torch_private import FakeTensorMode

# Of the database's names: an operator under another name; one that draws for itself; and a backward, which no program holds.
_OTHERS = {"_batch_norm_with_update", "div", "normal", "native_dropout_backward"}


def _transposed(leaf: Any) -> Any:
    """The same values, the last two dimensions in another order of memory."""
    return leaf.detach().transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(leaf, torch.Tensor) and leaf.dim() > 1 else leaf


def _strides(value: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(value.stride(), value.shape) if size > 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fake_strides_are_the_kernels_or_known_not_to_be() -> None:
    known = {target._schema.name.removeprefix("aten::") for target in _GUESSED | _FOURIER} | _OTHERS
    wrong, tried = set(), 0
    for op in OPERATORS:
        try:
            calls = [call for _, call in zip(range(6), samples(op))]
        except Exception:  # the database's own: it wants a GPU, or a package
            continue
        for spec, leaves in calls:
            leaves = [_transposed(leaf) for leaf in leaves]
            try:
                args, kwargs = pytree.tree_unflatten([leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
                real = op.op(*args, **kwargs)
                with FakeTensorMode() as mode:
                    args, kwargs = pytree.tree_unflatten([mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec)
                    fake = op.op(*args, **kwargs)
            except Exception:  # not for these strides, or not without values
                continue
            for x, y in zip(pytree.tree_leaves(real), pytree.tree_leaves(fake)):
                if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.shape == y.shape and x.layout is torch.strided and x.numel():
                    tried += 1
                    wrong |= {op.name} if _strides(x) != _strides(y) else set()
    assert tried > 1000 and {name.removeprefix("nn.functional.").replace(".", "_") for name in wrong} <= known
    assert "native_batch_norm" in wrong
