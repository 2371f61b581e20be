"""Certificates: they hold for right passes, fail for wrong ones, are read back, and confirmed or not when checked again."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from captured import family, function
from house import ROOT
from schema import problems

import fxopt
from fxopt.cli import main
from fxopt.errors import CheckError, DataError, UnprovenError
from fxopt.ir.capture import Call, capture
from fxopt.ir.edit import Edit
from fxopt.ir.hashing import digest, state_digest
from fxopt.ir.program import Sample
from fxopt.passes.base import Pass, Promise
from fxopt.passes.cases import cases
from fxopt.passes.certificate import Certificate
from fxopt.passes.certify import certify
from fxopt.passes.pipeline import applied, run
from fxopt.passes.verify import Finding

aten = torch.ops.aten
SCHEMA = json.loads((ROOT / "docs/certificate.schema.json").read_text())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(13, 8), nn.LayerNorm(8)
        self.gate, self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 13)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.norm(self.embed(ids))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Net(), {"ids": torch.randint(0, 13, (3, 5)), "labels": torch.randint(0, 13, (3, 5))}


@pytest.fixture(scope="module")
def made() -> tuple[fxopt.Optimized, Certificate]:
    model, inputs = net()
    opt = fxopt.optimize(model, "canonicalize | lora(rank=2) | quantize(int8) | siblings | fuse | loss", inputs=inputs, check=False)
    return opt, opt.verify(runs=1)


def test_right_passes_hold(made: tuple[fxopt.Optimized, Certificate]) -> None:
    _, certificate = made
    assert certificate.require() is certificate and certificate.holds
    assert [stage.text.split("(")[0] for stage in certificate.stages] == ["canonicalize", "lora", "quantize", "siblings", "fuse", "loss", "lowering"]
    assert {"given", "drawn 0", "zeros", "ties", "large", "all labels ignored", "length 1", "batch 1"} <= set(certificate.cases)
    lora = certificate.stages[1]
    assert any("W + scale * B A" in each.against and each.status == "within" for each in lora.results)
    assert all(each.status != "skipped" for stage in certificate.stages for each in stage.results), str(certificate)


def test_json_follows_the_schema_and_reads_back(made: tuple[fxopt.Optimized, Certificate]) -> None:
    _, certificate = made
    body = json.loads(certificate.json())
    assert problems(body, SCHEMA) == []
    assert Certificate.read(certificate.json()) == certificate
    assert problems({**body, "runs": "two"}, SCHEMA) and problems({**body, "more": 1}, SCHEMA) and problems({k: v for k, v in body.items() if k != "seed"}, SCHEMA)
    with pytest.raises(DataError, match="no certificate"):
        Certificate.read("{}")
    with pytest.raises(DataError, match="damaged"):
        Certificate.read(json.dumps({k: v for k, v in body.items() if k != "stages"}))
    with pytest.raises(DataError, match="version"):
        Certificate.read(json.dumps({**body, "version": 7}))


def test_the_same_is_confirmed_and_another_is_not(made: tuple[fxopt.Optimized, Certificate]) -> None:
    opt, certificate = made
    again = opt.verify(runs=1)
    assert certificate.differences(again) == []
    with torch.no_grad():
        opt.model.norm.bias.add_(1.0)
    found = certificate.differences(opt.verify(runs=1))
    assert found == ["the model's weights are others"]
    with torch.no_grad():
        opt.model.norm.bias.sub_(1.0)
    assert "versions" not in str(found) and certificate.differences(dataclasses.replace(again, versions={**again.versions, "torch": "9"}))


@dataclass(frozen=True)
class Off(Pass):
    """a LayerNorm's epsilon that is a little off: in fp32 it drowns in rounding"""

    name: ClassVar[str] = "off"

    def run(self, edit: Edit) -> None:
        norm = next(node for node in edit.nodes if node.target is aten.layer_norm.default)
        edit.set_args(norm, (*norm.args[:4], 1.01e-5))


