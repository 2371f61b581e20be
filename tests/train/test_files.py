"""What a run leaves to read: logs, report, summary, and the configuration it came from."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from torch import nn

import fxopt
from fxopt.cli import main
from fxopt.errors import DataError
from fxopt.train import config
from fxopt.train.callbacks import Callback, State
from fxopt.train.journal import METRICS, TABLE, TIMES, rows
from fxopt.train.loggers import MLflow, TensorBoard, WandB
from fxopt.train.report import curve
from fxopt.train.saver import Checkpoints
from fxopt.train.summary import summary
from fxopt.train.trainer import Trainer

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        return self.a(x).square().mean()

def model():
    torch.manual_seed(0)
    return Net(), (torch.ones(2, 3),)

def data():
    return [(torch.full((2, 3), float(i)),) for i in range(4)]
"""
YAML = """
model: their_module:model
passes: none
data: {train: "their_module:data", val: "their_module:data"}
trainer:
  epochs: 2
  lr: 1e-2
  progress: false
  schedule: [linear, {kind: Plateau, patience: 1}]
  groups: [{kind: no_decay}, {kind: Group, match: "*weight", lr: 0.5}]
  callbacks: [{kind: EarlyStopping, monitor: val_loss, patience: 5}, {kind: Averaged, decay: 0.5}, {kind: Freezing, until: {1: "*bias"}}]
  checkpoints: {every: 3, unit: step, keep: 4}
  spikes: {factor: 9.0}
"""


class Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log_metrics(self, row: Mapping[str, float], step: int) -> None:
        self.calls.append(("metrics", step, sorted(row)[:1]))

    def log_hparams(self, values: Mapping[str, Any]) -> None:
        self.calls.append(("settings", values["lr"]))

    def log_artifact(self, path: Path) -> None:
        self.calls.append(("file", path.name))

    def finish(self) -> None:
        self.calls.append(("finish",))


class Extra(Callback):
    def on_step_end(self, state: State) -> None:
        state.log("extra", math.nan if state.step == 1 else math.inf)
        with pytest.raises(DataError, match="2 values"):
            state.log("many", torch.ones(2))


def test_logs_and_report(tmp_path: Path) -> None:
    recorder = Recorder()
    model = nn.Sequential(nn.Linear(2, 1))
    result = Trainer(steps=3, lr=0.1, output_dir=tmp_path, loggers=[recorder], callbacks=[Extra()], progress=False, loss=lambda m, x: m(x).square().mean(), validate_every=2, checkpoints=False).fit(
        model, [torch.ones(2, 2)], [torch.ones(2, 2)])  # fmt: skip
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 2, 3, 3] and found[0]["loss"] == result.steps[0].loss and math.isnan(found[0]["extra"]) and found[1]["extra"] == math.inf
    with (tmp_path / TABLE).open() as stream:
        table = list(csv.DictReader(stream))
    assert {(row["name"], row["step"]) for row in table} >= {("loss", "1"), ("val_loss", "2")} and float(next(r["value"] for r in table if r["name"] == "loss")) == result.steps[0].loss
    assert [row["step"] for row in rows(tmp_path, TIMES)] == [1, 2, 3]
    assert recorder.calls[0] == ("settings", 0.1) and recorder.calls[-2:] == [("file", "report.html"), ("finish",)] and recorder.calls[1] == ("metrics", 1, ["extra"])
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "") and page.count("<svg") >= 4 and "no finite values" not in page.split("extra")[0]
    with pytest.raises(DataError, match="cannot be read"):
        rows(tmp_path / "none")


def test_curves_are_whole_and_escaped() -> None:
    svg = curve({"<loss>": [(i, math.nan if i == 5 else math.sin(i)) for i in range(9)], "b": [(0, 1.0), (8, 2.0)]})
    ElementTree.fromstring(re.sub(r"=([\w#.%-]+)(?=[ >/])", r"='\1'", svg.replace("stroke-linejoin", " stroke-linejoin")))
    assert "&lt;loss&gt;" in svg and "nan" not in svg and svg.count("M") == 3
    assert curve({"x": [(0, math.nan)]}) == "<p>no finite values</p>"
    long = curve({"x": [(i, 100.0 if i == 5000 else 0.0) for i in range(10000)]})
    assert len(long) < 40000 and "100" in long


