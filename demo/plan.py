"""What every system of a comparison does: the same data in the same order from the same start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from demo import assets, data
from fxopt.train.schedule import Schedule, make_schedule
from fxopt.runtime.store import Adapter, write_adapters


@dataclass(frozen=True)
class Plan:
    """A training run, written as JSON for the process of each system."""

    folder: str
    """Where the run's files go: the first adapter, the records, the trained adapters."""
    steps: int = 40
    batch: int = 16
    """Examples per step."""
    held_out: int = 64
    samples: int = 3
    """Held-out words that are answered before and after."""
    rank: int = 16
    alpha: int = 32
    lr: float = 5e-4
    schedule: str = "cosine"
    warmup: int = 3
    clip: float = 1.0
    seed: int = 0

    @property
    def first_adapter(self) -> Path:
        """The untrained adapter that every system starts from, in PEFT's format."""
        return Path(self.folder) / "first_adapter"

    def save(self) -> Path:
        """Writes the plan and the first adapter and returns the plan's file."""
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_adapters(self.first_adapter, first_adapters(self), task_type="CAUSAL_LM")
        file = folder / "plan.json"
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return file

    @staticmethod
    def load(file: str | Path) -> Plan:
        """Reads what `save` wrote."""
        return Plan(**json.loads(Path(file).read_text()))

    def factor(self) -> Schedule:
        """The learning rate's factor by step."""
        return make_schedule(self.schedule, self.steps, self.warmup)

    def training_batches(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
        """One batch per step."""
        train, _ = data.split(self.held_out, self.seed)
        return data.batches(tokenizer, train[: self.steps * self.batch], self.batch, self.seed)

    def held_out_batches(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
        """The held-out examples."""
        return data.batches(tokenizer, data.split(self.held_out, self.seed)[1], self.batch)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The model's own tokenizer with its own chat template."""
    return AutoTokenizer.from_pretrained(assets.model_folder(), local_files_only=True)


def first_adapters(plan: Plan) -> list[Adapter]:
    """LoRA on every linear layer of every block, started as PEFT does: a uniform (Kaiming), b zero."""
    torch.manual_seed(plan.seed)
    adapters = []
    with safe_open(assets.model_folder() / "model.safetensors", framework="pt") as file:
        for key in sorted(file.keys()):
            if key.endswith("_proj.weight"):
                out, into = file.get_slice(key).get_shape()
                a, b = torch.empty(plan.rank, into), torch.zeros(out, plan.rank)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                adapters.append(Adapter(key.removesuffix(".weight"), a, b, plan.alpha))
    return adapters


def sample_words(plan: Plan) -> Sequence[data.Entry]:
    """The held-out words that are answered."""
    return data.split(plan.held_out, plan.seed)[1][: plan.samples]


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Writes a system's record as JSON."""
    file.write_text(json.dumps(record, indent=2) + "\n")