def test_wrong_passes_fail() -> None:
    model, inputs = net()
    with pytest.raises(CheckError, match="differs") as error:
        fxopt.optimize(model, Off(), inputs=inputs, verify="values", check=False)
    assert "after off" in str(error.value) and "bisect" in str(error.value)
    opt = fxopt.optimize(net()[0], Off(), inputs=inputs, check=False)
    certificate = opt.verify(runs=0)
    assert not certificate.holds and certificate.failures[0].text == "off" and problems(json.loads(certificate.json()), SCHEMA) == []
    with pytest.raises(CheckError):
        certificate.require()


def aliased(x: torch.Tensor) -> torch.Tensor:
    return x * 1.0


def test_an_output_that_comes_to_share_memory_is_seen() -> None:
    @dataclass(frozen=True)
    class Shares(Pass):
        """returns its input"""

        name: ClassVar[str] = "shares"
        promise: ClassVar[Promise] = Promise("exact")

        def run(self, edit: Edit) -> None:
            product = next(node for node in edit.nodes if node.target is aten.mul.Tensor)
            edit.replace(product, product.args[0])

    plain = function(aliased, torch.randn(2, 3))
    program = run([Shares()], plain.program)
    certificate = certify(program, [Shares()], plain.inputs, plain.state)
    assert certificate.stages[0].facts["aliasing"] is not None and not certificate.holds


def test_cases_are_within_the_guards_and_the_domains() -> None:
    model, inputs = net()
    call = Call.of((), inputs)
    program = capture(model, call)
    found = {case.name: case for case in cases(program, call.tensors, 4, 0)}
    shapes = {tuple(map(tuple, case.shapes)) for case in found.values()}
    assert len(shapes) > 3 and all(a == b for a, b in shapes)  # ids and labels are of one size
    assert (found["all labels ignored"].inputs[1] == -100).all()
    for case in found.values():
        assert 0 <= int(case.inputs[0].min()) and int(case.inputs[0].max()) < 13
    again = {case.name: case for case in cases(program, call.tensors, 4, 0)}
    assert all(torch.equal(a, b) for name, case in found.items() for a, b in zip(case.inputs, again[name].inputs))
    assert any(not torch.equal(a, b) for a, b in zip(found["drawn 0"].inputs, cases(program, call.tensors, 1, 5)[1].inputs))


def test_hashes_are_of_what_is_computed() -> None:
    model, inputs = net()
    first, second = (capture(copy.deepcopy(model), Call.of((), inputs)) for _ in range(2))
    assert digest(first) == digest(second) == digest(first.replace(log=()))
    other = run([Off()], first)
    assert digest(other) != digest(first)
    assert digest(first.replace(frozen=frozenset({"head.weight"}))) != digest(first)
    state = dict(model.state_dict())
    assert state_digest(state) == state_digest(dict(reversed(state.items())))
    assert state_digest({**state, "head.bias": state["head.bias"] + 1}) != state_digest(state)


def test_prerequisites_are_certified_too() -> None:
    plain = family("llama")
    program = run("fuse", plain.program)
    stages = certify(program, applied(program), plain.inputs, plain.state, runs=0).stages
    assert [stage.text for stage in stages] == ["canonicalize", "fuse"]


@dataclass(frozen=True)
class Draws(Pass):
    """random numbers of its own: what comes of them is another each time"""

    name: ClassVar[str] = "draws"
    promise: ClassVar[Promise] = Promise(random="declared")

    def run(self, edit: Edit) -> None:
        product = next(node for node in edit.nodes if node.target is aten.mul.Tensor)
        noise = edit.call(aten.rand_like.default, (product,), like=product, before=product.next)
        edit.replace(product, edit.call(aten.add.Tensor, (product, noise), like=product, before=noise.next), unless=lambda user: user is noise or user.target is aten.add.Tensor)


