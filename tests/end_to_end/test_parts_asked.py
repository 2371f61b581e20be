"""What is asked of a whole step is answered by part, where a model runs in parts: plan, explain, verify, bisect, and the commands."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fxopt
from fxopt.cli import main
from fxopt.errors import CheckError
from fxopt.ir.edit import Edit
from fxopt.passes.base import Pass
from fxopt.passes.certificate import Certificate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.up(x)))


class Branching(nn.Module):
    """The loop looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(4, 8), nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
            if not bool(x.isfinite().all()):
                raise ValueError("not finite")
        return self.head(x).square().mean()


def optimized(passes: str | Pass) -> fxopt.Optimized:
    torch.manual_seed(0)
    return fxopt.optimize(Branching(), passes, inputs=(torch.randn(3, 5, 4),), check=False)


@pytest.fixture(scope="module")
def asked_of() -> fxopt.Optimized:
    return optimized("canonicalize | lora(rank=2) | fuse")


def test_what_is_asked_of_a_step_is_answered_by_part(asked_of: fxopt.Optimized) -> None:
    names = ["first", "blocks.0 and 2 like it", "head"]
    plan = asked_of.plan()
    assert list(plan.parts) == names and "1 as Python code" in str(plan) and "not counted" in str(plan)
    shared = ("weights", "optimizer", "gradients")
    beside = sum(many * (each.peak.total - sum(each.peak.parts.get(kind, 0) for kind in shared)) for many, each in zip((1, 3, 1), plan.parts.values()))
    trained = sum(p.numel() for p in asked_of.parameters() if p.requires_grad)
    weights = sum(t.untyped_storage().nbytes() for t in asked_of.parameters())
    assert plan.peak == beside + weights + 4 * trained + 8 * trained
    found = asked_of.explain(predict="none")
    assert list(found.parts) == names and json.loads(json.dumps(found.json()))["parts"]["head"]["steps"] and "part blocks.0 and 2 like it:" in str(found)
    assert found.parts[names[1]].steps[1].did[0].count == 2


def test_parts_are_certified(asked_of: fxopt.Optimized) -> None:
    certificate = asked_of.verify(runs=0)
    assert certificate.holds and certificate.passes == asked_of.passes.text() and Certificate.read(certificate.json()) == certificate
    assert [stage.text for stage in certificate.stages][4:8] == [f"blocks.0 and 2 like it: {text}" for text in ("canonicalize", "lora(rank=2)", "fuse", "lowering")]
    assert "head: given" in certificate.cases and certificate.stages[-1].text == "head: lowering"
    assert any("gradient of input" in each.worst for stage in certificate.stages for each in stage.results)  # what the code around it reads


@dataclasses.dataclass(frozen=True)
class Wrong(Pass):
    """silu becomes a sigmoid"""

    name: ClassVar[str] = "wrong"

    def run(self, edit: Edit) -> None:
        for node in edit.nodes:
            if node.target is torch.ops.aten.silu.default and not edit.spent:
                edit.replace(node, edit.call(torch.ops.aten.sigmoid.default, node.args, like=node), rule="silu")


def test_bisecting_names_the_part() -> None:
    found = optimized(Wrong()).bisect()
    assert found.pass_ == Wrong() and len(found.site) == 1 and found.says.startswith("in part blocks.0 and 2 like it: ")
    with pytest.raises(CheckError, match="any part"):
        optimized("canonicalize").bisect(lambda program: False)


MODULE = """
import torch
from torch import nn
class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
    def forward(self, x):
        x = self.a(x).relu()
        return self.b(x if x.sum() > 0 else -x).sum()
def tiny():
    return Branching(), torch.randn(3, 4)
"""


def test_commands_answer_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "branching_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for command in (["dump", "--passes", "canonicalize"], ["explain", "--predict", "none"], ["plan"]):
        assert main([command[0], "branching_model:tiny", *command[1:]]) == 0
        said = capsys.readouterr().out
        assert "part a:\n" in said and "part b:\n" in said
    assert main(["dump", "branching_model:tiny", "--json"]) == 0 and json.loads(capsys.readouterr().out)["parts"].keys() == {"a", "b"}
    assert main(["view", "branching_model:tiny", "-o", "graph.html", "--predict", "none", "--passes", "canonicalize"]) == 0
    assert "graph.a.html: part a" in capsys.readouterr().out and (tmp_path / "graph.b.html").is_file()
    assert main(["verify", "branching_model:tiny", "--passes", "canonicalize", "--runs", "0"]) == 0 and "ok   b: canonicalize" in capsys.readouterr().out
    assert main(["bisect", "branching_model:tiny", "--passes", "canonicalize", "--runs", "0"]) == 4


class Aligned(nn.Module):
    """A loss whose working memory is as large as its labels say."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.ctc_loss(self.body(x).log_softmax(-1).transpose(0, 1), labels, lengths, wanted)


class Packed(nn.Module):
    """A recurrent layer on a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.rnn, self.out = nn.Linear(8, 8), nn.GRU(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.lift(x), lengths, batch_first=True, enforce_sorted=False)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize(("model", "rest", "said"), [
    (Aligned, (torch.tensor([[1, 2, 3], [2, 4, 1]]), torch.tensor([6, 6]), torch.tensor([3, 2])), "how large the result of ctc_loss is.*compute the CTC loss outside of the model"),
    (Packed, (torch.tensor([6, 4]),), "a size there is the value of a tensor.*leave sequences padded"),
], ids=["ctc", "packed"])
def test_sizes_that_are_values_are_named_with_a_way_out(model: type[nn.Module], rest: tuple[torch.Tensor, ...], said: str) -> None:
    opt = fxopt.optimize(model(), inputs=(torch.randn(2, 6, 8), *rest))
    assert re.search(f"(?s)left out: .*{said}", opt.report)
