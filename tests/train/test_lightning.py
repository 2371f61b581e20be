"""LightningModules with overrides, side by side with Lightning's own trainer: the same weights, and the same things said in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from fxopt.errors import DataError
from fxopt.train.journal import rows
from fxopt.train.trainer import Trainer
from tests.train.test_foreign import batches


class Base(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.said = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), []

    def say(self, what: str) -> None:
        self.said.append((what, self.global_step, self.current_epoch, round(float(self.net[0].weight.sum()), 5)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss_of_mine", loss, prog_bar=True)
        return {"loss": loss, "place": batch_idx}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Overrides(Base):
    """Everything that a module may do differently."""

    def setup(self, stage: str) -> None:
        self.added = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.added.weight, 0.5)
        self.said.append(("setup", stage))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return nn.functional.mse_loss(self.added(self.net(batch[0])), batch[1])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2, batch[1]

    def backward(self, loss: Tensor, *args: Any) -> None:
        self.say("backward")
        (loss * 0.5).backward()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        if self.place != 1:  # in Lightning nothing is clipped where no step is taken
            self.say(f"clip {gradient_clip_val}")
        self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm="value")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx == 1:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] *= min(1.0, (self.trainer.global_step + 1) / 4)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self.say(f"schedule {metric}")
        scheduler.step()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.place != 1:
            self.said.append(("norm", round(float(sum(p.grad.norm() for p in self.parameters())), 5)))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.place = batch_idx
        self.say(f"start {batch_idx}")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.say(f"end {batch_idx}")

    def on_train_epoch_end(self) -> None:
        self.say("epoch end")


class Plateau(Base):
    """A rate that follows a metric, which is logged at the end of a validation; a metric object; sums; text of hyperparameters."""

    def __init__(self, width: int = 3, name: str = "x") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen = torchmetrics.MeanSquaredError()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5), "monitor": "val_end"}}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("all", 1.0, on_step=False, on_epoch=True, reduce_fx=torch.sum)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen(self.net(batch[0]), batch[1])
        self.log("val_mse", self.seen)
        self.say(f"validate {batch_idx}")

    def on_validation_epoch_end(self) -> None:
        self.log("val_end", self.seen.compute() + 1)
        self.say("validated")

    def on_train_epoch_end(self) -> None:
        self.log("at_end", float(self.trainer.callback_metrics["val_end"]) * 2)
        self.say("epoch end")


class Two(Base):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.automatic_optimization = nn.Linear(3, 1), False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()
        for optimizer, sign in ((first, 1.0), (second, -1.0)):
            self.toggle_optimizer(optimizer)
            loss = nn.functional.mse_loss(self.net(batch[0]) + sign * self.other(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("last", loss)
        self.lr_schedulers().step()
        self.say(f"step {batch_idx}")

    def on_before_backward(self, loss: Tensor) -> None:
        self.say("before backward")

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.Adam(self.other.parameters(), lr=0.01)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 2, 0.5)]


@pytest.mark.parametrize(("kind", "more"), [(Overrides, {"clip": 0.05}), (Plateau, {"accumulate": 2}), (Two, {})], ids=["overrides", "plateau", "two"])
def test_a_module_trains_as_in_lightning(kind: Any, more: dict[str, Any], tmp_path: Path) -> None:
    mine, theirs = kind(), kind()
    result = Trainer(epochs=3, progress=False, output_dir=tmp_path, checkpoints=False, **{"clip": None, **more}).fit(mine, batches(), batches(2, 1) if kind is Plateau else None)
    reference = lightning.Trainer(max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
                                  num_sanity_val_steps=0, gradient_clip_val=more.get("clip"), accumulate_grad_batches=more.get("accumulate", 1))  # fmt: skip
    reference.fit(theirs, torch.utils.data.DataLoader(batches(), batch_size=None), torch.utils.data.DataLoader(batches(2, 1), batch_size=None))
    assert mine.said == theirs.said
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    known = {name: float(value) for name, value in reference.callback_metrics.items()}
    assert {name: result.metrics.get(name) for name in known} == pytest.approx(known)
    if kind is Plateau:
        ends = [row for row in rows(tmp_path) if "val_mse" in row]
        assert len(ends) == 3 and all(row["val_end"] == pytest.approx(row["val_mse"] + 1) for row in ends)
        assert [row["all"] for row in rows(tmp_path) if "all" in row] == [4.0] * 3 and sum("at_end" in row for row in rows(tmp_path)) == 3
        assert mine.hparams == {"width": 3, "name": "x"}


def test_what_is_not_possible_is_said() -> None:
    class Twice(Base):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            optimizer_closure()

    class Leaves(Base):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
            return -1

    class Odd(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", 1.0, on_epoch=True, reduce_fx="median")

    for kind, words in ((Twice, "a second time"), (Leaves, "leave out the rest"), (Odd, "reduced by median")):
        module = kind()
        with pytest.raises(DataError, match=words):
            Trainer(steps=1, progress=False).fit(module, batches())
        assert module._trainer is None and "log" not in vars(module)
