"""A model whose code cannot be traced as a whole runs in parts: equal to eager, adapted, and honest about what stays Python."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.errors import CallError, CaptureError, FxoptError, PassError
from fxopt.ir import capture as captures
from fxopt.kernels.tolerance import same

D = 8
CALLS = {"block": 0}  # how often a block's Python code ran


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index  # differs, and nothing reads it
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS["block"] += 1
        return x + self.down(F.silu(self.up(x)))


class Branching(nn.Module):
    """The loop is the user's own, and looks at values."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(4, D)
        self.blocks = nn.ModuleList(Block(i) for i in range(blocks))
        self.gain = nn.Parameter(torch.ones(D))
        self.head = nn.Linear(D, 5)
        self.seen: list[float] = []

    def forward(self, x: torch.Tensor, around: Callable[..., Any] | None = None) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
            if not bool(x.isfinite().all()):
                raise ValueError("not finite")
        self.seen.append(x.mean().item())
        return self.head(x * self.gain).square().mean()


class Looped(Branching):
    """A loop of its own kind, given on the class."""

    way: str = "plain"

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = self.first(x)
        for block in self.blocks:
            if x.abs().max() > 1e6:
                break
            if self.way == "checkpoint":
                x = checkpoint(block, x, use_reentrant=False)
            elif self.way == "reentrant":
                x = checkpoint(block, x, use_reentrant=True)
            elif self.way == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    x = block(x).float()
            elif self.way == "no_grad":
                with torch.no_grad():
                    x = x + block(x)
                x = block(x)
            elif self.way == "sizes":
                x = block(x) + block(x[:1, :2]).mean()
            elif self.way == "in place":
                x = block.up(x)[..., :D]
                x = block.up(x)
                x *= 0.5
                x = x[..., :D]
            elif self.training and random.random() < 0.5:  # "dropped"
                continue
            else:
                x = block(x)
        return self.head(x * self.gain).square().mean()


def looped(way: str, **options: Any) -> Looped:
    model = made(Looped, **options)
    model.way = way
    return model


def made(kind: type[nn.Module], **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(**options).train()


def data(batch: int = 3, length: int = 5) -> torch.Tensor:
    return torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(batch))


