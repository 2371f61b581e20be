"""A convnet on real images (scikit-learn's digits, which come with it): validation metrics, early stopping, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxopt
from fxopt.train.callbacks import Callback, State
from fxopt.train.journal import METRICS, rows
from fxopt.train.loader import Loader
from fxopt.train.saver import Checkpoints
from fxopt.train.stopping import EarlyStopping
from fxopt.train.trainer import Trainer


def digits() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """1,500 images [1, 8, 8] to learn from, 297 held out."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16.0, torch.tensor(labels)
    samples = list(zip(x, y, strict=True))
    return samples[:1500], samples[1500:]


class Convnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, y), "logits": logits}


class Interrupt(Callback):
    def __init__(self, step: int) -> None:
        self.at = step

    def on_step_end(self, state: State) -> None:
        if state.step == self.at:
            raise KeyboardInterrupt


def trainer(folder: Path, interrupt: int) -> Trainer:
    return Trainer(epochs=12, lr=3e-3, seed=0, output_dir=folder, progress=False, metrics={"accuracy": lambda output, batch: output["logits"].argmax(-1) == batch[1]},
                   callbacks=[EarlyStopping("val_accuracy", "max", patience=1, good=0.95), Interrupt(interrupt)], checkpoints=Checkpoints(every=10, unit="step", best=1, monitor="val_accuracy", mode="max"))


@pytest.mark.parametrize("optimized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_digits(tmp_path: Path, optimized: bool) -> None:
    train, held_out = digits()

    def model() -> nn.Module:
        return fxopt.optimize(Convnet(), inputs=(train[0][0].expand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))) if optimized else Convnet()

    def data() -> tuple[Loader, Loader]:
        return Loader(train, 64, shuffle=True, seed=1), Loader(held_out, 128)

    whole = model()
    result = trainer(tmp_path / "a", 10**9).fit(whole, *data())
    assert result.why and result.epochs < 12, "early stopping ended it"
    best = max(row["val_accuracy"] for row in rows(tmp_path / "a") if "val_accuracy" in row)
    assert best >= 0.9 and trainer(tmp_path / "a", 0).validate(whole, data()[1])["val_accuracy"] == best, "the weights are the best ones"
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", 37).fit(model(), *data())
    again = model()
    resumed = trainer(tmp_path / "b", 10**9).fit(again, *data(), resume=True)
    assert resumed.first_step == 30 and resumed.best is not None
    assert (tmp_path / "a" / METRICS).read_bytes() == (tmp_path / "b" / METRICS).read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
