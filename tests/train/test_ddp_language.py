"""SmolLM2 on real text, through NF4 and LoRA, on two processes: the losses of one process, and it learns."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fxopt
from demo import assets, data
from fxopt.train.journal import METRICS, rows
from fxopt.train.saver import Checkpoints
from fxopt.train.snapshot import checkpoints
from fxopt.train.trainer import Trainer
from tests.train.processes import together


@pytest.mark.slow
def test_a_language_model_learns_on_two_processes_as_on_one(tmp_path: Path) -> None:
    folder = assets.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    train, held_out = data.split(held_out=6)
    batches, val = data.batches(tokenizer, train[:22], 2, seed=0), data.batches(tokenizer, held_out, 2)  # 11 and 3: the last turn of rank 1 is empty
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.config.use_cache = False
    torch.manual_seed(1)
    opt = fxopt.optimize(model.train(), fxopt.presets.finetune(rank=8, quantize="nf4"), inputs=batches[0])
    opt(**batches[0])  # captured before the forks, which share its memory
    gc.collect()

    def run(name: str, accumulate: int) -> tuple[list[float], float, float, int, list[np.ndarray]]:
        trainer = Trainer(epochs=1, lr=1e-3, accumulate=accumulate, seed=0, output_dir=tmp_path / name, progress=False, deterministic=True, checkpoints=Checkpoints(every=1, unit="step"))
        before = trainer.validate(opt, val)["val_loss"]
        result = trainer.fit(opt, batches, val)
        return [step.loss for step in result.steps], before, result.metrics["val_loss"], sum(step.tokens for step in result.steps), [p.detach().numpy() for p in opt.parameters() if p.requires_grad]

    (one,) = together(1, lambda rank: run("one", 4), timeout=600.0)
    first, second = together(2, lambda rank: run("two", 2), timeout=600.0)
    assert first[:4] == second[:4] and all(np.array_equal(a, b) for a, b in zip(first[4], second[4], strict=True))
    torch.testing.assert_close(torch.tensor(first[0]), torch.tensor(one[0]))
    assert len(first[0]) == 3 and first[3] == one[3] == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert first[2] < first[1] - 0.1 and math.isclose(first[1], one[1])
    assert rows(tmp_path / "two")[-1]["val_loss"] == first[2] and (tmp_path / "two" / METRICS).exists() and (tmp_path / "two" / "adapter" / "adapter_model.safetensors").exists()
    assert (checkpoints(tmp_path / "two" / "checkpoints")[-1] / "rank-1.json").exists()
    print(one[:4], first[:4])