def test_the_summary_counts() -> None:
    opt = fxopt.optimize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), "canonicalize", inputs=(torch.ones(2, 64),))
    text = summary(opt, measured=1 << 20)
    assert re.search(r"\(all\) +Sequential +4,290 +4,290 +16.8 KiB", text) and re.search(r"\n1 +Linear +130", text) and "peak" in text and "measured peak: 1.0 MiB" in text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "their_module.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_configuration_is_typed(folder: Path) -> None:
    found = config.load("run.yaml", ["trainer.clip=2", "trainer.output_dir=out"])
    trainer = found.trainer
    assert (trainer.lr, trainer.clip, trainer.output_dir) == (0.01, 2.0, "out") and trainer.checkpoints == Checkpoints(3, "step", 4)
    assert len(trainer.groups) == 2 and trainer.groups[1].lr == 0.5 and trainer.callbacks[0].patience == 5
    assert config.text(config.build(yaml.safe_load(config.text(found)))) == config.text(found), "what is printed reads back"


@pytest.mark.parametrize(("override", "message"), [
    ("trainer.epoch=1", "Do you mean epochs?"), ("trainer.lr=fast", "wanted is float"), ("trainer.epochs=2.5", "wanted is int"), ("trainer.checkpoints={evry: 1}", "Do you mean every?"),
    ("trainer.callbacks=[{kind: EarlyStoping}]", "Do you mean EarlyStopping?"), ("trainer.callbacks=[{kind: EarlyStopping, patient: 1}]", "Do you mean patience?"), ("modell=x", "Do you mean model?"),
    ("data={}", "'train' is missing"), ("trainer.progress=3", "wanted is bool"), ("trainer", "sets nothing"), ("model.x=1", "no names beneath it"),
])  # fmt: skip
def test_what_a_configuration_does_not_know_is_an_error(folder: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError) as caught:
        config.load("run.yaml", [override])
    assert message in str(caught.value)
    assert main(["train", "run.yaml", override]) == 2 and message in capsys.readouterr().err


def test_fxopt_train(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "run.yaml", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["clip"] == 1.0
    assert main(["train", "run.yaml", "trainer.output_dir=out", "trainer.epochs=1"]) == 0
    out = capsys.readouterr().out
    assert "steps 4, epochs 1" in out and "checkpoint: out/checkpoints/step-00000004-epoch-0001" in out and "val_loss" in out
    assert main(["train", "run.yaml", "trainer.output_dir=out"]) == 3 and "holds the checkpoints" in capsys.readouterr().err
    assert main(["train", "run.yaml", "trainer.output_dir=out", "--resume"]) == 0 and "steps 8, epochs 2" in capsys.readouterr().out
    assert main(["train", "run.yaml", "trainer.output_dir=out", "--resume", "--tune"]) == 2
    assert main(["train", "run.yaml", "trainer.output_dir=tuned", "trainer.epochs=1", "--tune"]) == 0
    assert "learning rate" in capsys.readouterr().err and (Path("tuned") / "rate.html").is_file()
    assert main(["train", "none.yaml"]) == 2
    assert main(["train", "run.yaml", "trainer.loggers=[{kind: Nope}]"]) == 2


def test_other_loggers_get_what_they_want() -> None:
    class Any_:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def __getattr__(self, name: str) -> Any:
            def call(*given: Any, **more: Any) -> Any:
                self.calls.append(name)
                return self

            return self if name in ("config", "info", "run_id", "experiment_id") else call

    for make, wanted in ((TensorBoard, ["add_text", "add_scalar", "close"]), (WandB, ["update", "log", "finish"]),
                         (lambda it: MLflow(it, "x"), ["get_experiment_by_name", "create_run", "log_param", "log_metric", "set_terminated"])):
        target = Any_()
        logger = make(target)
        logger.log_hparams({"lr": 1.0})
        logger.log_metrics({"loss": 2.0}, 3)
        logger.log_artifact(Path("none"))
        logger.finish()
        assert target.calls == wanted


def test_metrics_file_is_strict(tmp_path: Path) -> None:
    Trainer(steps=1, output_dir=tmp_path, progress=False, checkpoints=False, loss=lambda m, x: m(x).sum() * 0 + 1).fit(nn.Linear(1, 1), [torch.ones(1, 1)])
    assert "NaN" not in (tmp_path / METRICS).read_text()
