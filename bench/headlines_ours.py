"""fxopt in a headline row: its pipelines, and how a model is prepared."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from bench.headlines_process import Job, Prepared
from bench.headlines_workloads import ALPHA, RANK
import fxopt
from fxopt.passes.catalog import PASSES

KNOWN = {cls.name for cls in PASSES}


def passes(*, compact: bool, memory: str) -> str:
    """A row's pipeline as text. All pipelines of the headlines are made here.

    Args:
        compact: pack the batch and drop the rows that nothing is learned from.
        memory: the argument of the memory pass, "least" or bytes.
    """
    parts = ["canonicalize", "causal", f"lora(rank={RANK}, alpha={ALPHA})", "siblings", "fuse", "loss"]
    parts += [name for name in ("pack", "compact") if compact and name in KNOWN]
    parts += [f"memory({memory})" if "memory" in KNOWN else "remat", "dead_code"]
    return " | ".join(parts)


def prepare(model: PreTrainedModel, job: Job) -> Prepared:
    """Captures the first batch's kind of call and optimizes it."""
    if job.row.memory == "budget" and job.budget is None:
        raise SystemExit("this row needs --budget")
    text = passes(compact=job.row.compact, memory=job.row.memory if job.budget is None else str(job.budget))
    opt = fxopt.optimize(model, text, inputs=dict(job.batch))
    named = {name: parameter for name, parameter in opt.named_parameters() if parameter.requires_grad}

    def load(adapter: Path) -> None:
        opt.load_adapter(adapter)

    return Prepared(lambda batch: opt(**batch).loss, named, load, passes=text)
