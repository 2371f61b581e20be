"""Training on several processes is training on one: the same loss, gradients and decisions, whatever the data is like."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.train.callbacks import Callback, State
from fxopt.train.schedule import Plateau
from fxopt.train.stopping import EarlyStopping
from fxopt.train.strategies.ddp import DDP
from fxopt.train.trainer import Trainer, fit
from tests.models import llama, tokens
from tests.train.processes import outcomes, together
from tests.train.small import batches

VOCABULARY = 11


class Bigram(nn.Module):
    """A language model whose loss is the mean over supervised tokens, in fp64; a branch that only batches with an even first token take,
    and one that none takes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        # The last parameters are exchanged first: what may lack a gradient comes first, or nothing would begin during a backward.
        self.never, self.even = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)
        self.embed, self.head = nn.Embedding(VOCABULARY, 4, dtype=torch.float64), nn.Linear(4, VOCABULARY, dtype=torch.float64)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(input_ids)
        if int(input_ids[0, 0]) % 2 == 0:
            hidden = hidden + self.even(hidden)
        return {"loss": nn.functional.cross_entropy(self.head(hidden)[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))}


def supervised(batch: dict[str, Tensor]) -> int:
    return int(batch["labels"][:, 1:].ne(-100).sum())


def text(rows: int, length: int, masked: int, seed: int) -> dict[str, Tensor]:
    """A batch of random tokens, the first `masked` labels of each row ignored."""
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :masked] = -100
    return {"input_ids": ids, "labels": labels}


BATCHES = st.lists(st.builds(text, st.integers(1, 3), st.integers(3, 6), st.integers(0, 6), st.integers(0, 99)), min_size=1, max_size=7)


def trained(world: int, data: Sequence[Any], accumulate: int, clip: float | None) -> tuple[list[float], list[float], list[np.ndarray]] | None:
    """A bare loop over the turns that so many ranks would take: losses, norms, weights. None: no batch supervises anything."""
    model = Bigram()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, norms = [], []
    for start in range(0, len(data), world * accumulate):
        group = [batch for batch in data[start : start + world * accumulate] if supervised(batch)]
        total = sum(map(supervised, group))
        if not group:
            continue
        optimizer.zero_grad()
        loss = sum(model(**batch)["loss"] * supervised(batch) / total for batch in group)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip if clip is not None else math.inf)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return (losses, norms, [parameter.detach().numpy() for parameter in model.parameters()]) if losses else None


def run(model: nn.Module, data: Any, val: Any = None, **more: Any) -> tuple[list[float], list[float], list[np.ndarray]]:
    result = fit(model, data, val, **{"epochs": 1, "lr": 0.5, "optimizer": "sgd", "schedule": "constant", "progress": False, "clip": None, **more})
    return [step.loss for step in result.steps], [step.grad_norm for step in result.steps], [p.detach().numpy() for p in model.parameters() if p.requires_grad]


def assert_equal_runs(found: Sequence[Any], wanted: Any) -> None:
    for other in found[1:]:
        assert other[0] == found[0][0] and other[1] == found[0][1], "losses and norms are bitwise those of the other ranks"
        assert all(np.array_equal(a, b) for a, b in zip(other[2], found[0][2], strict=True)), "weights are bitwise those of the other ranks"
    for mine, theirs in zip(found[0], wanted, strict=True):
        torch.testing.assert_close([torch.as_tensor(value) for value in mine], [torch.as_tensor(value) for value in theirs])


def check(world: int, data: list[Any], accumulate: int, clip: float | None, overlap: bool) -> None:
    wanted = trained(world, data, accumulate, clip)
    found = outcomes(world, lambda rank: run(Bigram(rank), data, accumulate=accumulate, clip=clip, strategy=DDP(overlap=overlap, bucket=300)))
    if wanted is None:
        assert all("gave no batch to train on" in each.error for each in found)
        return
    assert all(not each.error for each in found), found
    assert_equal_runs([each.value for each in found], wanted)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=BATCHES, accumulate=st.integers(1, 3), clip=st.sampled_from([None, 0.1]), overlap=st.booleans())
