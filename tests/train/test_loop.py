"""The loop: accumulation equals one large batch, failures have names and lose nothing, settings mean what they say."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from fxopt.errors import CheckError, DataError
from fxopt.train.callbacks import Callback, State
from fxopt.runtime.counting import supervised_items
from fxopt.train.batch import real_tokens
from fxopt.train.trainer import fit
from fxopt.runtime.memory import peak_bytes, reset_peak, resident_bytes
from fxopt.train.progress import Progress
from fxopt.train.schedule import make_schedule


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_batches(number: int, seed: int = 0) -> list[dict]:
    """Batches of different lengths, with padding and with few and many supervised tokens."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(number):
        length, supervised = 4 + index % 5, 1 + (3 * index) % 4
        ids = torch.randint(3, 64, (2, length), generator=generator)
        labels = ids.clone()
        labels[:, :-supervised] = -100
        mask = torch.ones_like(ids)
        mask[1, -1] = 0
        labels[1, -1] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def joined(batches: list[dict]) -> dict:
    """The same rows as one right-padded batch."""
    length = max(batch["input_ids"].shape[1] for batch in batches)
    empty = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.cat([F.pad(batch[key], (0, length - batch[key].shape[1]), value=value) for batch in batches])
        for key, value in empty.items()
    }


class Gradients(Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_backward_end(self, state: State) -> None:
        self.steps.append({name: p.grad.clone() for name, p in state.model.named_parameters()})


def run(data: list, dtype: torch.dtype = torch.float32, **settings) -> tuple[nn.Module, object, Gradients]:
    model, gradients = llama().to(dtype), Gradients()
    settings = {"epochs": 1, "lr": 1e-2, "progress": False, "callbacks": [gradients]} | settings
    return model, fit(model, data, **settings), gradients


@pytest.mark.parametrize("number", [4, 5, 7])
def test_accumulation_equals_one_large_batch_tail_included(number: int) -> None:
    batches = make_batches(number)
    groups = [batches[start : start + 3] for start in range(0, number, 3)]
    _, small, got = run(batches, torch.float64, accumulate=3)
    _, large, wanted = run([joined(group) for group in groups], torch.float64)
    assert len(small.steps) == len(large.steps) == math.ceil(number / 3)
    assert small.losses == pytest.approx(large.losses)
    for ours, theirs in zip(got.steps, wanted.steps, strict=True):
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient)
    assert [s.tokens for s in small.steps] == [sum(real_tokens(batch) for batch in group) for group in groups]
    assert [s.items for s in small.steps] == [sum(supervised_items(batch) for batch in group) for group in groups]


