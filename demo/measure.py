"""What is measured of a system, by the same code for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import ctypes
from dataclasses import asdict
import gc
import math
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from demo import data
from demo.plan import Plan, sample_words
from fxopt.train.callbacks import Step
from fxopt.runtime.counting import supervised_items
from fxopt.runtime.memory import peak_bytes, reset_peak, resident_bytes

ANSWER_TOKENS = 24
"""Longest sample answer."""


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean negative log-likelihood per answer token, in nats."""
    model.eval()
    total, items = 0.0, 0
    for batch in batches:
        number = supervised_items(batch)
        total += float(model(**batch).loss) * number
        items += number
    return total / items


@torch.no_grad()
def answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> list[str]:
    """Greedy answers about the sample words."""
    model.eval()
    found = []
    for entry in sample_words(plan):
        prompt = data.prompt(tokenizer, entry)
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            use_cache=True,
        )
        found.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip())
    return found


class Memory:
    """Peak memory of training: absolute, and above what was resident when it began."""

    def __init__(self, model: nn.Module) -> None:
        """Touches every weight first (a file that is mapped but not yet read is not resident), and gives memory that
        is free back to the system (what loading, preparing or evaluating left behind is not the model's)."""
        self.before = peak_bytes()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach().amax()
        gc.collect()
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
            if trim is not None:
                trim(0)
        self.reset_works = reset_peak()
        self.loaded = resident_bytes() or peak_bytes()

    def read(self) -> dict[str, Any]:
        """Bytes: `before` (peak of loading, preparing and evaluating), `loaded` (when training began), `peak` (of
        training), `above` (peak - loaded)."""
        peak = peak_bytes()
        return {
            "before": self.before,
            "loaded": self.loaded,
            "peak": peak,
            "above": peak - self.loaded,
            "reset_works": self.reset_works,
        }


def gradient_norms(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """The gradient norm of each trained parameter."""
    return {name: float(p.grad.norm()) if p.grad is not None else 0.0 for name, p in named if p.requires_grad}


def summary(steps: Sequence[Step], padded: Sequence[int], warmup: int = 2) -> dict[str, Any]:
    """Steps as lists, and medians over the steps after the first `warmup`.

    `tokens_per_second` counts tokens that are not padding; `padded_tokens_per_second` counts all.
    """
    timed = list(zip(steps, padded, strict=True))[warmup:]
    return {
        "steps": [asdict(step) for step in steps],
        "losses": [step.loss for step in steps],
        "tokens_per_second": statistics.median(step.tokens / step.seconds for step, _ in timed),
        "padded_tokens_per_second": statistics.median(all_ / step.seconds for step, all_ in timed),
        "step_seconds": statistics.median(step.seconds for step, _ in timed),
        "timed_steps": len(timed),
    }


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds it took."""
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def perplexity(loss: float) -> float:
    """e to the loss."""
    return math.exp(loss)