def test_any_data_gives_the_steps_of_one_process(data: list[Any], accumulate: int, clip: float | None, overlap: bool) -> None:
    check(2, data, accumulate, clip, overlap)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=BATCHES, world=st.integers(2, 4), accumulate=st.integers(1, 3), clip=st.sampled_from([None, 0.1]), overlap=st.booleans())
def test_any_data_on_up_to_four_processes(data: list[Any], world: int, accumulate: int, clip: float | None, overlap: bool) -> None:
    check(world, data, accumulate, clip, overlap)


def test_gradients_that_some_or_all_ranks_lack() -> None:
    even, odd = text(1, 4, 0, 0), text(1, 4, 0, 0)
    even["input_ids"][0, 0], odd["input_ids"][0, 0] = 2, 3

    class Look(Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, bool]] = []

        def on_backward_end(self, state: State) -> None:
            self.seen.append({name: parameter.grad is not None for name, parameter in state.model.named_parameters()})

    def ranks(rank: int) -> list[dict[str, bool]]:
        look = Look()
        run(Bigram(), [odd, even, odd, odd], callbacks=[look])
        return look.seen

    for first, second in together(2, ranks):
        assert first["even.weight"] and not second["even.weight"] and not first["never.weight"] and first["head.bias"] and second["head.bias"]


PIPELINES = {"full": "canonicalize | causal | denominator | fuse | loss | remat | dead_code",
             "lora": "canonicalize | causal | denominator | lora(rank=2) | fuse | loss | remat | dead_code",
             "qlora": "canonicalize | causal | denominator | lora(rank=2) | quantize(nf4) | fuse | loss | remat | dead_code"}


def optimized(kind: str) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    data = [tokens(2, 5 + i % 4, seed=i) for i in range(7)]
    for i, batch in enumerate(data):
        batch["labels"][:, : i % 4] = -100
    return fxopt.optimize(llama(layers=1), PIPELINES[kind], inputs=data[0]), data


