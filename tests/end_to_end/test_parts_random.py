"""Of random models with code that looks at values, the largest parts without such code are captured, and equal to eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fxopt
from fxopt.errors import CaptureError
from fxopt.kernels.tolerance import same

D = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.up(x)))


class Chain(nn.Module):
    """Modules in a row, with or without a look at values."""

    def __init__(self, items: Sequence[nn.Module], branching: bool) -> None:
        super().__init__()
        self.items, self.branching = nn.ModuleList(items), branching

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for item in self.items:
            x = item(x)
        if self.branching and x.sum() > 1e9:
            return x * 2
        return x


def trees() -> st.SearchStrategy[Callable[[], nn.Module]]:
    leaves = st.sampled_from([lambda: nn.Linear(D, D), lambda: nn.LayerNorm(D), Block, nn.SiLU])
    nodes = st.recursive(leaves, lambda inner: st.builds(lambda items, branching: lambda: Chain([item() for item in items], branching),
                                                         st.lists(inner, min_size=1, max_size=3), st.booleans()), max_leaves=6)
    return st.builds(lambda items: lambda: Chain([item() for item in items], True), st.lists(nodes, min_size=1, max_size=3))


def largest(module: nn.Module, path: str = "") -> list[str]:
    """The paths of the largest modules that have parameters and do not look at values."""
    if not any(True for _ in module.parameters()):
        return []
    if not any(isinstance(m, Chain) and m.branching for m in module.modules()) and not isinstance(module, nn.ModuleList):
        return [path]
    return [found for name, child in module.named_children() for found in largest(child, f"{path}.{name}".lstrip("."))]


def check_tree(tree: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = tree()
    eager, wanted = copy.deepcopy(model), largest(model)
    x = torch.randn(3, D)
    if not wanted:
        with pytest.raises(CaptureError):
            fxopt.optimize(model, "canonicalize | fuse", inputs=(x,))
        return
    opt = fxopt.optimize(model, "canonicalize | fuse", inputs=(x,))
    assert [part.name for part in opt.parts if part.captured] == wanted
    assert sum(part.parameters for part in opt.parts) == pytest.approx(1.0)
    for batch in (x, torch.randn(5, D)):
        results = []
        for each in (opt, eager):
            each.zero_grad(set_to_none=True)
            out = each(batch)
            out.square().sum().backward()
            results.append((out.detach(), {name: p.grad for name, p in each.named_parameters()}))
        (mine, grads), (theirs, others) = results
        assert same(mine, theirs) and all(same(grads[name], other) for name, other in others.items())


@settings(max_examples=1, deadline=None, derandomize=True)
@given(trees())
def test_the_largest_parts_of_random_models(tree: Callable[[], nn.Module]) -> None:
    check_tree(tree)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(trees())
def test_the_largest_parts_of_many_random_models(tree: Callable[[], nn.Module]) -> None:
    check_tree(tree)
