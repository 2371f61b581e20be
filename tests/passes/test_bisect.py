"""Bisecting names the pass and the site, by a certificate, a value that is not finite, or a predicate; the script fails by itself."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn as nn
from captured import family, function, weight

import fxopt
from fxopt.cli import main
from fxopt.errors import CheckError
from fxopt.ir.edit import Edit, rule_here
from fxopt.ir.program import Program, Rewrite
from fxopt.passes.base import Pass
from fxopt.passes.bisect import bisect, not_finite
from fxopt.passes.pipeline import applied, apply, run
from fxopt.passes.repro import LINES
from mutants.hunt import MUTANTS
from mutants.search import search, searchable

aten = torch.ops.aten


@dataclass(frozen=True)
class Reciprocal(Pass):
    """divisions by a number as multiplications, wrong where the number is `wrong`"""

    name: ClassVar[str] = "reciprocal"

    wrong: float = 3.0
    factor: float = 1.01

    def run(self, edit: Edit) -> None:
        for node in edit.nodes:
            if node.target is aten.div.Tensor and isinstance(node.args[1], float) and not edit.spent:
                inverse = 1.0 / node.args[1] * (self.factor if node.args[1] == self.wrong else 1.0)
                new = edit.call(aten.mul.Tensor, (node.args[0], inverse), like=node)
                edit.replace(node, new, rule=rule_here("reciprocal"))
                edit.erase(node)


def steps(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x / 2.0 + torch.tanh(x * w) / 5.0
    y = torch.relu(y / 3.0) + y / 7.0
    return (y / 4.0).sum()


def plain(x: torch.Tensor) -> torch.Tensor:
    return steps(x, torch.ones(6))


def made(*passes: Pass) -> tuple[Program, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    found = function(steps, torch.randn(3, 6), w=weight(6))
    return run(list(passes), found.program), found.inputs, dict(found.state)


def test_a_certificate_leads_to_the_site_and_a_script(tmp_path: Path) -> None:
    bad = Reciprocal()
    program, inputs, state = made(*run_text("canonicalize"), bad, *run_text("dead_code"))
    found = bisect(program, applied(program, [bad]), inputs, state)
    assert found.pass_ is bad and found.stage == 1 and found.of == 5
    (site,) = found.site
    assert next(node for node in program.nodes if node.name == site.node).args[1] == pytest.approx(bad.factor / 3)
    assert found.repro is not None and found.repro.before == found.repro.after == 1
    script = tmp_path / "repro.py"
    script.write_text(found.repro.text)
    assert found.repro.text.count("\n") < LINES and set(imports(found.repro.text)) <= {"torch", "fxopt"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "AssertionError" in done.stderr, done.stderr
    assert "reciprocal" in str(found) and "5" in str(found)


def run_text(text: str) -> list[Pass]:
    return list(fxopt.passes.pipeline.parse(text))


def imports(text: str) -> list[str]:
    return [line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))]


def test_a_value_that_is_not_finite_leads_there_too() -> None:
    bad = Reciprocal(7.0, float("inf"))
    program, inputs, state = made(*run_text("canonicalize"), bad, *run_text("dead_code | denominator"))
    found = bisect(program, applied(program, [bad]), inputs, state, predicate=not_finite(inputs, state))
    assert found.pass_ is bad and len(found.site) == 1
    assert next(node for node in program.nodes if node.name == found.site[0].node).args[1] == float("inf")


def test_a_predicate_of_ones_own() -> None:
    plain = family("llama")
    program = run("canonicalize | causal | fuse | loss", plain.program)

    def swish(program: Program) -> bool:
        return any("swiglu" in str(node.target) for node in program.nodes)

    found = bisect(program, applied(program), plain.inputs, plain.state, predicate=swish)
    assert str(found.pass_) == "fuse" and len(found.site) == 1 and found.site[0].rule.startswith("swiglu.")
    with pytest.raises(CheckError, match="nothing to find"):
        bisect(program, applied(program), plain.inputs, plain.state, predicate=lambda program: False)
    with pytest.raises(CheckError, match="as captured"):
        bisect(program, applied(program), plain.inputs, plain.state, predicate=lambda program: True)


def test_a_right_program_has_nothing_to_find() -> None:
    program, inputs, state = made(*run_text("canonicalize"))
    with pytest.raises(CheckError, match="does not fail"):
        bisect(program, applied(program), inputs, state)


@pytest.mark.parametrize("text", ["canonicalize", "lora(rank=2)", "fuse", "siblings"])
def test_fuel_stops_between_sites(text: str) -> None:
    """With any fuel the program is right, and the sites are the first ones of all."""
    plain = family("llama", 2)
    before = run("canonicalize | causal | lora(rank=2)" if text == "siblings" else "canonicalize" if text != "canonicalize" else "", plain.program)
    (pass_,) = run_text(text)
    every = apply(pass_, before).log[-1].rewrites
    assert len(apply(pass_, before, fuel=0).nodes) == len(before.nodes)
    for fuel in {1, len(every) // 2, len(every)}:
        some = apply(pass_, before, fuel=fuel).log[-1].rewrites
        assert fuel <= len(some) <= fuel + 2 and _places(some) == _places(every[: len(some)])


def _places(rewrites: Sequence[Rewrite]) -> list[Rewrite]:
    """Without the names of nodes: rotations that become one operation are numbered anew."""
    return [dataclasses.replace(each, node="") for each in rewrites]


def test_opt_bisect() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model.forward = plain
    opt = fxopt.optimize(model, Reciprocal(), inputs=(torch.randn(3, 6),), check=False)
    certificate = opt.verify(runs=1)
    assert not certificate.holds
    found = opt.bisect(certificate=certificate)
    assert found.of == 5 and len(found.site) == 1


MODULE = '''
import torch
from torch import nn
class Model(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x).sum()
def model():
    return Model(), torch.randn(3, 4)
def silu(program):
    return all("reshape" not in str(node.target) for node in program.nodes) and len(program.log) > 0
'''


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bisected_model.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["bisect", "bisected_model:model", "--passes", "canonicalize | dead_code", "--predicate", "bisected_model:silu"]) == 0
    assert "pass 1, canonicalize" in capsys.readouterr().out
    assert main(["bisect", "bisected_model:model", "--passes", "canonicalize", "--runs", "0"]) == 4
    assert "nothing to find" in capsys.readouterr().err


SAMPLE = ["decoder: fuse: swiglu: operands swapped", "decoder: siblings: gate and up change places"]


@pytest.mark.parametrize("name", SAMPLE)
def test_sabotaged_passes_are_named(name: str) -> None:
    found = search(MUTANTS[name])
    assert found.pass_ and found.site


@pytest.mark.slow
def test_all_sabotaged_passes_are_named() -> None:
    found = {name: search(mutant) for name, mutant in MUTANTS.items() if searchable(mutant)}
    wrong = [name for name, each in found.items() if not (each.pass_ and each.site)]
    assert len(wrong) <= 0.05 * len(found), wrong