@pytest.mark.parametrize("kind", ["qlora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "lora"))])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_programs_train_as_on_one_process(kind: str, world: int) -> None:
    opt, data = optimized(kind)
    more = {"optimizer": "adamw", "lr": 1e-2, "epochs": 2, "clip": 0.5}
    (wanted,) = together(1, lambda rank: run(opt, data, accumulate=2 * world, **more))
    assert_equal_runs(together(world, lambda rank: run(opt, data, accumulate=2, **more)), wanted)


class Normed(nn.Module):
    """Batch norm, and a whole-number buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).pow(2).mean()


def test_buffers_are_the_mean_of_the_ranks_that_changed_them() -> None:
    data = [(torch.randn(4, 3, dtype=torch.float64),) for _ in range(3)]  # the second step has one batch

    def ranks(rank: int) -> list[np.ndarray]:
        model = Normed()
        run(model, data, count=len)
        return [buffer.numpy() for buffer in model.buffers()]

    first, second = together(2, ranks)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    models = [Normed() for _ in data]
    for model, batch in zip(models, data, strict=True):
        model(*batch)
    mean = (models[0].body[1].running_mean + models[1].body[1].running_mean) / 2
    hidden = None

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal hidden
        hidden = args[0].detach()

    (wanted,) = together(1, lambda rank: run(Normed(), data[:2], count=len, accumulate=2)[2])  # the first step's weights
    third = Normed()
    for parameter, value in zip(third.parameters(), wanted, strict=True):
        parameter.data.copy_(torch.from_numpy(value))
    third.body[1].register_forward_pre_hook(keep)
    third(*data[2])
    torch.testing.assert_close(torch.from_numpy(first[0]), 0.9 * mean + 0.1 * hidden.mean(0))
    assert first[2] == 2


def test_evaluation_sees_each_sample_once_and_sums_exactly() -> None:
    data = [text(1 + i % 3, 4, i % 3, i) for i in range(5)]

    def ranks(rank: int) -> tuple[dict[str, float], list[int]]:
        seen: list[int] = []
        model = Bigram()

        def first(output: Any, batch: dict[str, Tensor]) -> Tensor:
            seen.append(next(i for i, each in enumerate(data) if each is batch or torch.equal(each["input_ids"], batch["input_ids"])))
            return batch["input_ids"][:, 0].double()

        return Trainer(progress=False, metrics={"first": first}).validate(model, data), seen

    found, (wanted, _) = together(2, ranks), ranks(0)
    assert found[0][0] == found[1][0] and sorted(found[0][1] + found[1][1]) == list(range(5))
    assert all(math.isclose(found[0][0][name], value) for name, value in wanted.items()) and set(wanted) == {"val_loss", "val_first"}


def test_one_decides_for_all() -> None:
    class StopOnOne(Callback):
        def on_log(self, state: State, row: Any) -> None:
            if state.rank == 1 and state.step == 3:
                state.stop, state.why = True, "rank 1 has had enough"

        def on_step_end(self, state: State) -> None:
            state.log("mine", float(state.rank))
            if state.rank == 1:
                state.log("only", 7.0)

    def ranks(rank: int) -> tuple[int, str, dict[str, float]]:
        result = fit(Bigram(), [text(1, 4, 0, i) for i in range(20)], epochs=1, progress=False, callbacks=[StopOnOne()])
        return len(result.steps), result.why, {name: result.metrics[name] for name in ("mine", "only")}

    assert together(2, ranks) == [(3, "rank 1 has had enough", {"mine": 0.5, "only": 7.0})] * 2


def test_early_stopping_and_plateau_see_the_same_values() -> None:
    data, val = [text(2, 5, 0, i) for i in range(8)], [text(1, 4, 0, 50 + i) for i in range(3)]

    def ranks(rank: int) -> tuple[int, float, list[float], list[np.ndarray]]:
        model = Bigram()
        result = fit(model, data, val, epochs=8, optimizer="sgd", lr=5.0, schedule=["constant", Plateau(patience=0, factor=0.5)], progress=False, callbacks=[EarlyStopping(patience=1)],
                     accumulate=1 if rank >= 0 else 2)
        return len(result.steps), result.metrics["val_loss"], [step.lr for step in result.steps], [p.detach().numpy() for p in model.parameters()]

    first, second = together(2, ranks)
    wanted = ranks(-1)
    assert first[:3] == second[:3] and all(np.array_equal(a, b) for a, b in zip(first[3], second[3], strict=True))
    assert first[0] == wanted[0] < 32 and first[2] == wanted[2] and min(first[2]) < 5.0 and math.isclose(first[1], wanted[1])


class Poisoned(Bigram):
    """Its loss is NaN for batches that begin with token 7, its gradients are not."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = super().forward(input_ids, labels)["loss"]
        return {"loss": loss + (math.nan if int(input_ids[0, 0]) == 7 else 0.0)}


def test_a_step_that_one_rank_cannot_take_is_taken_by_none() -> None:
    data = [text(1, 4, 0, i) for i in range(6)]
    for i, batch in enumerate(data):
        batch["input_ids"][0, 0] = 7 if i == 3 else 1
    steps = together(2, lambda rank: [step.skipped for step in fit(Poisoned(), data, epochs=1, progress=False, not_finite="skip").steps])
    assert all(not first and second and not third for first, second, third in steps) and "rank 1" in steps[0][1]
    found = outcomes(2, lambda rank: run(Poisoned(), data))
    assert "batch 1 of 1 in this step" in found[1].error and "CheckError" in found[0].error and "rank 1" in found[0].error


def test_models_that_differ_are_refused_by_name() -> None:
    def frozen(rank: int) -> None:
        model = Bigram(rank)
        model.head.requires_grad_(False)
        run(model, [text(1, 4, 0, 0)] * 2)

    def shaped(rank: int) -> None:
        model = Bigram()
        model.even = nn.Linear(4, 4 + rank, dtype=torch.float64)
        run(model, [text(1, 4, 0, 0)] * 2)

    for function, name in ((frozen, "values of head"), (shaped, "shape or dtype of even")):
        assert all("ProcessError" in each.error and name in each.error and "rank 1" in each.error for each in outcomes(2, function))


def test_each_rank_drops_out_its_own() -> None:
    class Dropped(Bigram):
        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            drawn.append(float(torch.rand(())))
            return super().forward(input_ids, labels)

    drawn: list[float] = []

    def ranks(rank: int) -> list[float]:
        run(Dropped(), [text(1, 4, 0, i) for i in range(4)], seed=1)
        return drawn

    first, second = together(2, ranks)
    assert len(first) == 2 and not set(first) & set(second)


class Modular(nn.Module):
    """Of Lightning's shape: it logs in its steps, and brings its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Bigram()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.net(**batch)["loss"]
        self.log("mean", loss, on_step=False, on_epoch=True, batch_size=supervised(batch))
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_mean", self.net(**batch)["loss"], batch_size=supervised(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_lightning_modules_and_data_modules() -> None:
    data, val = [text(2, 5, i % 3, i) for i in range(7)], [text(1, 4, i % 2, 50 + i) for i in range(3)]

    class Module:
        prepared = 0

        def prepare_data(self) -> None:
            self.prepared += 1

        def train_dataloader(self) -> list[Any]:
            return data

        def val_dataloader(self) -> list[Any]:
            return val

    def ranks(rank: int, accumulate: int = 1) -> tuple[dict[str, float], list[np.ndarray], int]:
        model, module = Modular(), Module()
        result = Trainer(epochs=2, accumulate=accumulate, clip=None, progress=False, count=supervised).fit(model, module)
        return {name: result.metrics[name] for name in ("loss", "mean", "val_mean")}, [p.detach().numpy() for p in model.parameters()], module.prepared

    first, second = together(2, ranks)
    (wanted,) = together(1, lambda rank: ranks(rank, 2))
    assert first[0] == second[0] and (first[2], second[2]) == (1, 0)
    assert all(math.isclose(first[0][name], value) for name, value in wanted[0].items())
    for mine, theirs in zip(first[1], wanted[1], strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), torch.from_numpy(theirs))


def test_metrics_with_a_memory() -> None:
    data = [text(1, 4, 0, i) for i in range(4)]

    class Own:
        """Its memory is its own business: nobody can add it over processes."""

        def update(self, output: Any, batch: Any) -> None: ...
        def compute(self) -> float: return 0.0
        def reset(self) -> None: ...

    class Mean(torchmetrics.MeanMetric):
        def update(self, output: Any, batch: Any) -> None:
            super().update(batch["input_ids"].double().mean())

    mean = float(torch.stack([batch["input_ids"].double().mean() for batch in data]).mean())
    found = together(2, lambda rank: Trainer(progress=False, metrics={"mean": Mean()}).validate(Bigram(), data)["val_mean"])
    assert all(math.isclose(value, float(torch.tensor(mean))) for value in found), (found, mean)
    refused = outcomes(2, lambda rank: Trainer(progress=False, metrics={"own": Own()}).validate(Bigram(), data))
    assert all("val_own has a memory that cannot be added over 2 processes" in each.error for each in refused)


def test_a_loss_scaler_scales_alike() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.line = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.line(x).float(), y)

    def ranks(rank: int) -> tuple[list[str], list[np.ndarray]]:
        model = Half()
        data = batches(7)
        data[3][0].mul_(100)  # rank 1's second: its scaled gradient overflows in fp16
        result = fit(model, data, epochs=1, lr=0.1, optimizer="sgd", progress=False, precision="fp16")
        return [step.skipped for step in result.steps], [p.detach().numpy() for p in model.parameters()]

    first, second = together(2, ranks)
    assert "overflows" in first[0][1] and "overflows" in second[0][1] and not any(first[0][2:] + second[0][2:])
    assert all(np.array_equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize(("refused", "words"), [(lambda: fit(Bigram(), iter([text(1, 4, 0, 0)]), steps=1, progress=False), "cannot be dealt out"),
                                               (lambda: fit(Bigram(), [text(1, 4, 0, 0)], steps=1, progress=False, strategy="dpd"), "There is no strategy 'dpd'")])
def test_what_several_processes_cannot_do_is_said(refused: Callable[[], Any], words: str) -> None:
    assert all(words in each.error for each in outcomes(2, lambda rank: refused()))
