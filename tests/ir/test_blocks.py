"""Repeated blocks that are traced once give the program that tracing each of them gives, node for node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.ir import capture as captures, meta, torch_patches
from fxopt.ir.blocks import Blocks
from fxopt.ir.capture import Call, capture
from fxopt.ir.program import Program
from fxopt.ir.twins import Twins
from tests.captured import FAMILIES, VOCABULARY


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Blocks]:
    """The Blocks of each capture."""
    found: list[Blocks] = []

    class Kept(Blocks):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(captures, "Blocks", Kept)
    return found


def lines(program: Program) -> Iterator[tuple[Any, ...]]:
    """Everything that a node is, but for values that are made per capture."""
    lifted = [node for node in program.nodes if node.op == "get_attr" and node.target in program.constants]  # twins share a number that they make
    for node in program.nodes:
        shown = fx.node.map_arg((node.args, node.kwargs), lambda n: "constant" if n in lifted else n.name)
        if node not in lifted:
            yield node.name, node.op, str(node.target), str(shown), meta.describe(meta.value(node)), meta.provenance(node)


def check(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> None:
    """Both ways of capturing give one program."""
    call = Call.of(args, kwargs)
    notes: list[str] = []
    shared, full = capture(model, call, note=notes.append), capture(model, call, share=False)
    for mine, theirs in zip(lines(shared), lines(full), strict=True):
        assert mine == theirs
    mine, theirs = ([slot for slot in program.slots.values() if slot.kind != "constant"] for program in (shared, full))
    assert mine == theirs and shared.signature == full.signature
    assert all("forward" not in vars(module) for module in model.modules())
    model.notes = notes


@pytest.mark.parametrize(("family", "copies"), [("qwen3", 2), ("gemma2", 2), pytest.param("t5", 2, marks=pytest.mark.slow), ("modernbert", 1), ("gpt2", 2)])
def test_programs_of_transformers_are_the_same(family: str, copies: int, made: list[Blocks]) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family](4 if family in ("gemma2", "modernbert") else 3).train()
    ids = torch.randint(3, VOCABULARY, (2, 10))
    check(model, input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    assert len(made[0].standing) == copies, made[0].alone
    assert model.notes == []


class Layer(nn.Module):
    def __init__(self, index: int = 0, width: int = 8) -> None:
        super().__init__()
        self.up, self.down, self.index = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float32) + self.down(F.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, make: Callable[[int], nn.Module], depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.layers = nn.ModuleList(make(i) for i in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).mean()


class Scaled(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.scale = index // 2 + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.scale


class Defaulted(Layer):
    index = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (self.index + 1)


class ByText(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + (1.0 if hasattr(self, "odd") else 0.0)


class Dropped(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Checkpointed(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Twice(Layer):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        y = super().forward(x)
        return y, y.mean(-1), self.up.in_features


class Pairs(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.mean()
        for layer in self.layers:
            x, mean, width = layer(x)
            total = total + mean.sum() * width
        return total


class Region(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.pow(2).mean()


class Quiet(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.up(x).mean() + torch.tensor(0.5)
        return super().forward(x) * scale


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.stages = nn.ModuleList(nn.Sequential(Layer(i), Layer(i + 1)) for i in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for stage in self.stages:
            x = stage(x)
        return x.mean()


def odd(index: int) -> nn.Module:
    layer = ByText(index)
    if index % 2:
        layer.odd = True
    return layer


@pytest.mark.parametrize(("model", "copies"), [
    (Stack(Layer), 3), (Stack(Scaled), 2), (Stack(Defaulted), 0), (Stack(odd), 2), (Stack(Dropped), 3), (Stack(Checkpointed), 3), (Pairs(Twice), 2),
    (Region(Layer), 2), (Stack(Quiet), 3), (Nested(), 1), (Stack(lambda i: Layer(i) if i else Dropped(i)), 2)])
def test_what_layers_read_decides(model: nn.Module, copies: int, made: list[Blocks]) -> None:
    check(model, torch.randn(3, 5, 8))
    assert len(made[0].standing) == copies, made[0].alone
    assert model.notes == []


def tied(other: int, own: bool) -> nn.Module:
    model = Stack(Layer)
    model.layers[other].up.weight = model.layers[0].up.weight
    if own:
        for layer in model.layers:
            layer.down = nn.Linear(16, 8)
            layer.up = nn.Linear(8, 16)
        model.layers[1].down.bias = model.embed.bias
    return model


@pytest.mark.parametrize("model", [tied(2, False), tied(1, True)])
def test_weights_shared_between_layers(model: nn.Module, made: list[Blocks]) -> None:
    check(model, torch.randn(3, 5, 8))
    assert len(made[0].standing) == 3


# -- blocks that are no example for others -------------------------------------------------------------------------------


class Sets(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.aux = x.mean()
        return super().forward(x)


class ReadsAux(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + sum(layer.aux for layer in self.layers)


class Appends(Layer):
    def forward(self, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        seen.append(x.mean())
        return super().forward(x)


class Collects(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        for layer in self.layers:
            x = layer(x, seen)
        return x.mean() + sum(seen)


class Outside(Layer):
    value: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.value[0]


class Leaks(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            Outside.value[:] = [x.mean() * i]
            x = layer(x)
        return x.mean()


class Writes(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        x.mul_(2)
        return y + x


class Normed(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


class Views(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.up(x)
        return x.view(x.shape)


class Again(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return x.mean()


def hooked() -> nn.Module:
    model = Stack(Layer)
    for i, layer in enumerate(model.layers):
        layer.up.register_forward_hook(lambda module, args, output, i=i: output * (i + 1))
    return model


@pytest.mark.parametrize(("model", "why"), [
    (ReadsAux(Sets), "sets attributes"), (Collects(Appends), "changes its arguments"), (Leaks(Outside), "reads"), (Stack(Writes), "writes into"),
    (Stack(Normed), "writes into state"), (Stack(Views), "view"), (Again(Layer), "called more than once"), (hooked(), "has hooks")])
def test_blocks_with_side_channels_are_traced_one_by_one(model: nn.Module, why: str, made: list[Blocks]) -> None:
    check(model, torch.randn(3, 5, 8))
    assert why in str([*made[0].alone.values(), *model.notes])


def test_a_wrong_copy_is_caught_by_the_self_check_and_captured_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Stack(Scaled), torch.randn(3, 5, 8)
    init = Twins.__init__

    def blind(self: Twins, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.differing = []

    monkeypatch.setattr(Twins, "__init__", blind)
    opt = fxopt.optimize(model, "fuse", inputs=(x,))
    assert any("one by one" in note and "not equal to the model" in note for note in opt.dispatcher.notes)
    torch.testing.assert_close(opt(x), model(x))


def test_attributes_put_aside_are_seen_and_put_back() -> None:
    layer = Layer(3)
    getter, before = nn.Module.__getattr__, dict(vars(layer))
    with torch_patches.put_aside([(layer, "index"), (layer.up, "in_features")]) as read:
        assert layer.index == 3 and hasattr(layer, "index") and not hasattr(layer, "missing")
        layer.up.out_features = 7
    assert read == {(layer, "index")} and nn.Module.__getattr__ is getter
    assert vars(layer) == before and layer.up.in_features == 8 and layer.up.out_features == 7
    with pytest.raises(RuntimeError), torch_patches.put_aside([(layer, "index")]):
        raise RuntimeError
    assert nn.Module.__getattr__ is getter and layer.index == 3


def test_a_cache_that_keeps_blocks_apart_is_said() -> None:
    inputs = dict.fromkeys(("input_ids", "labels"), torch.randint(VOCABULARY, (2, 6)))
    model, said = FAMILIES["qwen3"](2), {}
    for model.config.use_cache in (True, False):
        said[model.config.use_cache] = fxopt.optimize(model, inputs=inputs).report
    assert "blocks are traced one by one, which takes as much longer (model.layers.0: it takes a DynamicCache)" in said[True]
    assert "one by one" not in said[False]
