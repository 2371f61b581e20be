"""What a trainer is given by mistake is refused, or said, by name."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import fxopt
from fxopt.errors import DataError
from fxopt.runtime.counting import samples
from fxopt.train import config
from fxopt.train.batch import to_device
from fxopt.train.freezing import Freezing
from fxopt.train.loader import source_of
from fxopt.train.schedule import Plateau

X = torch.arange(128.0).reshape(16, 8) / 128
SAMPLES = [(x, x.sum()) for x in X]
BATCHES = [(X[i : i + 4], X[i : i + 4].sum(1)) for i in range(0, 16, 4)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.layer(x)[:, 0] - y).square().mean()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(SAMPLES)


@dataclass(frozen=True)
class Pair:
    x: Tensor
    y: Tensor


def trainer(**settings) -> fxopt.Trainer:
    return fxopt.Trainer(**{"steps": 2, "progress": False} | settings)


def test_a_loader_over_an_iterable_data_set_has_no_length():
    assert source_of(DataLoader(Stream(), 4)).length(0) is None
    assert len(trainer(steps=6).fit(Net(), DataLoader(Stream(), 4)).steps) == 6
    with pytest.raises(DataError, match="no length"):
        trainer(steps=None, epochs=1).fit(Net(), DataLoader(Stream(), 4))


@pytest.mark.parametrize("data", ["rows.jsonl", b"rows", {"x": X}])
def test_texts_and_mappings_hold_no_batches(data):
    with pytest.raises(DataError, match="cannot be passed over"):
        trainer().fit(Net(), data)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip", "max_seconds"])
def test_a_rate_is_a_number(name):
    with pytest.raises(DataError, match="is not a number"):
        trainer(**{name: "1e-3"})


def test_an_optimizer_of_another_model_is_refused():
    model = Net()
    with pytest.raises(DataError, match="no parameter that the model trains"):
        trainer(optimizer=torch.optim.SGD(Net().parameters(), 0.1)).fit(model, BATCHES)
    trainer(optimizer=torch.optim.SGD(model.parameters(), 0.1)).fit(model, BATCHES)


def test_an_optimizer_that_evaluates_the_model_is_refused():
    model = Net()
    for optimizer in (torch.optim.LBFGS(model.parameters()), lambda groups: torch.optim.LBFGS(groups[0]["params"])):
        with pytest.raises(DataError, match="LBFGS"):
            trainer(optimizer=optimizer).fit(model, BATCHES)


def test_a_loss_without_a_gradient_is_refused():
    with pytest.raises(DataError, match="depends on no parameter"):
        trainer(loss=lambda model, batch: model(*batch).detach()).fit(Net(), BATCHES)
    with pytest.raises(DataError, match="depends on no parameter"):
        trainer(steps=None, epochs=2, callbacks=[Freezing(until={1: "*"})]).fit(Net(), BATCHES)


def test_data_classes_are_batches():
    batch = Pair(X[:4], X[:4].sum(1))
    assert samples(batch) == 4
    moved = to_device(batch, torch.device("meta"))
    assert moved.x.is_meta and moved.y.is_meta and not batch.x.is_meta


def test_a_resume_with_another_optimizer_changes_nothing(tmp_path):
    trainer(optimizer="sgd", output_dir=tmp_path).fit(Net(), BATCHES)
    model = Net()
    before = model.layer.weight.detach().clone()
    with pytest.raises(DataError, match="other settings than AdamW"):
        trainer(steps=4, optimizer="torch_adamw", output_dir=tmp_path).fit(model, BATCHES, resume=True)
    assert torch.equal(model.layer.weight, before)


def test_a_resume_with_other_data_says_so(tmp_path, caplog):
    trainer(output_dir=tmp_path).fit(Net(), BATCHES)
    with caplog.at_level(logging.WARNING, "fxopt"):
        trainer(steps=3, output_dir=tmp_path).fit(Net(), BATCHES, resume=True)
        assert "batches" not in caplog.text
        trainer(steps=4, output_dir=tmp_path).fit(Net(), BATCHES[:3] * 3, resume=True)
    assert "an epoch of this data has 9 batches, one of the saved run's 4" in caplog.text


@pytest.mark.parametrize(("monitor", "unseen"), [("val_loss", False), ("val_los", True)])
def test_a_plateau_that_saw_nothing_says_so(monitor, unseen, caplog):
    with caplog.at_level(logging.WARNING, "fxopt"):
        trainer(schedule=Plateau(monitor)).fit(Net(), BATCHES, BATCHES)
    assert (f"Plateau saw no {monitor!r}" in caplog.text) is unseen


@pytest.mark.parametrize(("lines", "said"), [("model: m:f\nmodel: m:g", "'model' is given twice"), ("trainer: {steps: 1, lr: 1.0, lr: 2.0}", "'lr' is given twice"),
                                             ("model: m:f\ndata: {train: m:d}\ntrainer: {steps: 1, callbacks: {kind: EarlyStopping}}", "`callbacks` is not a list")])
def test_a_configuration_says_each_thing_once_and_as_a_list(tmp_path, lines, said):
    (tmp_path / "run.yaml").write_text(lines)
    with pytest.raises(DataError, match=said):
        config.load(tmp_path / "run.yaml")


class Configured(Net):
    """Makes its own optimizers."""

    def training_step(self, batch, index):
        return self(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("setting", [{"optimizer": "sgd"}, {"lr": 0.1}, {"schedule": "linear"}, {"warmup": 1}])
def test_settings_beside_a_modules_own_optimizers_are_refused(setting):
    with pytest.raises(DataError, match=f"`{next(iter(setting))}` is for an optimizer that the trainer makes"):
        trainer(**setting).fit(Configured(), BATCHES)
    trainer().fit(Configured(), BATCHES)


def test_a_parameter_in_two_optimizers_is_refused():
    class Twice(Configured):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD([self.layer.bias], 0.1)]

    model = Net()
    with pytest.raises(DataError, match=r"(?s)held by two optimizers.*: 1\..*layer.bias"):
        trainer(optimizer=[torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD([model.layer.bias], 0.1)]).fit(model, BATCHES)
    with pytest.raises(DataError, match="two optimizers"):
        trainer().fit(Twice(), BATCHES)
    trainer(optimizer=[torch.optim.SGD([model.layer.weight], 0.1), torch.optim.SGD([model.layer.bias], 0.1)]).fit(model, BATCHES)


def test_a_callback_that_cannot_be_called_is_refused_at_the_start():
    class Wrong(fxopt.Callback):
        def on_fit_end(self):
            raise AssertionError("was called")

    with pytest.raises(DataError, match=r"(?s)on_fit_end cannot be called with \(state.*Wrong"):
        trainer(callbacks=[Wrong()]).fit(Net(), BATCHES)
