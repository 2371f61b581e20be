"""What was written for Lightning and for the Hugging Face Trainer works as it is: modules, callbacks, checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer as TheirTrainer, TrainerCallback, TrainingArguments

from fxopt.errors import DataError
from fxopt.train.reading import read_huggingface, read_lightning
from fxopt.train.saver import Checkpoints
from fxopt.train.snapshot import checkpoints
from fxopt.train.trainer import Trainer
from tests.models import llama, tokens


def batches(number: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(number)]


class Lit(lightning.LightningModule):
    """As its author wrote it."""

    def __init__(self, scheduler: str = "epoch") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.scheduler, self.calls = nn.Linear(3, 1), scheduler, []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"step_now": float(self.global_step), "epoch_now": float(self.current_epoch)})
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mse", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def on_train_epoch_end(self) -> None:
        self.calls.append(("epoch", self.current_epoch, dict(self.trainer.logged_metrics)))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls.append(("step", type(optimizer).__name__))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": self.scheduler}}


def test_a_lightning_module_trains_as_in_lightning() -> None:
    mine, theirs = Lit(), Lit()
    result = Trainer(epochs=3, clip=None, progress=False).fit(mine, batches(), batches(2, 1))
    reference = lightning.Trainer(max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0)
    reference.fit(theirs, torch.utils.data.DataLoader(batches(), batch_size=None), torch.utils.data.DataLoader(batches(2, 1), batch_size=None))
    assert torch.equal(mine.net.weight, theirs.net.weight)
    assert [step.lr for step in result.steps] == [0.1] * 4 + [0.05] * 4 + [0.025] * 4
    for name in ("val_mse", "train_loss_epoch"):
        assert result.metrics[name] == pytest.approx(float(reference.callback_metrics[name]))
    assert result.metrics["step_now"] == 11 and result.metrics["epoch_now"] == 2
    assert [call[0] for call in mine.calls] == [call[0] for call in theirs.calls] and mine._trainer is None and "log" not in vars(mine)


def test_a_lightning_module_resumes(tmp_path: Path) -> None:
    given = {"epochs": 3, "progress": False, "output_dir": tmp_path, "checkpoints": Checkpoints(every=1, unit="step", keep=20)}
    whole = Lit("step")
    Trainer(**given).fit(whole, batches())
    for path in checkpoints(tmp_path / "checkpoints")[5:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    other = Lit("step")
    result = Trainer(**given).fit(other, batches(), resume=True)
    assert result.first_step == 4 and torch.equal(whole.net.weight, other.net.weight)


def test_evaluation_of_a_lightning_module() -> None:
    trainer = Trainer(steps=1, progress=False)
    assert set(trainer.validate(Lit(), batches(1))) == {"val_mse"}
    with pytest.raises(DataError, match="no test_step|There is no test_step"):
        trainer.test(type("Bare", (), {"training_step": lambda self, b, i: None, "net": None, "__init__": lambda self: setattr(self, "net", nn.Linear(1, 1))})(), batches(1))


class Own(lightning.Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert float(outputs["loss"]) > 0 and trainer.global_step <= trainer.max_steps and pl_module.training
        self.calls.append(f"batch {batch_idx}")

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.calls.append(f"val {float(trainer.callback_metrics['val_mse']):.1f}")

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        raise AssertionError

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = [len(self.calls)]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.calls.append(f"load {checkpoint['mine']}")


def test_lightning_callbacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own, stop = Own(), EarlyStopping("val_mse", patience=0, min_delta=100.0, verbose=False)
    with caplog.at_level(logging.WARNING, "fxopt"):
        result = Trainer(epochs=5, progress=False, callbacks=[own, stop], output_dir=tmp_path).fit(Lit(), batches(2), batches(1))
    assert "Own overrides on_sanity_check_start, which is never called here" in caplog.text
    assert own.calls[:3] == ["batch 0", "batch 1", own.calls[2]] and own.calls[2].startswith("val ")
    assert result.epochs == 2 and result.why, "the second epoch was no better by 100"
    again = Own()
    Trainer(epochs=5, progress=False, callbacks=[again, EarlyStopping("val_mse", patience=0, min_delta=100.0)], output_dir=tmp_path).fit(Lit(), batches(2), batches(1), resume=True)
    assert again.calls == ["load [6]"]


class TheirCallback(TrainerCallback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.calls.append(f"begin {args.num_train_epochs} {type(more['model']).__name__}")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        self.calls.append(f"step {state.global_step}")
        control.should_evaluate = state.global_step == 2
        control.should_save = state.global_step == 3
        control.should_training_stop = state.global_step == 4
        return control

    def on_substep_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.calls.append("sub")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **more: Any) -> None:
        self.calls.append(f"evaluate {sorted(metrics)}")

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.calls.append(f"save {state.global_step}")

    def on_push_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        raise AssertionError


def test_hugging_face_callbacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = TheirCallback()
    model = nn.Linear(3, 1)
    with caplog.at_level(logging.WARNING, "fxopt"):
        result = Trainer(epochs=5, accumulate=2, progress=False, callbacks=[seen, EarlyStoppingCallback(3)], output_dir=tmp_path, validate_every=100, checkpoints=Checkpoints(every=99),
                         loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])).fit(model, batches(4), batches(1))  # fmt: skip
    assert "TheirCallback overrides on_push_begin, which is never called here" in caplog.text
    assert seen.calls == ["begin 5 Linear", "sub", "step 1", "sub", "step 2", "evaluate ['eval_loss']", "sub", "step 3", "save 3", "sub", "step 4", "save 4"]
    assert len(result.steps) == 4 and "TheirCallback stopped it" in result.why


def test_what_is_no_callback_is_refused() -> None:
    for bad in (3, EarlyStopping, lambda state: None):
        with pytest.raises(DataError, match="callback"):
            Trainer(steps=1, progress=False, callbacks=[bad]).fit(Lit(), batches())


def test_a_lightning_checkpoint_is_read(tmp_path: Path) -> None:
    lit = Lit()
    trainer = lightning.Trainer(max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False)
    trainer.fit(lit, torch.utils.data.DataLoader(batches(), batch_size=None))
    trainer.save_checkpoint(tmp_path / "their.ckpt")
    taken = read_lightning(tmp_path / "their.ckpt")
    model = nn.Linear(3, 1)
    taken.into(model, prefix="net.")
    assert torch.equal(model.weight, lit.net.weight) and taken.step == 8 and len(taken.optimizers) == 1
    text = str(taken)
    assert "taken: 2 tensors" in text and "left:  loops" in text and "random states" in text
    with pytest.raises(DataError, match="other names|lacks"):
        taken.into(nn.Linear(3, 1))
    torch.save({"state_dict": {}, "x": Path("code")}, tmp_path / "bad.ckpt")
    for name in ("bad.ckpt", "none.ckpt"):
        with pytest.raises(DataError, match="without running code"):
            read_lightning(tmp_path / name)


def test_a_hugging_face_checkpoint_is_read(tmp_path: Path) -> None:
    model = llama(layers=1)
    rows = [{name: value[0] for name, value in tokens(1, 8, seed=i).items()} for i in range(4)]
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True)
    TheirTrainer(model=model, args=arguments, train_dataset=rows).train()
    taken = read_huggingface(tmp_path / "checkpoint-2")
    other = llama(layers=1)
    taken.into(other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert taken.step == 2 and len(taken.optimizers) == 1 and "training_args.bin: a pickle of arguments: never read" in str(taken)
    with pytest.raises(DataError):
        read_huggingface(tmp_path)
