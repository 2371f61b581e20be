"""Profiles name every node that ran, once for each line, and leave no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt.cli import main
from fxopt.train.timing import FILE
from fxopt.train.trainer import Trainer
from tests.train.small import Net, batches


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(size, size), nn.BatchNorm1d(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.dropout(self.norm(torch.tanh(self.up(x))), 0.1, self.training)


class Stack(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(size) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def made() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Stack(), (torch.randn(4, 8),)


def test_a_profile_has_all_nodes_and_leaves_no_trace() -> None:
    opt = fxopt.optimize(Stack(), "canonicalize", inputs=(torch.randn(6, 8),))
    before, gradient, random = {name: value.clone() for name, value in opt.state_dict().items()}, torch.ones(8, 8), torch.get_rng_state()
    opt.layers[0].up.weight.grad = gradient
    found = opt.profile((torch.randn(6, 8),), repeats=2)
    assert all(torch.equal(value, before[name]) for name, value in opt.state_dict().items())
    assert opt.layers[0].up.weight.grad is gradient and opt.layers[1].up.weight.grad is None
    torch.set_rng_state(random)  # the batch itself was drawn
    tanh = [row for row in found.rows if "tanh" in row.op]
    assert {(row.path, row.code) for row in tanh} == {("layers.0", "return x + torch.dropout(self.norm(torch.tanh(self.up(x))), 0.1, self.training)")}
    for direction, tensors in (("forward", 2), ("backward", 3)):  # the first block has a backward of its own: its input takes no gradient
        found_ = [row for row in tanh if row.direction == direction]
        assert sum(row.calls for row in found_) == 3 and all(row.moved == row.calls * tensors * 6 * 8 * 4 for row in found_)
    ran = {node.name for _, runner, *_ in opt.dispatcher.last.binding.steps for compiled in runner.compiled.values()
           for graph in (compiled.split.forward, compiled.split.backward) for node in graph.graph.nodes if node.op == "call_function"}
    assert {row.node for row in found.rows} == ran and all(row.source for row in found.rows)
    assert found.nodes <= found.wall and found.step <= 2 * found.wall and "x2" in str(found) and "test_profile.py:" in str(found)
    assert json.loads(found.json())["rows"][0]["calls"] in (1, 2) and found.folded().count("\n") == len(found.rows)


@pytest.mark.slow
def test_the_nodes_are_the_step() -> None:
    model = Stack(1024)
    opt = fxopt.optimize(model, "canonicalize", inputs=(torch.randn(256, 1024),))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = opt.profile(repeats=7)
    torch.set_num_threads(threads)
    assert 0.85 <= found.nodes / found.step <= 1.15, str(found)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_here = f"{__name__}:made"
    assert main(["profile", made_here, "--passes", "canonicalize", "--batch", "5", "--repeats", "1", "--top", "3", "--json", str(tmp_path / "a.json"), "--folded", str(tmp_path / "a.txt")]) == 0
    said = capsys.readouterr().out
    assert "others" in said and "the step unprofiled" in said and json.loads((tmp_path / "a.json").read_text())["rows"]
    assert main(["profile", made_here, "--top", "0"]) == 2


def test_the_times_of_a_run(tmp_path: Path) -> None:
    settings = {"epochs": 2, "lr": 0.05, "progress": False, "seed": 0, "accumulate": 2}
    plain = Trainer(**settings).fit(Net(), batches(), batches(2))
    result = Trainer(**settings, output_dir=tmp_path, profile=True).fit(Net(), batches(), batches(2))
    rows = {name: (calls, seconds) for name, calls, seconds in result.times.rows()}
    assert result.losses == plain.losses and plain.times is None
    assert rows["forward"][0] == rows["backward"][0] == 12 and rows["optimizer"][0] == 6 and rows["data"][0] >= 12 and rows["forward of evaluations"][0] == 4
    assert all(seconds >= 0 for _, seconds in rows.values()) and sum(seconds for _, seconds in rows.values()) == pytest.approx(result.times.whole)
    assert rows["checkpoints"][1] > 0 and json.loads((tmp_path / FILE).read_text())["seconds"] == result.times.whole and "in all" in str(result.times)
