"""Plans of calls of other sizes, of sizes that depend on data, and in the middle of a step that draws random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fxopt
from fxopt.errors import CallError, FxoptError, LowerError
from fxopt.kernels.tolerance import same
from fxopt.runtime.dry_run import run
from fxopt.runtime.machine import measured
from fxopt.runtime.sizes import measure


def linear() -> fxopt.Optimized:
    return fxopt.optimize(nn.Sequential(nn.Linear(4, 4), nn.GELU()), "memory(least)", inputs=(torch.ones(3, 5, 4),), check=False)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"batch": -1}, {"length": 2.5}, {"batch": "many"}])
def test_a_size_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CallError, match="1 or more"):
        linear().plan(**wrong)


def test_memory_that_is_no_number_is_refused() -> None:
    with pytest.raises(CallError, match="number of bytes"):
        linear().largest_call("6GiB")  # type: ignore[arg-type]


def test_a_step_of_a_frozen_model_is_not_measured() -> None:
    with pytest.raises(CallError, match="no parameter takes a gradient"):
        measure(lambda: torch.zeros(()), None, [])  # type: ignore[arg-type]


def test_a_call_that_was_refused_is_not_the_one_that_plans_are_for() -> None:
    opt = linear()
    total = opt.plan().peak.total
    with pytest.raises(FxoptError):
        opt.plan((torch.ones(3, 5, 7),))
    assert opt.plan().peak.total == total


def test_the_machine_is_measured_without_drawing_the_random_numbers_of_a_step() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        machine = measured.__wrapped__("cpu", None, 0.01)
    assert torch.equal(torch.get_rng_state(), before) and machine.flops["float32"] > 0


class Block(nn.Module):
    """Attention that sees no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + self.out(F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask[:, None, None, :].bool()).squeeze(1))


class Padded(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position, self.norm = nn.Embedding(31, 8), nn.Embedding(16, 8), nn.LayerNorm(8)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 31)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(ids) + self.position(torch.arange(ids.shape[1])))
        for block in self.blocks:
            x = block(x, mask)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_rows_that_are_found_again_in_the_backward_have_the_sizes_of_the_dry_run() -> None:
    """Batches whose number of tokens is no multiple of 8: as many rows as there can be is rounded up, everywhere alike."""
    torch.manual_seed(0)
    ids = torch.randint(0, 31, (2, 9))
    mask = (torch.arange(9) < torch.tensor([9, 4])[:, None]).long()
    call = {"ids": ids, "mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model = Padded().double()
    loss = model(**call)
    expected = torch.autograd.grad(loss, tuple(model.parameters()))
    opt = fxopt.optimize(model, "fuse | pack | compact(multiple=32) | memory(least)", inputs=call, check=False)
    packed = opt(**call)
    packed.backward()
    assert same(packed, loss) and all(same(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert any("live_rows" in node.name for node in opt.program.graph.nodes)


class Routed(nn.Module):
    """Rows go to one of two linears: how many to each depends on the data. The embedding's gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts = nn.Embedding(7, 4, sparse=True), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).flatten(0, 1)
        out = torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            rows = (ids.flatten() % 2 == at).nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(x[rows]))
        return out.square().mean()


def test_sizes_that_depend_on_data_and_sparse_gradients_are_planned() -> None:
    model, ids = Routed(), torch.arange(15).view(3, 5) % 7
    expected = torch.autograd.grad(model(ids), tuple(model.parameters()))
    opt = fxopt.optimize(model, "memory(least)", inputs=(ids,))
    assert opt.plan().peak.total > 0
    for _ in range(2):  # once more with gradients that are there
        opt(ids).backward()
    assert model.embed.weight.grad.is_sparse
    assert all(same(p.grad.to_dense(), 2 * g.to_dense()) for p, g in zip(model.parameters(), expected, strict=True))


def test_what_cannot_be_predicted_is_named() -> None:
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    x.meta["val"], y.meta["val"] = torch.empty(3), torch.empty(4)
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, y)),))
    with pytest.raises(LowerError, match="`add_tensor` takes cannot be predicted"):
        run(torch.fx.GraphModule(nn.Module(), graph), int)
