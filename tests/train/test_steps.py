"""Steps that end a run or are not taken: early stopping, what is not finite, spikes, loss scaling, manual steps; values that are tapped."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import CallError, CheckError, DataError
from fxopt.ir.taps import Tap
from fxopt.runtime.scaler import Scaler
from fxopt.runtime.scaler import State as ScalerState
from fxopt.train.callbacks import Callback, State
from fxopt.train.guard import Spikes
from fxopt.train.journal import rows
from fxopt.train.stopping import EarlyStopping
from fxopt.train.taps import Taps
from fxopt.train.trainer import Trainer, fit
from tests.train.small import Everything, Net, batches, run


class Curve(Callback):
    """Validation losses as given; remembers the weights at each."""

    def __init__(self, *values: float) -> None:
        self.values, self.weights = list(values), []

    def on_validation_end(self, state: State, metrics: Any) -> None:
        metrics["val_loss"] = self.values[len(self.weights)]
        self.weights.append({name: value.clone() for name, value in state.model.state_dict().items()})


@pytest.mark.parametrize(("values", "settings", "steps", "best"), [
    ((3, 1, 2, 2, 2, 2), {"patience": 1}, 4, 1), ((3, 2, 1.9, 1.8, 1.7, 1), {"patience": 1, "min_delta": 0.5}, 4, 1), ((1, 2, 3, 4, 5, 6), {"mode": "max", "patience": 0}, 6, 5),
    ((3, 2, 1, 0, 0, 0), {"good": 2.0}, 2, 1), ((3, 2, 9, 0, 0, 0), {"bad": 8.0}, 3, 1), ((3, math.nan, 1, 1, 1, 1), {}, 2, 0), ((3, math.inf, 1, 0, 0, 0), {"check_finite": False}, 6, 3),
])  # fmt: skip
def test_early_stopping_puts_the_best_weights_back(values: Any, settings: Any, steps: int, best: int) -> None:
    curve = Curve(*values)
    result, model = run(data=batches(6), val=batches(1), validate_every=1, callbacks=[curve, EarlyStopping(**settings)])
    assert len(result.steps) == steps and bool(result.why) == (steps < 6)
    assert all(torch.equal(value, curve.weights[best][name]) for name, value in model.state_dict().items())


def test_a_name_that_is_never_logged_is_an_error() -> None:
    with pytest.raises(DataError, match="'val_los' was not logged") as caught:
        run(val=batches(1), callbacks=[EarlyStopping("val_los")])
    assert "do you mean val_loss?" in caught.value.do


def test_steps_that_are_not_finite_are_skipped_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    data = batches(5)
    data[2] = (data[2][0] * math.nan, data[2][1])
    with pytest.raises(CheckError, match="loss of step 3 is nan") as caught:
        run(data=data)
    assert "number 2 of the epoch; first at its inputs" in caught.value.where
    clean = data[:2] + data[3:]
    with caplog.at_level(logging.WARNING, "fxopt"):
        result, model = run(data=data, not_finite="skip", schedule="constant", optimizer="sgd")
    assert "step 3 is left out" in caplog.text
    assert [bool(step.skipped) for step in result.steps] == [False, False, True, False, False]
    other = Net()
    other.drop.p = model.drop.p = 0.0
    run(model := Net(), data, not_finite="skip", schedule="constant", optimizer="sgd")
    assert all(parameter.isfinite().all() for parameter in model.parameters()) and len(clean) == 4


def test_where_a_number_stops_being_finite() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(torch.log(y - y - 1.0)).sum()

    opt = fxopt.optimize(Deep(), inputs=(torch.randn(2, 4),), check=False)
    for model, place in ((opt, "`log"), (Deep(), "(the model): Deep")):
        with pytest.raises(CheckError) as caught:
            fit(model, [(torch.randn(2, 4),)], steps=1, progress=False)
        assert place in caught.value.where
    assert "test_steps.py" in str(pytest.raises(CheckError, fit, opt, [(torch.randn(2, 4),)], steps=1, progress=False).value.where)


def test_spikes_are_left_out() -> None:
    seen = Everything()
    data = batches(24)
    data[20] = (data[20][0] * 1e4, data[20][1])
    result, _ = run(data=data, lr=1e-3, spikes=Spikes(after=8), callbacks=[seen])
    assert [i for i, step in enumerate(result.steps) if step.skipped] == [20] and "is a spike" in result.steps[20].skipped
    assert seen.calls.count("skip") == 1
    with pytest.raises(CheckError, match="in a row are spikes"):
        run(data=[*batches(10), *[(x * 1e4, y) for x, y in batches(9)]], lr=1e-3, spikes=Spikes(after=8, in_a_row=3))


def test_fp16_programs_get_a_loss_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = fxopt.optimize(Net(), inputs=batches(1)[0])
    monkeypatch.setattr(Scaler, "of", classmethod(lambda cls, program: cls(ScalerState(scale=1024.0))))
    result, _ = run(opt, optimizer="torch_adamw")
    assert result.metrics["scale"] == 1024.0
    monkeypatch.undo()
    plain, _ = run(fxopt.optimize(Net(), inputs=batches(1)[0]), optimizer="torch_adamw")
    assert "scale" not in plain.metrics and plain.losses == pytest.approx(result.losses)


def test_manual_optimization_steps_by_itself() -> None:
    class Manual:
        automatic_optimization = False

        def __init__(self) -> None:
            self.net = Net()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net.a.parameters(), lr=0.1), torch.optim.SGD(self.net.b.parameters(), lr=0.1)]

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = self.net(*batch)["loss"]
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            self.optimizers()[index % 2].step()
            return loss

    manual = Manual()
    before = manual.net.b.weight.clone()
    result = Trainer(steps=1, progress=False).fit(manual, batches())
    assert torch.equal(before, manual.net.b.weight) and len(result.steps) == 1
    Trainer(steps=2, progress=False).fit(manual, batches())
    assert not torch.equal(before, manual.net.b.weight) and not hasattr(manual, "optimizers")


def test_taps_log_the_values_of_the_step_itself(tmp_path: Path) -> None:
    taps = Taps({"first": "a", "loss": "*loss*", "slope": Tap("a", "norm", gradient=True), "sizes": Tap("a", "histogram")}, every=2)
    weights: list[tuple[float, float]] = []

    class First(Callback):
        def on_batch_start(self, state: State, batch: Any, index: int) -> None:
            inner = state.model.model
            value = inner.a(batch[0]).detach().requires_grad_()
            with torch.random.fork_rng(devices=[]):
                nn.functional.cross_entropy(inner.b(inner.drop(value.relu())), batch[1]).backward(inputs=[value])
            weights.append((float(value.abs().max()), float(value.grad.norm())))

    opt = fxopt.optimize(Net(), inputs=batches(1)[0])
    before = opt.program
    result, _ = run(opt, callbacks=[taps, First()], output_dir=tmp_path, checkpoints=False)
    found = rows(tmp_path)
    assert [("tap/first" in row) for row in found] == [True, False] * 3 and opt.program is before
    assert all(row["tap/loss"] == pytest.approx(row["loss"]) for row in found[::2]), "with the same dropout"
    assert [(row["tap/first"], row["tap/slope"]) for row in found[::2]] == [pytest.approx(pair) for pair in weights[::2]]
    assert all(sum(count for name, count in row.items() if name.startswith("tap/sizes/2^")) == 24 for row in found[::2])
    assert result.losses == run(fxopt.optimize(Net(), inputs=batches(1)[0]))[0].losses
    with pytest.raises(CallError, match="no node and no module"):
        run(opt, callbacks=[Taps({"x": "nothing.*"})])
    assert opt.dispatcher.tapping is None
    with pytest.raises(DataError, match="have a program to tap"):
        run(callbacks=[taps])
    with pytest.raises(DataError, match="whole value"):
        Taps({"x": Tap("a", "value")})

