"""The optimized model inside other people's loops: a plain one, the Hugging Face Trainer, Lightning, DDP and `fxopt.fit`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

import fxopt
from fxopt.kernels.tolerance import same
from tests.models import llama, tokens

STEPS = 6
PASSES = str(fxopt.presets.exact())


def batches() -> list[dict[str, torch.Tensor]]:
    return [tokens(4, 10 + i % 3, seed=i) for i in range(STEPS)]


def close(mine: list[float], theirs: list[float]) -> None:
    assert len(mine) == len(theirs) >= 5
    assert same(torch.tensor(mine), torch.tensor(theirs)), (mine, theirs)
    assert mine[0] != mine[-1]


def plain(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_a_plain_loop() -> None:
    close(plain(fxopt.optimize(llama(), PASSES)), plain(llama()))


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


def trainer(model: nn.Module, folder: Path) -> tuple[list[float], Trainer]:
    rows = [{k: v[0] for k, v in tokens(1, 12, seed=i).items()} for i in range(2 * STEPS)]
    losses = Losses()
    arguments = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=2, max_steps=STEPS, logging_steps=1, learning_rate=1e-2, seed=0,
                                  report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False)
    made = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[losses])
    made.train()
    return losses.values, made


def test_the_hugging_face_trainer(tmp_path: Path) -> None:
    mine, made = trainer(fxopt.optimize(llama(), PASSES), tmp_path / "mine")
    theirs, reference = trainer(llama(), tmp_path / "theirs")
    close(mine, theirs)
    assert same(*(torch.tensor(t.evaluate()["eval_loss"]) for t in (made, reference)))
    predictions = made.predict(made.eval_dataset).predictions
    assert same(torch.from_numpy(predictions), torch.from_numpy(reference.predict(made.eval_dataset).predictions))
    made.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists()


class Lit(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)


def test_lightning(tmp_path: Path) -> None:
    losses = []
    for model in (fxopt.optimize(llama(), PASSES), llama()):
        module = Lit(model)
        made = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                                 enable_model_summary=False, default_root_dir=tmp_path, gradient_clip_val=1.0)
        made.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
        losses.append(module.losses)
    close(*losses)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one, over gloo."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(one_process: None) -> None:
    """The reducer's hooks fire on every parameter."""
    close(plain(DistributedDataParallel(fxopt.optimize(llama(), PASSES))), plain(llama()))


def test_fully_sharded_per_block(one_process: None) -> None:
    """FSDP2 on every block and on the root: parameters are sharded between uses, and the regions see whole ones."""
    opt = fxopt.optimize(llama(), PASSES, inputs=batches()[0])
    mesh = init_device_mesh("cpu", (1,))
    for block in opt.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(opt, mesh=mesh)
    close(plain(opt), plain(llama()))


def test_fit(tmp_path: Path) -> None:
    """`fxopt.fit` on adapters: the losses of the same loop over the original Python code with the same adapted weights."""
    losses = []
    for original in (False, True):
        opt = fxopt.optimize(llama(), fxopt.presets.finetune(rank=4, quantize="nf4"), inputs=batches()[0])
        result = fxopt.fit(opt.model if original else opt, batches(), lr=1e-2, steps=STEPS, progress=False,
                           output_dir=None if original else tmp_path)
        losses.append(result.losses)
    close(*losses)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