def test_what_was_never_compared_is_unproven_and_no_proof() -> None:
    plain = function(aliased, torch.randn(2, 3))
    certificate = certify(run([Draws()], plain.program), [Draws()], plain.inputs, plain.state)
    stage = certificate.stages[0]
    assert stage.results and all(each.status == "skipped" for each in stage.results) and not stage.problems
    assert stage.verdict == certificate.verdict == "unproven" and not certificate.holds and not certificate.failures
    assert "unproven" in str(certificate) and "???  draws" in str(certificate) and problems(json.loads(certificate.json()), SCHEMA) == []
    assert Certificate.read(certificate.json()) == certificate
    with pytest.raises(UnprovenError, match="nothing was compared with the program before"):
        certificate.require()
    with pytest.raises(UnprovenError):
        run([Draws()], plain.program, verify="values", sample=Sample(plain.inputs, plain.state))
    assert dataclasses.replace(certificate, stages=()).verdict == "unproven"
    mixed = dataclasses.replace(stage, results=(*stage.results, dataclasses.replace(stage.results[0], status="equal", against="W")))
    assert mixed.uncompared == ["the program before"]  # what was compared with something else is no proof of this
    assert dataclasses.replace(stage, facts={"outputs": "wrong"}).verdict == "fails"


class Sparse(nn.Module):
    """A table whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, sparse=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).square().mean()


def test_sparse_gradients_are_compared() -> None:
    ids = torch.tensor([[1, 2, 3], [3, 3, 0]])
    assert fxopt.optimize(Sparse(), "canonicalize", inputs=(ids,), check=False).verify(runs=0).holds


def test_a_size_that_no_plan_takes_is_skipped() -> None:
    """A batch norm has no variance of one sample: eager code refuses it, and so does the plan."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    certificate = fxopt.optimize(model, "memory(least)", inputs=(torch.randn(5, 4),), check=False).verify(runs=0)
    skipped = [each for each in certificate.stages[-1].results if each.status == "skipped"]
    assert certificate.holds and [each.case for each in skipped] == ["batch 1"] and "refuses this case: LowerError" in skipped[0].says


def test_what_is_zero_on_every_case_is_told() -> None:
    def half(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x * 2.0).relu() + y * 0.0, y * 0.0

    plain = function(half, torch.randn(2, 3).requires_grad_(), torch.randn(2, 3).requires_grad_())
    stage = certify(run("canonicalize", plain.program), applied(run("canonicalize", plain.program)), plain.inputs, plain.state).stages[0]
    assert stage.verdict == "holds" and stage.unseen == ("gradient of input tensors_1", "output 1")
    assert "little was seen of: gradient of input tensors_1, output 1" in str(certify(run("canonicalize", plain.program), applied(run("canonicalize", plain.program)), plain.inputs, plain.state))


MODULE = '''
import torch
from torch import nn
def tiny():
    return nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 2)), torch.randn(3, 4)
'''


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "certified_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["verify", "certified_model:tiny", "--passes", "canonicalize", "--runs", "1", "-o", "c.json"]) == 0
    body = json.loads(Path("c.json").read_text())
    assert body["verdict"] == "holds" and body["model"] == "certified_model:tiny" and problems(body, SCHEMA) == []
    assert main(["verify", "c.json"]) == 0
    assert "confirmed" in capsys.readouterr().out
    body["stages"][0]["after"] = "0" * 64
    Path("c.json").write_text(json.dumps(body))
    assert main(["verify", "c.json"]) == 4
    assert "canonicalize: after was 000" in capsys.readouterr().err
    assert main(["verify", "certified_model:tiny", "--passes", "nothing"]) == 2
    monkeypatch.setattr("fxopt.passes.certify.verify.compare", lambda *a, **k: Finding(0, "", 0.0, "nothing to compare"))
    assert main(["verify", "certified_model:tiny", "--passes", "canonicalize", "--runs", "0"]) == 5
    assert "nothing was compared with the program before" in capsys.readouterr().err
