"""Dumps: Python-like, stable, foldable; diffs and reports."""

from __future__ import annotations

import ast
import json

import torch
import torch.nn as nn

from fxopt.ir.capture import Call, capture
from fxopt.ir.edit import Edit
from fxopt.ir.program import Assumption, Made, Program, Slot
from fxopt.ir.text import block_of, diff, output_names, report, summary, text

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.up(self.norm(x))) * scale


class Stack(nn.Module):
    def __init__(self, depth: int = 4, odd: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block(8) for _ in range(depth))
        self.odd = odd
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        x = first = self.embed(ids)
        self.seen.add_(1)
        for i, layer in enumerate(self.layers):
            x = layer(first if i == self.odd else x, scale)
        return {"hidden": x, "mean": x.mean()}


def stacked(**kwargs: int) -> Program:
    torch.manual_seed(0)
    return capture(Stack(**kwargs), Call.of((torch.randint(0, 11, (2, 5)),), {"scale": torch.ones(8)}))


def test_reads_like_python() -> None:
    said = text(stacked())
    ast.parse(said)
    assert "tensors_0," in said and "# int64[s0, s1]  args[0]" in said
    assert "# float32[8]  scale" in said
    assert 'embed_weight = state["embed.weight"]' in said and "float32[11, 8]  parameter, trainable" in said
    assert 'seen = state["seen"]' in said and "float32[]  buffer" in said
    assert "    # layers.0: Block\n" in said
    line = next(line for line in said.splitlines() if "aten.linear.default" in line)
    assert "# float32[s0, s1, 8]  layers.0.up  test_text.py:" in line
    assert 'return {"hidden": add_' in said


def test_the_same_in_every_run() -> None:
    assert text(stacked()) == text(stacked())
    assert text(stacked(), fold=True) == text(stacked(), fold=True)


def test_every_call_is_printed_with_its_arguments() -> None:
    program = stacked()
    said = text(program)
    for node in program.nodes:
        if node.op != "output":
            assert any(line.strip().startswith((f"{node.name} =", f"{node.name},")) for line in said.splitlines()), node


def test_folding_prints_equal_blocks_once() -> None:
    said = text(stacked(), fold=True)
    ast.parse(said)
    assert said.count("aten.linear.default") == 1
    assert "# layers.1 … 3: same as layers.0, each on the one before; gives add_" in said
    assert "# layers.1 … 3: state as in the first block" in said


def test_folding_sees_another_wiring() -> None:
    said = text(stacked(odd=2), fold=True)
    assert said.count("aten.linear.default") > 1, "layer 2 reads the embedding, not layer 1"


def test_block_of() -> None:
    assert block_of("model.layers.3.mlp.up") == "model.layers.3"
    assert block_of("model.layers.3@1.mlp") == "model.layers.3@1"
    assert block_of("model.norm") == "model.norm" and block_of("") == "" and block_of("h2o.up") == "h2o.up"


def test_what_passes_made_is_shown() -> None:
    program = stacked(depth=1)
    edit = Edit(program, by="scaler")
    relu = next(node for node in edit.nodes if node.target is aten.relu.default)
    gain = edit.state(Slot("layers.0.gain", (8,), torch.float32, "parameter", True, Made("scaler", lambda source: torch.ones(8), "embed.weight")), like=relu)
    new = edit.call(aten.mul.Tensor, (relu, gain), like=relu, before=relu.next)
    edit.replace(relu, new, rule="scale relu (x.py:3)", unless=lambda user: user is new)
    edit.missed("scale relu (x.py:3)", relu, "it is too wide")
    edit.freeze(["embed.weight"])
    edit.assume(Assumption("tensors_1"))
    edit.facts.add("scaled")
    edit.note("hello")
    after = edit.finish("scaler(x=1)", 1.5)
    said = text(after)
    ast.parse(said)
    assert "# passes: scaler(x=1)" in said and "# facts: scaled" in said
    assert "# assumes: every element of tensors_1 (scale) is non-zero" in said
    assert "parameter, trainable, made by scaler from embed.weight" in said
    assert "float32[11, 8]  parameter, frozen" in said
    assert "by scaler" in next(line for line in said.splitlines() if line.strip().startswith(f"{new.name} ="))

    changed = diff(program, after).splitlines()
    assert changed[0] == "--- as captured" and changed[1] == "+++ scaler(x=1)"
    assert any(line.startswith(f"+    {new.name} = aten.mul.Tensor(relu, layers_0_gain)") for line in changed)
    assert diff(program, program) == ""

    assert json.loads(json.dumps(summary(after)))[0]["rewrites"][0]["rule"] == "scale relu (x.py:3)"
    told = report(after)
    assert "scaler(x=1): " in told and "1 rewrites" in told
    assert "fired  scale relu (x.py:3): 1 times, first at layers.0 (test_text.py:" in told
    assert "missed scale relu (x.py:3): it is too wide" in told and "note   hello" in told
    assert report(program) == "no passes were applied\n"


class Bare(nn.Module):
    def forward(self, x: torch.Tensor, s1: torch.Tensor) -> torch.Tensor:
        a, b = torch.split(x, [2, 6], dim=1)
        return torch.clamp(torch.cat([a, b * s1], 1), min=float("-inf"))


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int, list[torch.Tensor]]:
        return x + 1, 3, [x * 2]


def test_other_outputs_and_arguments() -> None:
    bare = capture(Bare(), Call.of((torch.randn(3, 8), torch.randn(6)), {}))
    said = text(bare)
    ast.parse(said)
    assert output_names(bare) == [""] and said.rstrip().endswith("return clamp")
    assert 'float("-inf")' in said and "[0]" in said
    pair = capture(Pair(), Call.of((torch.randn(3, 8),), {}))
    assert output_names(pair) == ["0", "1", "2.0"]
    assert "return (add, 3, mul)" in text(pair)
