"""What a trainer can do with a run: rates, groups, accumulation, clipping, averages, freezing, stopping, skipping, limits, evaluation."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.errors import DataError
from fxopt.kernels.tolerance import same
from fxopt.train.averaging import Averaged, refresh_batch_norm
from fxopt.train.callbacks import EVENTS, Callback, State
from fxopt.train.freezing import Freezing
from fxopt.train.optimizers import Group, lora_plus, no_decay
from fxopt.train.schedule import Plateau, in_turn, make_schedule, product
from fxopt.train.trainer import Trainer, fit
from tests.train.small import Everything, Net, batches, run


def test_events_fire_in_order() -> None:
    seen = Everything()
    run(data=batches(3), val=batches(1), accumulate=2, callbacks=[seen])
    one = ["batch_start", "before_backward", "after_backward", "batch_end"]
    step = ["backward_end", "before_optimizer_step", "step_end", "log"]
    validation = ["validation_start", "validation_batch_start", "validation_batch_end", "validation_end", "log"]
    assert seen.calls == ["setup", "fit_start", "epoch_start", "before_zero_grad", "step_start", *one, *one, *step, "before_zero_grad", "step_start", *one, *step,
                          *validation, "epoch_end", "fit_end", "teardown"]
    assert len(EVENTS) >= 20 and all(vars(Callback)[name].__doc__ for name in EVENTS)


def test_events_of_evaluations_and_failures() -> None:
    seen = Everything()
    trainer = Trainer(callbacks=[seen], progress=False, steps=1)
    trainer.test(Net(), batches(1))
    trainer.predict(Net(), [batches(1)[0][0]])
    assert seen.calls == [f"{kind}{name}" for stage in ("test", "predict") for kind, name in (("", "setup"), (f"{stage}_", "start"), (f"{stage}_", "batch_start"),
                          (f"{stage}_", "batch_end"), (f"{stage}_", "end"), ("", "teardown"))]  # fmt: skip
    seen.calls.clear()
    with pytest.raises(DataError):
        trainer.fit(Net(), [batches(1)[0][0]])
    assert seen.calls[-2:] == ["exception", "teardown"]
    with pytest.raises(DataError, match="no event 'on_stepend'"):
        Trainer(callbacks=[type("Odd", (Callback,), {"on_stepend": lambda self: None})()], progress=False, steps=1).fit(Net(), batches())


# -- rates ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine", "wsd", "exponential"]), st.integers(1, 50), st.data())
def test_schedules_are_pure_and_stay_between_0_and_1(name: str, steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps))
    factor = make_schedule(name, steps, warmup)
    values = [factor(step) for step in range(steps + 3)]
    assert all(0.0 <= value <= 1.0 for value in values) and values == [factor(step) for step in range(steps + 3)]
    assert values[:warmup] == [step / warmup for step in range(warmup)] and values[warmup] == 1.0
    assert all(a >= b for a, b in zip(values[warmup:], values[warmup + 1 :]))


def test_schedules_have_settings_and_combine() -> None:
    assert make_schedule("wsd", 10, decay=0.5)(5) == 1.0 and make_schedule("wsd", 10, decay=0.5)(10) == 0.0
    assert make_schedule("cosine", 10, floor=0.1)(10) == make_schedule("linear", 10, floor=0.1)(99) == 0.1
    assert math.isclose(make_schedule("exponential", 10, end=0.5)(5), math.sqrt(0.5))
    turns = in_turn((3, make_schedule("linear", 3)), (99, lambda step: float(step)))
    assert [turns(step) for step in range(5)] == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0, 1.0])
    assert product(lambda s: 0.5, lambda s: 0.5)(3) == 0.25
    for bad in ({"decay": 0.0}, {"floor": 2.0}, {"speed": 1.0}):
        with pytest.raises(DataError, match="cannot take"):
            make_schedule("wsd", 5, **bad)


def test_a_plateau_lowers_the_rate_and_is_logged() -> None:
    class Flat(Callback):
        def on_validation_end(self, state: State, metrics: Any) -> None:
            metrics["val_loss"] = 1.0

    result, _ = run(val=batches(1), validate_every=1, schedule=["constant", Plateau(patience=1, factor=0.5)], callbacks=[Flat()])
    assert [step.lr for step in result.steps] == [0.05, 0.05, 0.05, 0.025, 0.025, 0.0125]


def test_groups_have_rates_and_decay_of_their_own() -> None:
    model = nn.ModuleDict({"lora_A": nn.Linear(2, 2, bias=False), "lora_B": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    made: list[Any] = []

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made.extend(groups)
        return torch.optim.SGD(groups)

    def loss(model: Any, x: Tensor) -> Tensor:
        return model["norm"](model["lora_B"](model["lora_A"](x))).sum()

    result = fit(model, [torch.ones(1, 2)] * 2, steps=2, lr=0.1, weight_decay=0.3, optimizer=make, groups=[*lora_plus(16.0), *no_decay(), Group("*_A*", lr=7.0)], schedule="linear", loss=loss, progress=False)
    assert [(len(g["params"]), round(g["lr"], 6), g["weight_decay"]) for g in made] == [(2, 1.6, 0.3), (2, 0.1, 0.0), (1, 7.0, 0.3)]
    assert result.metrics["lr"] == pytest.approx(0.8) and result.metrics["lr/2"] == pytest.approx(3.5)
    with pytest.raises(DataError, match="No trained parameter is matched by '\\*lora_C"):
        run(groups=[Group("*lora_C*")])


def test_several_optimizers_step_together() -> None:
    model, other = Net(), Net()
    run(model, optimizer=[torch.optim.SGD(model.a.parameters(), lr=0.1), torch.optim.SGD(model.b.parameters(), lr=0.2)], lr=None, schedule="constant")
    run(other, optimizer=torch.optim.SGD([{"params": other.a.parameters(), "lr": 0.1}, {"params": other.b.parameters(), "lr": 0.2}]), lr=None, schedule="constant")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# -- steps ---------------------------------------------------------------------------------------------------------------


def test_accumulation_by_epoch_and_by_step() -> None:
    result, _ = run(data=batches(6), epochs=2, accumulate={0: 4, 1: 2})
    assert [step.items for step in result.steps] == [16, 8, 8, 8, 8]
    result, _ = run(data=batches(6), accumulate=lambda step: step + 1)
    assert [step.items for step in result.steps] == [4, 8, 12]
    for bad in ({1: 2}, {0: 0}, lambda step: 0):
        with pytest.raises(DataError):
            run(accumulate=bad)


def test_samples_weigh_alike_in_uneven_batches() -> None:
    class Gradients(Callback):
        def on_backward_end(self, state: State) -> None:
            self.seen = [p.grad.clone() for p in state.model.parameters()]

    data = [(x[:n], y[:n]) for (x, y), n in zip(batches(3), (4, 1, 3), strict=True)]
    small, large = Gradients(), Gradients()
    for gradients, pairs, size in ((small, data, 3), (large, [tuple(map(torch.cat, zip(*data)))], 1)):
        model = Net().double()
        model.drop.p = 0.0
        run(model, [(x.double(), y) for x, y in pairs], accumulate=size, callbacks=[gradients], clip=None)
    assert all(same(a, b) for a, b in zip(small.seen, large.seen, strict=True))


def test_clipping_by_value_and_by_norm() -> None:
    class Look(Callback):
        def on_before_optimizer_step(self, state: State, optimizer: Any) -> None:
            grads = torch.cat([p.grad.flatten() for p in state.model.parameters()])
            self.largest, self.norm = float(grads.abs().max()), float(grads.norm())

    look = Look()
    run(clip=None, clip_value=1e-3, callbacks=[look])
    assert look.largest == pytest.approx(1e-3)
    result, _ = run(clip=0.01, callbacks=[look])
    assert 0.0099 < look.norm <= 0.01 and result.steps[-1].grad_norm > 0.01


def test_exponential_and_equal_averages_are_what_they_say() -> None:
    class Track(Callback):
        def __init__(self) -> None:
            self.weights: list[Tensor] = []

        def on_step_end(self, state: State) -> None:
            self.weights.append(state.model.a.weight.detach().clone().double())

    track = Track()
    _, model = run(callbacks=[Averaged(decay=0.5), track])
    wanted = track.weights[0]
    for weight in track.weights[1:]:
        wanted = 0.5 * wanted + 0.5 * weight
    assert same(model.a.weight, wanted.float())
    track = Track()
    _, model = run(callbacks=[Averaged(None, start=2, every=2), track])
    assert same(model.a.weight, torch.stack(track.weights[2::2]).mean(0).float())


def test_validations_see_the_average_and_training_does_not() -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_validation_batch_end(self, state: State, *_: Any) -> None:
            self.seen.append(state.model.a.weight.detach().clone())

    look, averaged = Look(), Averaged(0.9, replace=False)
    _, model = run(val=batches(1), callbacks=[averaged, look])
    assert torch.equal(look.seen[0], averaged.average["a.weight"]) and not torch.equal(look.seen[0], model.a.weight)
    _, plain = run()
    assert torch.equal(plain.a.weight, model.a.weight)


def test_batch_norm_is_refreshed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    data = [x for x, _ in batches(4)]
    assert refresh_batch_norm(model, data) == 1
    wanted = torch.stack([model[0](x).mean(0) for x in data]).mean(0)
    assert same(model[1].running_mean, wanted.detach()) and model[1].momentum == 0.1


@pytest.mark.parametrize("optimized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_freezing_by_epoch_and_step(optimized: bool) -> None:
    class Track(Callback):
        def __init__(self) -> None:
            self.weights: list[tuple[Tensor, Tensor]] = []

        def on_step_end(self, state: State) -> None:
            self.weights.append((state.model.a.weight.detach().clone(), state.model.b.weight.detach().clone()))

    track, model = Track(), Net()
    trained = fxopt.optimize(model, inputs=batches(1)[0]) if optimized else model
    run(trained, batches(2), epochs=3, callbacks=[Freezing(until={1: "a.*"}, since={2: ("b.*",)}), track])
    moved = [(not torch.equal(x[0], y[0]), not torch.equal(x[1], y[1])) for x, y in zip(track.weights, track.weights[1:])]
    assert moved == [(False, True), (True, True), (True, True), (True, False), (True, False)]
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(DataError, match="No trained parameter"):
        run(callbacks=[Freezing(until={1: "c.*"})])


# -- limits, seeds, evaluation ---------------------------------------------------------------------------------------------


def test_limits(tmp_path: Path) -> None:
    result, _ = run(limit_train=2, epochs=2, val=batches(3), limit_validate=1)
    assert (len(result.steps), result.epochs) == (4, 2)
    result, _ = run(fast_dev_run=True, val=batches(3), output_dir=tmp_path / "none", epochs=7)
    assert len(result.steps) == 1 and not (tmp_path / "none").exists() and "val_loss" in result.metrics
    assert len(run(fast_dev_run=2, epochs=7)[0].steps) == 2
    seen: list[float] = []
    result, _ = run(overfit_batches=2, epochs=3, shuffle=True, count=lambda batch: seen.append(float(batch[0].sum())) or 1)
    assert len(result.steps) == 6 and seen[:2] * 3 == seen
    result, _ = run(epochs=None, steps=500, max_seconds=0.05)
    assert len(result.steps) < 500 and result.why == "the time is used up"


def test_a_seed_and_determinism() -> None:
    drawn = []

    class Draw(Callback):
        def on_fit_start(self, state: State) -> None:
            drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))
            assert torch.are_deterministic_algorithms_enabled()

    losses = [run(seed=seed, deterministic=True, callbacks=[Draw()])[0].losses for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2] and drawn[0] == drawn[1] and all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_validation_does_not_disturb_training() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            torch.rand(3)
            return super().forward(x, y)

    alone, _ = run(Noisy())
    watched, _ = run(Noisy(), val=batches(2), validate_every=2)
    assert alone.losses == watched.losses


def test_evaluation_counts_every_sample_once() -> None:
    data = batches(3)
    data[2] = (data[2][0][:1], data[2][1][:1])
    model = Net().eval()
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    trainer = Trainer(progress=False, steps=1, metrics={"accuracy": lambda output, batch: output["logits"].argmax(-1) == batch[1]})
    found = trainer.validate(model.train(), data)
    assert model.training
    wanted = model.eval()(x, y)
    assert found["val_loss"] == pytest.approx(float(wanted["loss"].detach())) and found["val_accuracy"] == pytest.approx(float((wanted["logits"].argmax(-1) == y).double().mean()))
    assert torch.equal(torch.cat(trainer.predict(model, [x for x, _ in data])), torch.cat([model(x) for x, _ in data]))
    assert set(trainer.test(model, data)) == {"test_loss", "test_accuracy"}
    with pytest.raises(DataError, match="no batch to validate"):
        trainer.validate(model, [])


def test_a_data_module() -> None:
    calls: list[str] = []

    class Data:
        def prepare_data(self) -> None:
            calls.append("prepare")

        def setup(self, stage: str) -> None:
            calls.append(stage)

        def train_dataloader(self) -> Any:
            return batches(2)

        def val_dataloader(self) -> Any:
            return batches(1)

    result = Trainer(epochs=1, progress=False).fit(Net(), Data())
    assert calls == ["prepare", "fit"] and "val_loss" in result.metrics


def test_samples_with_a_batch_size_and_other_precision() -> None:
    samples = [(x[0], y[0]) for x, y in batches(10)]
    result, _ = run(data=samples, batch_size=4, precision="bf16")
    assert [step.items for step in result.steps] == [4, 4, 2]
    result, _ = run(data=samples, batch_size=4, precision="fp16")
    assert result.metrics["scale"] == 2.0**16
    with pytest.raises(DataError, match="no precision"):
        run(precision="fp8")
