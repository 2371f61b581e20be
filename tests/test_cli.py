"""The command: what it prints, where errors go, exit codes, and that help is fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, ViTConfig

import fxopt
from fxopt.cli import main

MODULE = '''
import torch
import torch.nn as nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    def forward(self, x):
        return self.layers(x.float()).sum()

class Branch(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1

def tiny():
    return Tiny(), torch.randn(3, 4)
def by_name():
    return Tiny(), {"x": torch.randn(3, 4)}
def bare():
    return Tiny()
def branch():
    return Branch(), torch.randn(3, 4)
def broken():
    raise KeyError("size")
def number():
    return 5, torch.randn(3, 4)
def misfit():
    return Tiny(), torch.randn(3, 5)
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "tiny_models", raising=False)
    return tmp_path


def test_help_does_not_import_torch() -> None:
    code = ("import sys\nfrom fxopt.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
            "assert 'torch' not in sys.modules, 'help imports torch'\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dump" in done.stdout


def test_public_names_are_there() -> None:
    assert all(getattr(fxopt, name) is not None for name in fxopt.__all__) and set(fxopt.__all__) <= set(dir(fxopt))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fxopt.nothing  # noqa: B018


def test_python_dash_m(here: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "fxopt", "dump", "tiny_models:tiny"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#") and "aten.linear.default" in done.stdout


def test_dump(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump", "tiny_models:tiny"]) == 0
    said = capsys.readouterr()
    assert "aten.dropout.default" in said.out and said.err == ""
    assert main(["dump", "tiny_models:by_name", "--eval", "--passes", "canonicalize"]) == 0
    said = capsys.readouterr()
    assert "aten.dropout.default" not in said.out and "# passes: canonicalize" in said.out
    assert main(["dump", "tiny_models:bare", "--inputs", "x=bfloat16[3, 4]"]) == 0
    assert "bfloat16[s0, 4]" in capsys.readouterr().out


def test_stages(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passes = ["--passes", "canonicalize | dead_code"]
    assert main(["dump", "tiny_models:tiny", *passes, "--after", "capture"]) == 0
    assert "aten.to.dtype" in capsys.readouterr().out
    assert main(["dump", "tiny_models:tiny", *passes, "--diff", "capture", "canonicalize"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("--- as captured\n+++ canonicalize\n") and "\n-    to = aten.to.dtype" in said
    assert main(["dump", "tiny_models:tiny", *passes, "--after", "fuse"]) == 2
    assert "the stages are: capture, canonicalize, dead_code" in capsys.readouterr().err


def test_json_and_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump", "tiny_models:tiny", "--passes", "canonicalize", "--json", "--verify"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passes"] == "canonicalize" and said["records"][0]["text"] == "canonicalize" and "aten.linear" in said["text"]
    assert "bitwise equal" in said["records"][0]["notes"][-1]
    assert main(["dump", "tiny_models:tiny", "--passes", "canonicalize", "--report"]) == 0
    assert "canonicalize: " in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["tiny_models:tiny", "--passes", "canonicalise"], 2, "did you mean canonicalize?"),
    (["tiny_models:nothing"], 2, "tiny_models has no 'nothing'"),
    (["no_such_module:x"], 2, "no module 'no_such_module'"),
    (["nonsense"], 2, "names no model"),
    (["tiny_models:bare"], 2, "gives no inputs"),
    (["tiny_models:bare", "--inputs", "x=floaty[3]"], 2, "is no input"),
    (["tiny_models:branch"], 3, "cannot be captured"),
    (["tiny_models:broken"], 2, "tiny_models:broken raises KeyError: 'size'"),
    (["tiny_models:number"], 2, "gives int as the model"),
])
def test_errors(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str) -> None:
    assert main(["dump", *arguments]) == code
    said = capsys.readouterr()
    assert says in said.err and said.out == ""


def test_wrong_inputs_and_numbers_of_runs_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "tiny_models:misfit"]) == 3
    said = capsys.readouterr().err
    assert said.startswith("fxopt: Tiny fails on this call by itself: RuntimeError: mat1 and mat2")
    assert main(["verify", "tiny_models:tiny", "--runs", "-1"]) == 3
    assert "runs is how many inputs are drawn, got -1" in capsys.readouterr().err


def test_wrong_usage_is_two() -> None:
    with pytest.raises(SystemExit) as end:
        main(["dump"])
    assert end.value.code == 2


def test_passes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes"]) == 0
    assert "canonicalize()\n    one spelling" in capsys.readouterr().out


def test_hugging_face_folders(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                architectures=["LlamaForCausalLM"]).save_pretrained(here / "text")
    assert main(["dump", str(here / "text"), "--passes", "canonicalize", "--fold"]) == 0
    said = capsys.readouterr().out
    assert "model.layers.1 … 2: same as model.layers.0" in said and "input_ids" in said and '"loss": cross_entropy_loss' in said
    ViTConfig(image_size=8, patch_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
              architectures=["ViTForImageClassification"]).save_pretrained(here / "image")
    assert main(["dump", str(here / "image")]) == 0
    assert "pixel_values" in capsys.readouterr().out


def test_plan_predicts_and_measures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny_models:by_name", "--batch", "64", "--measure"]) == 0
    said = capsys.readouterr().out
    assert "peak" in said and "weights" in said and "measured" in said
    assert main(["plan", "tiny_models:by_name", "--fit", "batch", "--memory", "1MiB"]) == 0
    assert int(capsys.readouterr().out.splitlines()[0].rsplit(" ", 1)[1]) > 64
    for wrong in (["--fit", "batch"], ["--memory", "1MiB"], ["--fit", "batch", "--memory", "much"], ["--fit", "batch", "--memory", "1MiB", "--batch", "2"],
                  ["--fit", "batch", "--memory", "1MiB", "--optimizer", "lion"]):
        assert main(["plan", "tiny_models:by_name", *wrong]) != 0


def test_explain(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tiny_models:tiny", "--passes", "canonicalize"]) == 0
    said = capsys.readouterr().out
    assert "1. canonicalize: " in said and "peak" in said and "->" in said
    assert main(["explain", "tiny_models:tiny", "--passes", "canonicalize", "--predict", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["start"] is None


def test_diff(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passes = ["--passes", "canonicalize | dead_code"]
    assert main(["diff", "tiny_models:tiny@capture", "tiny_models:tiny@canonicalize", *passes]) == 0
    stages = capsys.readouterr().out
    assert stages.startswith("--- as captured\n+++ canonicalize\n") and "\n-    to = aten.to.dtype" in stages
    assert main(["diff", "tiny_models:tiny", "tiny_models:tiny", *passes, "--passes-b", "canonicalize"]) == 0
    assert "+# passes: canonicalize\n" in capsys.readouterr().out
    assert main(["diff", "tiny_models:tiny", "tiny_models:tiny", *passes]) == 0
    assert capsys.readouterr().out == ""
    for name, json_ in (("dump.txt", []), ("dump.json", ["--json"])):
        assert main(["dump", "tiny_models:tiny", *passes, *json_]) == 0
        (here / name).write_text(capsys.readouterr().out)
    assert main(["diff", "dump.txt", "dump.json"]) == 0 and capsys.readouterr().out == ""
    assert main(["diff", "dump.txt", "tiny_models:by_name", *passes]) == 0
    assert "-    tensors_0," in capsys.readouterr().out
    (here / "other.json").write_text("{}")
    assert main(["diff", "other.json", "dump.txt"]) == 3 and "no saved dump" in capsys.readouterr().err
    assert main(["diff", "tiny_models:tiny@fuse", "dump.txt", *passes]) == 2


def test_a_whole_step(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump", "tiny_models:tiny", "--passes", "canonicalize", "--step"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("# step: x [3, 4]") or said.startswith("# step: args[0] [3, 4]")
    assert "def forward(" in said and "def backward(" in said and "# saved: " in said and "the gradients of: layers.0.weight" in said


def test_view(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", "tiny_models:tiny", "--passes", "canonicalize", "--predict", "none", "--verify", "-o", "graph.html"]) == 0
    assert capsys.readouterr().out.startswith("graph.html: 2 stages, ")
    said = (here / "graph.html").read_text()
    assert said.startswith("<!doctype html>") and '"verified":true' in said and "tiny_models.py:" in said
    assert main(["view", "tiny_models:tiny", "-o", "none/graph.html", "--predict", "none", "--passes", ""]) == 3
    assert "cannot be written" in capsys.readouterr().err


def test_locate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["locate", "tiny_models:tiny", "--passes", "canonicalize"]) == 0
    assert capsys.readouterr().out == "every output and every gradient of this step is finite\n"
    save_file({"x": torch.tensor([[1.0, float("nan"), 0.0, 0.0]] * 3)}, here / "batch.safetensors")
    assert main(["locate", "tiny_models:bare", "--passes", "canonicalize", "--batch", "batch.safetensors"]) == 4
    assert "the input x is not finite" in capsys.readouterr().err
    assert main(["locate", "tiny_models:bare", "--batch", "none.safetensors"]) == 3
    assert "cannot be read" in capsys.readouterr().err
