"""The cut: one region per repeated block, in an order that respects data, writes and random draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fxopt
from fxopt.errors import LowerError
from fxopt.ir.capture import Call, capture
from fxopt.ir.edit import random
from fxopt.ir.joint import trace
from fxopt.ir.partition import min_cut, save_all, split
from fxopt.ir.regions import Schedule, cut, repeated_blocks
from fxopt.kernels.tolerance import same
from tests.models import Block, convnet, gpt2, images, llama, tokens


def schedule(model: nn.Module, *args: object, **kwargs: object) -> Schedule:
    return cut(capture(model, Call.of(args, kwargs)), repeated_blocks(model))


def check(model: nn.Module, *args: torch.Tensor) -> fxopt.Optimized:
    """Outputs and gradients of the optimized model equal eager's (the self-check does the rest)."""
    opt = fxopt.optimize(model, "remat", inputs=args)
    torch.manual_seed(0)
    mine = opt(*args)
    torch.manual_seed(0)
    theirs = model(*args)
    for a, b in zip(torch.utils._pytree.tree_leaves(mine), torch.utils._pytree.tree_leaves(theirs), strict=True):
        assert same(a, b)
    return opt


def test_one_region_per_block_and_equal_regions_share_their_graphs() -> None:
    opt = fxopt.optimize(llama(5), inputs=tokens())
    lowered = opt.dispatcher.last
    paths = [r.path for r in lowered.schedule.regions]
    assert paths == [None, *(f"model.layers.{i}" for i in range(5)), None]
    assert len({r.key for r in lowered.schedule.regions if r.path}) == 1
    assert len(opt.dispatcher.runners) == 3


def test_what_crosses_is_not_a_view_and_masks_cross_once() -> None:
    made = schedule(llama(3), **tokens())
    for region in made.regions:
        values = {n.name: n for n in region.graph.nodes}
        output = region.graph.output_node()
        assert all(n.op == "call_function" for n in output.args[0]), values
    assert made.dissolved == ()


class UNet(nn.Module):
    """Skips from every down block to its up block: values cross several regions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()) for _ in range(3))
        self.up = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.dropout(x, 0.1, self.training)
        for block in self.up:
            x = block(torch.cat([x, kept.pop()], dim=1))
        return x.mean()


def test_skips() -> None:
    opt = check(UNet().train(), torch.randn(2, 4, 8, 8))
    assert len([r for r in opt.dispatcher.last.schedule.regions if r.path]) == 6


class Shared(nn.Module):
    """One block is called twice, so its nodes are not convex; the others are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in (0, 1, 0, 2):
            x = self.blocks[i](x)
        return x.sum()


def test_a_block_that_is_called_twice() -> None:
    check(Shared(), torch.randn(2, 5, 16, requires_grad=True))


class Entangled(nn.Module):
    """Half of a block runs, then something outside, then the other half: the block cannot be one region."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block["b"](torch.sin(block["a"](x)))
        return x.sum()


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Callback() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


class Callback(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.sin(self.a(x)))


@pytest.mark.parametrize("make", [Entangled, Inside])
def test_containers_that_are_never_called(make: type[nn.Module]) -> None:
    check(make(), torch.randn(3, 4, requires_grad=True))


class ReturnsViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for block in self.blocks:
            x = block(x)
        return x, x[:, 0], x.transpose(1, 2), x[:, 1:].reshape(x.shape[0], -1)


def test_returned_views_of_one_value() -> None:
    model, x = ReturnsViews(), torch.randn(2, 5, 16, requires_grad=True)
    opt = check(model, x)
    weights = [torch.randn_like(o) for o in model(x)]

    def gradient(run: object) -> torch.Tensor:
        x.grad = None
        sum((o * w).sum() for o, w in zip(run(x), weights)).backward()  # type: ignore[operator]
        return x.grad.clone()

    assert same(gradient(opt), gradient(model))
    out = opt(x)
    assert out[1].data_ptr() == out[0].data_ptr()  # a view of the other output, as in eager


def test_random_draws_and_writes_keep_their_order() -> None:
    for model, call in ((gpt2(), Call.of((), tokens())), (convnet(), Call.of((), images()))):
        program = capture(model, call)
        made = cut(program, repeated_blocks(model))
        flat = [n.target for n in program.nodes if n.op == "call_function" and random(n)]
        cut_up = [n.target for r in made.regions for n in r.graph.nodes if n.op == "call_function" and random(n)]
        assert flat == cut_up and len(flat) > 0


class Scratch(nn.Module):
    """Memory is made before the blocks, read, written behind them through a view, and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(2))
        self.register_buffer("seen", torch.zeros(2, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scratch = torch.ones_like(x.detach())
        before = scratch * 3 + self.seen.sum()
        for block in self.blocks:
            x = block(x)
        scratch[:, 0].copy_(x.detach()[:, 0])
        self.seen.add_(x.detach().mean(1))
        return ((x + before) * (scratch * 2 + self.seen.mean())).sum()


def test_reads_behind_a_write_see_it() -> None:
    for passes in ("dead_code", "canonicalize | remat"):
        model, eager = Scratch(), Scratch()
        eager.load_state_dict(model.state_dict())
        x = torch.randn(2, 5, 16, requires_grad=True)
        opt = fxopt.optimize(model, passes, inputs=(x,), check=False)
        for _ in range(2):
            mine, theirs = opt(x), eager(x)
            assert same(mine, theirs) and same(model.seen, eager.seen)
            assert same(*(torch.autograd.grad(out, x)[0] for out in (mine, theirs)))


def test_a_returned_parameter_view_is_refused() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x @ self.weight, self.weight.t()

    with pytest.raises(LowerError, match="clone"):
        fxopt.optimize(Returns(), inputs=(torch.randn(2, 3),))


def test_joint_graphs_and_their_splits() -> None:
    model = llama(2)
    program = capture(model, Call.of((), tokens()))
    region = next(r for r in cut(program, repeated_blocks(model)).regions if r.path)
    requires = [True] + [False] * (len(region.inputs) - 1) + [True] * len(region.state)
    hidden = next(i for i, n in enumerate(n for n in region.graph.nodes if n.op == "placeholder") if n.meta["val"].dim() == 3 and n.meta["val"].is_floating_point())
    requires[0], requires[hidden] = False, True
    joint = trace(region, requires, program.fake_mode)
    assert [g is not None for g in joint.gradients] == requires
    assert joint.differentiable == (True,)
    plain, small = split(joint, save_all), split(joint, min_cut)
    assert 0 < small.saved_bytes < plain.saved_bytes
    assert plain.wanted == small.wanted == tuple(i for i, r in enumerate(requires) if r)
    frozen = split(trace(region, [False] * len(requires), program.fake_mode), min_cut)
    assert frozen.backward is None and frozen.saved == ()
