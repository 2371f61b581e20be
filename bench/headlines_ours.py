"""fxopt in a headline row: its pipelines, and how a model is prepared."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from bench.headlines_process import Job, Prepared
from bench.headlines_workloads import ALPHA, RANK, Row
import fxopt


def passes(row: Row, budget: int | None) -> str:
    """A row's pipeline as text. All pipelines of the headlines are made here.

    Where time counts, `remat`: it saves the fewest bytes that need no product to be computed again.

    Args:
        budget: bytes, of a row that has one.

    Raises:
        SystemExit: this row has one, and it is None.
    """
    if row.memory == "budget" and budget is None:
        raise SystemExit("this row needs --budget")
    memory = {"remat": "remat", "least": "memory(least)", "budget": f"memory({budget})"}[row.memory]
    parts = ["canonicalize", "causal", f"lora(rank={RANK}, alpha={ALPHA})", "fuse", "loss"]
    return " | ".join([*parts, *(["pack", "compact"] if row.compact else []), "siblings", memory, "dead_code"])


def prepare(model: PreTrainedModel, job: Job) -> Prepared:
    """Captures the first batch's kind of call and optimizes it."""
    text = passes(job.row, job.budget)
    opt = fxopt.optimize(model, text, inputs=dict(job.batch))
    named = {name: parameter for name, parameter in opt.named_parameters() if parameter.requires_grad}

    def load(adapter: Path) -> None:
        opt.load_adapter(adapter)

    return Prepared(lambda batch: opt(**batch).loss, named, load, passes=text)
