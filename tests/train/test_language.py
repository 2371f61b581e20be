"""SmolLM2 on real text, through NF4 and LoRA: it learns, it is stopped by SIGTERM in the middle of a step, and resumes byte by byte."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fxopt
from demo import assets, data
from fxopt.train.callbacks import Callback, State
from fxopt.train.journal import METRICS, rows
from fxopt.train.optimizers import lora_plus
from fxopt.train.saver import Checkpoints
from fxopt.train.signals import Stopped
from fxopt.train.trainer import Trainer


class Terminate(Callback):
    def __init__(self, step: int) -> None:
        self.at = step

    def on_batch_end(self, state: State, batch: Any, index: int, loss: torch.Tensor) -> None:
        if state.step == self.at and state.micro == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_language_model_learns_and_resumes(tmp_path: Path) -> None:
    folder = assets.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    train, held_out = data.split(held_out=4)
    batches, val = data.batches(tokenizer, train[:16], 2, seed=0), data.batches(tokenizer, held_out, 4)

    def trainer(name: str, stop: int) -> Trainer:
        return Trainer(epochs=1, lr=1e-3, accumulate=2, seed=0, groups=lora_plus(4.0), callbacks=[Terminate(stop)], output_dir=tmp_path / name, progress=False, deterministic=True,
                       checkpoints=Checkpoints(every=2, unit="step"))

    def model() -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        loaded.config.use_cache = False
        torch.manual_seed(1)
        return fxopt.optimize(loaded.train(), fxopt.presets.finetune(rank=8, quantize="nf4"), inputs=batches[0])

    whole = model()
    before = trainer("a", 99).validate(whole, val)["val_loss"]
    result = trainer("a", 99).fit(whole, batches, val)
    assert result.metrics["val_loss"] < before - 0.1 and len(result.steps) == 4 and result.adapter is not None
    with pytest.raises(Stopped):
        trainer("b", 2).fit(model(), batches, val)
    again = model()
    resumed = trainer("b", 99).fit(again, batches, val, resume=True)
    assert resumed.first_step == 2
    assert (tmp_path / "a" / METRICS).read_bytes() == (tmp_path / "b" / METRICS).read_bytes() and rows(tmp_path / "a")[-1]["val_loss"] == result.metrics["val_loss"]
    trained = [(p, q) for (_, p), (_, q) in zip(whole.named_parameters(), again.named_parameters(), strict=True) if p.requires_grad]
    assert trained and all(torch.equal(p, q) for p, q in trained)