def test_equals_a_loop_written_out() -> None:
    batches = make_batches(4)
    model, result, _ = run(batches, epochs=2, schedule="linear", warmup=2, clip=0.5, optimizer="torch_adamw")
    other = llama()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=8)
    losses = []
    for batch in batches * 2:
        loss = other(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result.losses == losses
    assert result.epochs == 2
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "theirs"), [("constant", "constant_with_warmup"), ("linear",) * 2, ("cosine",) * 2])
@pytest.mark.parametrize("warmup", [0, 3, 10])
def test_schedules_equal_transformers(name: str, theirs: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    factor = make_schedule(name, 10, warmup)
    for step in range(10):
        assert factor(step) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


class Recorder(Callback):
    """Every hook, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_fit_start(self, state: State) -> None:
        self.calls.append("fit_start")

    def on_step_start(self, state: State) -> None:
        self.calls.append(f"step_start {state.step} {state.optimizer.param_groups[0]['lr']:g}")

    def on_backward_end(self, state: State) -> None:
        self.calls.append("backward_end")

    def on_step_end(self, state: State) -> None:
        self.calls.append(f"step_end {state.step}")

    def on_epoch_end(self, state: State) -> None:
        self.calls.append(f"epoch_end {state.epoch}")

    def on_fit_end(self, state: State) -> None:
        self.calls.append("fit_end")

    def on_exception(self, state: State, error: BaseException) -> None:
        self.calls.append(f"exception {type(error).__name__} at {state.step}")


def test_hooks_run_in_order() -> None:
    recorder = Recorder()
    optimizer_rate = 0.5
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=optimizer_rate)
    fit(model, make_batches(2), epochs=2, optimizer=optimizer, schedule=lambda step: 1 / (step + 1),
        callbacks=[recorder], progress=False, accumulate=2)  # fmt: skip
    step = ["backward_end", "step_end {}", "epoch_end {}"]
    assert recorder.calls == [
        "fit_start",
        "step_start 0 0.5",
        *(text.format(1) for text in step),
        "step_start 1 0.25",
        *(text.format(2) for text in step),
        "fit_end",
    ]
    assert optimizer.param_groups[0]["lr"] == optimizer_rate
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stops_when_asked_and_in_the_middle_of_an_epoch() -> None:
    class Stop(Callback):
        def on_step_end(self, state: State) -> None:
            state.stop = state.step == 3

    _, result, _ = run(make_batches(2), epochs=5, callbacks=[Stop()])
    assert (len(result.steps), result.epochs) == (3, 1)
    _, result, _ = run(make_batches(4), epochs=None, steps=6)
    assert (len(result.steps), result.epochs) == (6, 1)
    _, result, _ = run(make_batches(4), epochs=None, steps=8)
    assert (len(result.steps), result.epochs) == (8, 2)


def test_batches_without_supervision_are_left_out_and_counted() -> None:
    batches = make_batches(3)
    batches.insert(1, batches[0] | {"labels": torch.full_like(batches[0]["labels"], -100)})
    model, result, _ = run(batches, epochs=2)
    assert (len(result.steps), result.skipped, result.epochs) == (6, 2, 2)
    assert all(math.isfinite(loss) for loss in result.losses)
    with pytest.raises(DataError, match="no batch to train on"):
        run([batches[1]], epochs=1)


def test_an_iterator_that_ends_is_an_error() -> None:
    with pytest.raises(DataError, match="after step 3 of 5"):
        run(iter(make_batches(3)), epochs=None, steps=5)


class Adapted(nn.Module):
    """A model that saves itself, and whose loss turns bad on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("frozen", torch.ones(2))
        self.dropout = nn.Dropout(0.5).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sqrt().sum() if x.min() < 0 or x.min() == 0 else (self.weight * x).sum()

    def save_adapter(self, folder: str | Path) -> None:
        Path(folder).mkdir(exist_ok=True)
        torch.save(self.weight.detach().clone(), Path(folder) / "w.pt")


@pytest.mark.parametrize(("value", "message"), [(-1.0, "loss of step 3 is nan"), (0.0, "gradient of step 3")])
def test_what_is_not_finite_is_named_and_nothing_is_lost(tmp_path: Path, value: float, message: str) -> None:
    data = [torch.tensor([1.0, 2.0])] * 5 + [torch.tensor([value, 1.0])] + [torch.ones(2)] * 4
    model, recorder = Adapted(), Recorder()
    with pytest.raises(CheckError, match=message) as caught:
        fit(model, data, epochs=1, accumulate=2, lr=0.1, callbacks=[recorder], progress=False, output_dir=tmp_path)
    assert caught.value.where in ("batch 2 of 2 in this step, number 5 of the epoch; first at (the model): Adapted", "weight")
    assert recorder.calls[-1] == "exception CheckError at 2"
    assert model.weight.isfinite().all() and model.weight.grad is None
    assert torch.equal(torch.load(tmp_path / "adapter" / "w.pt", weights_only=True), model.weight.detach())
    reference = Adapted()
    fit(reference, data[:4], epochs=1, accumulate=2, lr=0.1, progress=False, schedule=lambda step: make_schedule("cosine", 5)(step))
    assert torch.equal(reference.weight, model.weight)


def test_the_adapter_is_saved_at_the_end_and_modes_are_restored(tmp_path: Path) -> None:
    model = Adapted().eval()
    model.dropout.train()
    result = fit(model, [torch.ones(2)], steps=2, progress=False, output_dir=tmp_path / "new" / "folder")
    assert result.adapter == tmp_path / "new" / "folder" / "adapter" and (result.adapter / "w.pt").exists()
    assert not model.training and model.dropout.training


def test_a_seed_makes_runs_equal() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(self.weight * x).sum()

    runs = [fit(Noisy(), [torch.ones(8)], steps=3, seed=seed, progress=False).losses for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": None}, "either `steps` or `epochs`"), ({"steps": 1}, "either `steps` or `epochs`"),
        ({"epochs": 0}, "0 steps"), ({"schedule": "square"}, "no schedule 'square'"), ({"warmup": 99}, "warm-up of 99"),
        ({"schedule": lambda step: 1.0, "warmup": 1}, "`warmup` is for"), ({"accumulate": 0}, "`accumulate`"),
        ({"clip": 0.0}, "`clip`"), ({"lr_": 1.0}, "no setting 'lr_'"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)}, "`lr` is for"),
    ],
    ids=range(10),
)  # fmt: skip
def test_settings_are_never_ignored(settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(make_batches(2), **settings)


def test_other_refusals() -> None:
    with pytest.raises(DataError, match="has no length"):
        run(iter(make_batches(2)), epochs=1)
    with pytest.raises(DataError, match="requires a gradient"):
        fit(llama().requires_grad_(False), make_batches(1), epochs=1)
    with pytest.raises(DataError, match="gave no loss"):
        run([{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


def test_items_and_tokens() -> None:
    batch = make_batches(3)[2]
    assert supervised_items(batch) == int((batch["labels"][:, 1:] != -100).sum())
    assert supervised_items({"labels": torch.tensor([1, -100, 0])}) == 2
    assert supervised_items({"labels": torch.tensor([[5, -100]])}) == 0
    assert supervised_items(torch.ones(2)) == supervised_items({"x": 1}) == 1
    assert real_tokens({"input_ids": torch.ones(2, 3)}) == 6
    assert real_tokens(torch.ones(2)) == real_tokens({"x": 1}) == 0


def test_progress_is_plain_when_piped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    run(make_batches(3), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and "\x1b" not in err
    assert "step 3/3 · loss " in err and "tokens/s" in err and "GiB" in err


def test_progress_is_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, result, _ = run(make_batches(3))
    state = State(model, torch.optim.SGD(model.parameters()), 100, history=list(result.steps))
    text = Progress(name="demo").line(state)
    assert text.startswith("demo · step 3/100 · loss ") and text.endswith(" left") and "\n" not in text


def test_peak_memory_is_measured() -> None:
    assert reset_peak()
    before = peak_bytes()
    block = torch.ones(64 * 2**20)
    assert peak_bytes() - before > 200 * 2**20
    del block
    assert reset_peak()
    assert peak_bytes() - before < 100 * 2**20
    assert abs(resident_bytes() - before) < 100 * 2**20
    _, result, _ = run(make_batches(1))
    assert result.peak_memory > 50 * 2**20
    assert copy.copy(result) == result