def step(model: nn.Module, x: torch.Tensor, seed: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    random.seed(seed)
    torch.manual_seed(seed)
    loss = model(x)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def equal(opt: nn.Module, eager: nn.Module, *batches: torch.Tensor) -> None:
    for x in batches:
        mine, theirs = step(opt, x), step(eager, x)
        assert same(mine[0], theirs[0])
        assert mine[1].keys() == theirs[1].keys() and mine[1]
        for name, grad in theirs[1].items():
            assert same(mine[1][name], grad), name


def test_the_parts_run_as_graphs_and_the_rest_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = []
    export = captures._export
    monkeypatch.setattr(captures, "_export", lambda model, *args: exported.append(type(model).__name__) or export(model, *args))
    model = made(Branching)
    eager = copy.deepcopy(model)
    opt = fxopt.optimize(model, inputs=(data(),))
    assert exported.count("Block") == 1 and exported.count("Linear") == 2  # alike blocks are captured once
    seen, ran = len(model.seen), CALLS["block"]
    assert same(opt(data()), eager(data()))
    assert CALLS["block"] == ran + 3 and len(model.seen) == seen + 1  # eager's own three; our Python code ran once
    equal(opt, eager, data(), data(2, 9))
    ran = CALLS["block"]
    opt.model(data())  # the original code
    assert CALLS["block"] == ran + 3 and not opt.state_dict().keys() ^ eager.state_dict().keys()
    names = [part.name for part in opt.parts]
    assert names == ["first", "blocks.0", "blocks.1", "blocks.2", "head", ""] and not opt.parts[-1].captured
    assert sum(part.parameters for part in opt.parts) == pytest.approx(1.0) and sum(part.flops for part in opt.parts) == pytest.approx(1.0)
    assert opt.parts[-1].parameters == D / sum(p.numel() for p in model.parameters()) and opt.parts[-1].flops == 0
    assert "test_parts.py" in opt.parts[-1].where and "x.isfinite().all()" in opt.parts[-1].where
    assert "5 modules run as graphs" in opt.report and "100.0% of the FLOPs" in opt.report and "a whole step in parts against the model" in opt.report
    with pytest.raises(FxoptError, match="in parts"):
        opt.program
    with pytest.raises(CallError, match="in parts"):
        opt.plan(batch=4)
    with pytest.raises(ValueError, match="not finite"):
        opt(data() * float("nan"))
    ran = CALLS["block"]
    model(data())  # the way of that call ended with it
    assert CALLS["block"] == ran + 3
    other = copy.deepcopy(opt)
    with torch.no_grad():
        other.model.first.weight.mul_(2)
    ran = CALLS["block"]
    assert same(opt(data()), eager(data())) and not same(other(data()), opt(data()))
    assert CALLS["block"] == ran + 3  # the copy runs its own parts
    assert same(pickle.loads(pickle.dumps(opt)).model(data()), eager(data()))


def test_the_way_of_a_call_is_that_threads_own() -> None:
    model = made(Branching, blocks=1)
    opt = fxopt.optimize(model, "dead_code", inputs=(data(),), check=False)
    found: list[int] = []

    def elsewhere(*_: Any) -> None:
        def run() -> None:
            before = CALLS["block"]
            model.blocks[0](torch.zeros(1, 1, D))
            found.append(CALLS["block"] - before)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with torch.no_grad():
        opt(data())
        handle = model.head.register_forward_pre_hook(elsewhere)
        opt(data())
    handle.remove()
    assert found == [1]


@pytest.mark.parametrize("way", ["checkpoint", "in place", "dropped", *(pytest.param(way, marks=pytest.mark.slow) for way in ("reentrant", "autocast", "no_grad", "sizes"))])
def test_what_python_code_does_around_parts(way: str) -> None:
    model = looped(way, blocks=2)
    eager = copy.deepcopy(model)
    opt = fxopt.optimize(model, "canonicalize | fuse | remat", inputs=(data(),))
    assert {part.name for part in opt.parts if part.captured} >= ({"first", "blocks.0.up"} if way == "in place" else {"first", "blocks.0", "blocks.1"})
    equal(opt, eager, data(), data(2, 9))
    ran = CALLS["block"]
    step(opt, data())
    assert CALLS["block"] == ran


def test_adapters_and_stored_weights_in_parts(tmp_path: Path) -> None:
    model = looped("dropped")
    opt = fxopt.optimize(model, "canonicalize | lora(rank=2) | quantize(int8) | fuse", inputs=(data(),))
    trained = {name for name, p in opt.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.lora_{f}.default" for path in ("first", *(f"blocks.{i}.{n}" for i in range(3) for n in ("up", "down"))) for f in "AB"}
    with torch.no_grad():
        for name, p in opt.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    equal(opt, opt.model, data(), data(2, 9))
    opt.save_adapter(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(trained)
    assert "base_model.model.blocks.1.up.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")
    fresh = fxopt.optimize(looped("dropped"), opt.passes, inputs=(data(),))
    fresh.load_adapter(tmp_path)
    assert same(step(fresh, data())[0], step(opt, data())[0])
    opt.model.way = fresh.model.way = "sizes"  # another kind of call: captured anew, with the adapters that there are
    equal(opt, opt.model, data())
    assert {name for name, p in opt.named_parameters() if p.requires_grad} == trained
    plain = opt.merge("stored")
    assert type(plain) is Looped and not any("lora" in name for name, _ in plain.named_parameters())
    assert same(plain(data()), opt(data()))


def test_targets_in_parts() -> None:
    opt = fxopt.optimize(made(Branching), "lora(rank=2, targets=[up])", inputs=(data(),))
    assert {name for name, p in opt.named_parameters() if p.requires_grad} == {f"blocks.{i}.up.lora_{f}.default" for i in range(3) for f in "AB"}
    with pytest.raises(PassError, match="'side'"):
        fxopt.optimize(made(Branching), "lora(rank=2, targets=[up, side])", inputs=(data(),))
    with pytest.raises(PassError, match="only parts that are captured"):
        fxopt.optimize(made(Raw), "lora(rank=2, targets=[matrix])", inputs=(data(),))
    with pytest.raises(PassError, match="changed nothing in any part"):
        fxopt.optimize(made(Nothing, layer=nn.LayerNorm(4)), "lora(rank=2)", inputs=(data(),))
    with pytest.raises(FxoptError, match="whole step"):
        fxopt.optimize(made(Branching), "remat | memory(1GiB)", inputs=(data(),))


class Raw(nn.Module):
    """A product in code that is not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.matrix = nn.Linear(4, D), nn.Parameter(torch.randn(D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return (x @ self.matrix if x.sum() > -1e9 else x).square().mean()


class Nothing(nn.Module):
    """A model with nothing to capture but, perhaps, one layer."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.scale = layer or nn.Tanh(), nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).sum() * self.scale if x.sum() < 1e9 else x.sum()


def test_a_model_without_parts_is_refused() -> None:
    with pytest.raises(CaptureError, match="no part of it") as caught:
        fxopt.optimize(made(Nothing), "dead_code", inputs=(data(),))
    assert "x.sum() < 1e9" in str(caught.value) and "torch.where" in str(caught.value)


class Experts(nn.Module):
    """Rows go to experts, some of which get none."""

    def __init__(self, foreign: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(4, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, D), nn.SiLU(), nn.Linear(D, 4)) for _ in range(4))
        if foreign:
            self.experts[1][1] = Foreign(self.router)
        with torch.no_grad():
            self.router.weight[3] = -100 * torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, 4)
        chosen = self.router(rows.abs()).argmax(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            at = (chosen == number).nonzero().squeeze(-1)
            if len(at) == 0:
                continue
            out = out.index_add(0, at, expert(rows[at]))
        return out.square().mean()


class Foreign(nn.Module):
    """Reads a parameter that is not its own."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.__dict__["other"] = other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.other.weight.sum()


def test_experts_without_rows_are_captured_like_their_twins() -> None:
    model = made(Experts)
    eager = copy.deepcopy(model)
    opt = fxopt.optimize(model, "fuse", inputs=(data(),))
    assert [part.name for part in opt.parts if part.captured] == ["router", *(f"experts.{i}" for i in range(4))]
    equal(opt, eager, data(), data(2, 9), data(1, 1))
    adapted = fxopt.optimize(made(Experts), "lora(rank=2)", inputs=(data(),))
    assert {f"experts.3.{i}.lora_A.default" for i in (0, 2)} <= {name for name, p in adapted.named_parameters() if p.requires_grad}


def test_a_part_that_reads_what_is_not_its_own_is_none() -> None:
    model = made(Experts, foreign=True)
    eager = copy.deepcopy(model)
    opt = fxopt.optimize(model, "dead_code", inputs=(data(),))
    assert "experts.1" not in [part.name for part in opt.parts if part.captured] and "router.weight, which is not its own" in opt.report
    equal(opt, eager, data())


def test_the_whole_step_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break what the parts return, where the checks of each part cannot see it."""
    parts = fxopt.dispatch.parts.Parts
    monkeypatch.setattr(parts, "returned", lambda self, value: value if self.finding else value * 1.01)
    with pytest.raises(CaptureError, match="in parts is not equal"):
        fxopt.optimize(made(Branching), "dead_code", inputs=(data(),))


def test_training_in_parts() -> None:
    opt = fxopt.optimize(made(Branching), "lora(rank=2) | remat", inputs=(data(),), check=False)
    result = fxopt.fit(opt, [(data(),), (data(),)], epochs=3, lr=5e-2, progress=False)
    assert result.losses[-1] < result.losses[0]


def test_adapters_are_added_and_switched_in_parts() -> None:
    opt = fxopt.optimize(made(Branching, blocks=1), "lora(rank=2, targets=[up])", inputs=(data(),))
    opt.add_adapter("other", "lora(rank=1, targets=[first])", inputs=(data(),))
    assert {name for name, p in opt.named_parameters() if p.requires_grad} == {"first.lora_A.other", "first.lora_B.other"}
    with torch.no_grad():
        opt.model.first.lora_B["other"].fill_(0.5)
        opt.model.blocks[0].up.lora_B["default"].fill_(0.5)
    second = opt(data())
    assert same(second, opt.model(data()))
    opt.set_adapter("default")
    assert same(opt(data()), opt.model(data())) and not same(opt(data()), second)
    assert {name for name, p in opt.named_parameters() if p.requires_grad} == {"blocks.0.up.lora_A.default", "blocks.0.up.lora_B.default"}
    with opt.disable_adapter():
        assert same(opt(data()), made(Branching, blocks=1)(data()))


class Scaled(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + self.index)


def test_alike_parts_that_read_what_differs_are_captured_apart() -> None:
    model = made(Branching, blocks=2)
    for block in model.blocks:
        block.__class__ = Scaled
    eager = copy.deepcopy(model)
    opt = fxopt.optimize(model, "dead_code", inputs=(data(),))
    equal(opt, eager, data())
    assert [part.name for part in opt.parts if part.captured] == ["first", "blocks.0", "blocks.1", "head"]
    assert not opt.dispatcher.notes  # a check that fails would say so, and capture again


class Ranged(nn.Module):
    """Its buffer is another tensor after each step, which the code around it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, D)
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        self.largest = 0.9 * self.largest + 0.1 * x.detach().max()
        if not bool(self.largest.isfinite()):
            raise ValueError("not finite")
        return (x / self.largest.abs().clamp(min=0.1)).square().mean()


def test_a_buffer_that_is_replaced_is_replaced_once_a_step() -> None:
    """Checks run the model, and put back which tensor stands in a buffer's place, not only what was in it."""
    torch.manual_seed(0)
    eager = Ranged()
    opt = fxopt.optimize(copy.deepcopy(eager))
    for seed in range(3):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        expected, found = eager(x), opt(x)
        assert same(found, expected) and same(opt.model.largest, eager.largest)
