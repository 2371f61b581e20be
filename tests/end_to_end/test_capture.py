"""What torch.export alone gets wrong or cannot do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._decomp import decompositions
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.proxy import TracerBase
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.errors import CallError, CaptureError, FxoptError
from fxopt.kernels.tolerance import same
from fxopt.ir import torch_patches
from fxopt.runtime import selfcheck
from tests.models import Block, llama, tokens


class Straight(torch.autograd.Function):
    """Rounding with a straight-through, doubled gradient: no tracer can guess it from the forward."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Scaled(torch.autograd.Function):
    """Two outputs, a constant argument, and a saved tensor."""

    @staticmethod
    def forward(ctx, x, factor, y):
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return x * factor + y, y * 3

    @staticmethod
    def backward(ctx, first, second):
        x, y = ctx.saved_tensors
        return first * ctx.factor * 1.5, None, first + second * y.sign()


class UsesFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = Straight.apply(self.a(x) * 3)
        u, v = Scaled.apply(h, 0.7, self.b(x))
        return (u * v).sum()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(3))
        self.reentrant, self.dropout = reentrant, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
            x = F.dropout(x, self.dropout, self.training)
        return x.pow(2).mean()


def gradients(model: nn.Module, run, *args: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    run(*args).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("passes", ["dead_code", "remat", str(fxopt.presets.exact())])
def test_user_functions_keep_their_backward(passes: str) -> None:
    torch.manual_seed(0)
    model, x = UsesFunctions(), torch.randn(4, 6)
    opt = fxopt.optimize(model, passes)
    mine, theirs = gradients(model, opt, x), gradients(model, model, x)
    assert mine.keys() == theirs.keys() and len(mine) == 4
    for name in mine:
        assert same(mine[name], theirs[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("passes", ["dead_code", "remat"])
def test_checkpointed_models_train(reentrant: bool, passes: str) -> None:
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant, 0.2), torch.randn(2, 5, 16, requires_grad=True)
    opt = fxopt.optimize(model, passes)
    mine, theirs = gradients(model, opt, x), gradients(model, model, x)
    assert mine.keys() == theirs.keys() and len(mine) == sum(1 for _ in model.parameters())
    for name in mine:
        assert same(mine[name], theirs[name]), name


def test_a_checkpointed_block_saves_little() -> None:
    """What the user checkpoints stays checkpointed: only the block's inputs are kept."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, requires_grad=True)
    saved = {}
    for kind, model in (("plain", nn.Sequential(*(Block(16, 2) for _ in range(3)))), ("checkpointed", Checkpointed(False))):
        opt = fxopt.optimize(model, "dead_code", inputs=(x,))
        opt(x).sum().backward()
        found = [c.split.saved_bytes for r in opt.dispatcher.runners.values() if r.region.path for c in r.compiled.values()]
        saved[kind] = max(found)
    assert saved["checkpointed"] * 10 < saved["plain"]


def test_patches_are_undone_also_after_an_error() -> None:
    def state() -> tuple[Any, ...]:
        return (torch.autograd.Function.__dict__["apply"], torch.utils.checkpoint.CheckpointFunction, nn.Module.to, torch._dynamo.config.fake_tensor_cache_enabled,
                ShapeEnv.evaluate_expr, TracerBase._filter_traceback_frames, torch.autograd.grad, torch.autograd.backward,
                decompositions.select_one_layer_lstm_function, decompositions._rnn_helper, torch.inference_mode.__enter__, torch.inference_mode.__exit__)

    before = state()
    with pytest.raises(ZeroDivisionError), torch_patches.for_capture(), torch_patches.bounded_sizes(), torch_patches.derivatives(), torch_patches.recurrent_layers():
        assert not any(a is b for a, b in zip(before, state(), strict=True))
        1 / 0
    assert state() == before


@pytest.mark.parametrize("both_ways", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_lstm_trains_on_inputs_without_gradient_and_drops_between_its_layers(both_ways: bool) -> None:
    torch.manual_seed(0)
    eager, x = nn.LSTM(3, 4, 2, dropout=0.5, bidirectional=both_ways), torch.randn(2, 2, 3)
    opt = fxopt.optimize(copy.deepcopy(eager), "canonicalize", inputs=(x,), check=False)
    outputs = []
    for model in (eager, opt):
        torch.manual_seed(1)
        outputs.append(model(x)[0])
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs)
    for ours, theirs in zip(opt.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


class Frozen(nn.Module):
    """Features computed under inference mode, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            features = self.first(x)
        return self.second(x * features.clone()).sum()


def test_inference_mode_inside_a_model_takes_no_gradient() -> None:
    opt = fxopt.optimize(Frozen(), "canonicalize", inputs=(torch.randn(3, 4),))
    opt(torch.randn(2, 4)).backward()
    assert not opt.parts and opt.first.weight.grad is None and opt.second.weight.grad is not None


class Adjacent(nn.Module):
    """A sparse matrix as a buffer: torch.export takes no sparse product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("edges", torch.eye(4).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.edges, self.linear(x)).sum()


def test_a_model_with_a_sparse_buffer_runs_in_parts() -> None:
    opt = fxopt.optimize(Adjacent(), "lora(rank=2)", inputs=(torch.randn(4, 4),))
    assert [part.name for part in opt.parts if part.captured] == ["linear"] and "a whole step in parts against the model" in opt.report


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return (self.linear(x) * i for i in range(2))


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: self.linear(row).tanh().sum()))(x).square().mean()


def test_what_cannot_be_a_program_is_refused_with_a_cure() -> None:
    with pytest.raises(CaptureError, match="no part of it that has parameters can be captured"):  # and not that its own code fails
        fxopt.optimize(Slope(), inputs=(torch.randn(5, 3),))
    with pytest.raises(CaptureError, match="(?s)returns an iterator.*return a list"):
        fxopt.optimize(Late(), inputs=(torch.randn(2, 4),))
    with pytest.raises(FxoptError, match="0.weight has no shape yet"):
        fxopt.optimize(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(CallError, match="meta device"):
        fxopt.optimize(nn.Linear(4, 4, device="meta"), inputs=(torch.randn(3, 4, device="meta"),))
    with pytest.raises(CallError, match="nested tensor"):
        fxopt.optimize(nn.Linear(4, 4), inputs=(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged),))


class Windows(nn.Module):
    """An image padded to whole windows, and halved, stage after stage: sizes of sizes."""

    def __init__(self, stages: int = 5) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.stages = stages

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.stages):
            x = F.pad(x, (0, -x.shape[3] % 3, 0, -x.shape[2] % 3))
            n, c, h, w = x.shape
            x = x.view(n, c, h // 3, 3, w // 3, 3).softmax(5).reshape(n, c, h, w)
            x = x[:, :, 0 : h - h % 2 : 2, 0 : w - w % 2 : 2]
        return (x * self.gain.view(1, 3, 1, 1)).square().mean()


def test_sizes_that_grow_too_much_are_fixed_and_said() -> None:
    eager = Windows()
    opt = fxopt.optimize(copy.deepcopy(eager))
    for size in ((2, 3, 64, 80), (3, 3, 64, 80), (2, 3, 96, 64)):
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        for model in (eager, opt):
            model.zero_grad()
            model(x).backward()
        assert same(opt.model.gain.grad, eager.gain.grad)
    assert any("image sizes are fixed" in note for note in opt.dispatcher.notes)
    assert len(next(iter(opt.dispatcher.entries.values()))) == 2  # the number of images is not


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Picky())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).sum()


class Picky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line that the error must name
            return x * 2
        return x


def test_a_failed_capture_names_the_module_the_line_and_the_cure() -> None:
    model = Branches()
    model.inner[0] = nn.Flatten()  # nothing with parameters is left, so that no part of it can be captured either
    with pytest.raises(CaptureError) as caught:
        fxopt.optimize(model, inputs=(torch.randn(2, 4),))
    text = str(caught.value)
    assert "inner.1" in text and "if x.sum() > 0" in text and "torch.where" in text and "test_capture.py" in text
    assert torch.is_grad_enabled()


def test_the_self_check_refuses_a_wrong_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the capture on purpose: lose the user's backward, as plain torch.export does."""
    monkeypatch.setattr(torch_patches, "keep_autograd_functions", torch_patches.contextlib.nullcontext)
    with pytest.raises(CaptureError, match="not equal to the model") as caught:
        fxopt.optimize(UsesFunctions(), "dead_code", inputs=(torch.randn(4, 6),))
    assert "a.weight" in str(caught.value) or "b.weight" in str(caught.value) or "bias" in str(caught.value)


def test_the_self_check_restores_everything() -> None:
    model = llama()
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    fxopt.optimize(model, inputs=tokens())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert torch.equal(rng, torch.random.get_rng_state()) and all(p.grad is None for p in model.parameters())


def test_the_comparison_can_fail() -> None:
    model = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    good = selfcheck.step(model, lambda given: model(given[0]), (x,), 0)
    for wrong in (lambda _: model(x) * 1.01, lambda _: model(x.flip(0)), lambda _: F.linear(x, model.weight.detach(), model.bias),
                  lambda _: F.linear(x, model.weight)):
        with pytest.raises(CaptureError):
            selfcheck.compare(model, good, selfcheck.step(model, wrong, (x,), 0), "the graph")


class Iterated(nn.Module):
    """Writes into buffers where nothing takes a gradient, by `out=` as spectral norms do, and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.spectral_norm(nn.Linear(6, 5))
        self.register_buffer("largest", torch.zeros(5))
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        with torch.no_grad():
            torch.maximum(self.largest, y.amax(0), out=self.largest)
            self.mean.lerp_(y.mean(0), 0.1)
        return (y / (1 + self.largest) - self.mean).square().mean()


def test_writes_without_gradients_reach_buffers_and_leave_gradients() -> None:
    torch.manual_seed(0)
    model = Iterated()
    eager, opt = copy.deepcopy(model), fxopt.optimize(model)
    for x in torch.randn(3, 4, 6):
        losses = []
        for each in (eager, opt):
            each.zero_grad()
            losses.append(each(x))
            losses[-1].backward()
        assert same(losses[0].detach(), losses[1].detach())
        for (name, a), b in zip(eager.named_parameters(), opt.model.parameters(), strict=True):
            assert same(a.grad, b.grad), name
        for (name, a), b in zip(eager.named_buffers(), opt.model.buffers(), strict=True):
            assert same(a, b) and float(a.norm()) > 0, name


class Converting(nn.Module):
    """Converts a layer to the dtype that it has, in each call, as routers of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.linear = self.linear.to(x.dtype)
        return self.linear(x).square().sum()


def test_a_conversion_that_changes_nothing_is_none() -> None:
    model, x = Converting(), torch.randn(2, 4)
    opt = fxopt.optimize(model, inputs=(x,))
    assert not opt.parts and same(opt(x).detach(), model(x).detach())
