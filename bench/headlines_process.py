"""One system in its own process: trains a headline row's batches and writes what was measured.

    python -m bench.headlines_process OUT ADAPTER --row C1 --system eager [--round N] [--quick] [--tiny] [--threads N] [--budget BYTES]

ADAPTER is the PEFT folder that every system starts from. Neither factor of it is zero: with the usual start, B = 0, the gradients
of A are zero in the first step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
import contextlib
import ctypes
from dataclasses import dataclass
import gc
import importlib
import json
import math
from pathlib import Path
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from bench.headlines_workloads import ROWS, Batch, Phase, Row, System
from fxopt.runtime.counting import supervised_items
from fxopt.train.batch import real_tokens
from fxopt.runtime.memory import peak_bytes, reset_peak, resident_bytes

RATE = 1e-3
"""AdamW's learning rate: large enough that a wrong gradient shows in the next losses."""


@dataclass(frozen=True)
class Prepared:
    """A model that is ready for its first step.

    Attributes:
        loss: of a batch, a tensor of one number.
        named: the adapters' parameters.
        load: sets the adapters to the values in a PEFT folder.
        start: wraps (model, optimizer) where the system has its own ways; gives `loss` and the optimizer back.
        backward: of the loss.
        passes: our pipeline, as text.
    """

    loss: Callable[[Batch], Tensor]
    named: Mapping[str, nn.Parameter]
    load: Callable[[Path], None]
    start: Callable[[torch.optim.Optimizer], tuple[Callable[[Batch], Tensor], Any]] | None = None
    backward: Callable[[Tensor], None] = Tensor.backward
    passes: str | None = None


@dataclass(frozen=True)
class Job:
    """What this process does."""

    row: Row
    system: System
    batch: Batch
    """The first step's."""
    budget: int | None
    """Bytes, for a row whose memory is bounded."""


def build(row: Row) -> PreTrainedModel:
    """The model with random fp32 weights, the same in every process."""
    settings = dict(row.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, use_cache=False, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def settle() -> bool:
    """Gives memory that is free back to the system, and starts a new peak. Says whether both worked."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc only
    if trim is not None:
        trim(0)
    return reset_peak() and trim is not None


def resident() -> int:
    """Bytes; the peak so far where the system does not tell what is resident now."""
    return resident_bytes() or peak_bytes()


def allocated_peak(events: Any) -> int:
    """The most bytes that the allocator held above those at the beginning, from a profile's events."""
    held = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]" and str(event.device_type()).endswith("CPU")):
        held += size
        most = max(most, held)
    return most


# What a first call would import: torch.compile the compiler (2 s), fxopt its passes and a part of the compiler.
LATE = ("torch._dynamo", "torch._inductor.compile_fx", "fxopt.api", "fxopt.passes.catalog")


def operators(profile: torch.profiler.profile, number: int = 10) -> list[tuple[str, float, int]]:
    """(name, share of the time of all, calls) of the operators that took most of a profiled step, without what they called."""
    found = [event for event in profile.key_averages() if event.self_cpu_time_total > 0]
    total = sum(event.self_cpu_time_total for event in found)
    found = sorted(found, key=lambda event: -event.self_cpu_time_total)[:number]
    return [(event.key, event.self_cpu_time_total / total, event.count) for event in found]


class Trainer:
    """Takes steps, timed from the batch to the updated adapters, and the gradient norms of each, outside of its time."""

    def __init__(self, prepared: Prepared, optimizer: Any, loss: Callable[[Batch], Tensor]) -> None:
        self.prepared, self.optimizer, self.loss = prepared, optimizer, loss
        self.smallest, self.weakest = float("inf"), ""

    def step(self, batch: Batch) -> dict[str, Any]:
        """One step's record."""
        start = time.perf_counter()
        loss = self.loss(batch)
        self.prepared.backward(loss)
        self.optimizer.step()
        value = float(loss.detach())
        seconds = time.perf_counter() - start
        del loss
        total = self._norms()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - start
        return {"loss": value, "seconds": seconds, "tokens": real_tokens(batch), "padded": batch["input_ids"].numel(),
                "supervised": supervised_items(batch), "gradient_norm": total}

    def _norms(self) -> float:
        norms = {name: float(p.grad.norm()) if p.grad is not None else 0.0 for name, p in self.prepared.named.items()}
        usable = {name: norm if math.isfinite(norm) else 0.0 for name, norm in norms.items()}
        name = min(usable, key=usable.__getitem__)
        if usable[name] < self.smallest:
            self.smallest, self.weakest = usable[name], name
        return math.hypot(*norms.values())

    def phase(self, phase: Phase, loaded: int) -> dict[str, Any]:
        """A phase's record. above: peak minus what was resident before the first step; settled: what is now, with the optimizer's state."""
        profiled = self.profiled(phase.batches[0]) if phase.profiled else {"profiled": None, "allocator": None}
        worked = settle()
        settled = resident()
        steps = [self.step(batch) for batch in phase.batches]
        peak = peak_bytes()
        return {"label": phase.label, "steps": steps, "peak": peak, "above": peak - loaded, "settled": settled, "reset_works": worked, **profiled}

    def profiled(self, batch: Batch) -> dict[str, Any]:
        """A step under the profiler: the allocator's peak and what took the time."""
        settle()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step = self.step(batch)
        return {"profiled": step, "allocator": allocated_peak(profile.profiler.kineto_results.events()), "operators": operators(profile)}


def measure(job: Job, adapter: Path, prepare: Callable[[PreTrainedModel, Job], Prepared], phases: list[Phase]) -> dict[str, Any]:
    """The record of one process.

    prepare_seconds is from the model object to the object that is called; first_step_seconds is the first step, with what is compiled or
    captured only then. Copying the adapter's values is in neither, nor are imports: of ours, of the peer's, and of what either loads late.
    """
    for name in LATE:
        importlib.import_module(name)
    model = build(job.row)
    weights = sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    with contextlib.ExitStack() as stack:
        if job.system.budget is not None:
            settings = importlib.import_module("torch._functorch.config")
            stack.enter_context(settings.patch(activation_memory_budget=job.system.budget))
        start = time.perf_counter()
        prepared = prepare(model, job)
        prepare_seconds = time.perf_counter() - start
        prepared.load(adapter)
        optimizer = torch.optim.AdamW(prepared.named.values(), lr=RATE, weight_decay=0.0, fused=True)
        loss = prepared.loss
        if prepared.start is not None:
            loss, optimizer = prepared.start(optimizer)
        settle()
        loaded = resident()
        trainer = Trainer(prepared, optimizer, loss)
        first = trainer.step(job.batch)
        found = [trainer.phase(phase, loaded) for phase in phases]
        if job.system.peer == "fxopt" and "operators" not in found[-1]:
            found[-1]["operators"] = trainer.profiled(phases[-1].batches[-1])["operators"]
    trained = sum(parameter.nbytes for parameter in prepared.named.values())
    return {"weights": weights, "trained": trained, "loaded": loaded, "prepare_seconds": prepare_seconds,
            "first_step_seconds": first["seconds"], "first_loss": first["loss"], "phases": found,
            "smallest_gradient_norm": trainer.smallest, "weakest": trainer.weakest, "adapters": len(prepared.named),
            "passes": prepared.passes}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--row", choices=ROWS, required=True)
    parser.add_argument("--system", required=True)
    parser.add_argument("--round", type=int, default=0)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    row = chosen(options.row, quick=options.quick, tiny=options.tiny, rounds=options.rounds)
    system = row.systems[options.system]
    prepare = importlib.import_module("bench.headlines_ours" if system.peer == "fxopt" else "bench.peer_hf").prepare
    record = measure(Job(row, system, row.warmup(), options.budget), options.adapter, prepare, row.phases(system, options.round))
    options.out.write_text(json.dumps(record | {"budget": options.budget}) + "\n")


def chosen(name: str, *, quick: bool, tiny: bool, rounds: int | None) -> Row:
    """The row as the command line wants it."""
    row = ROWS[name].quick() if quick else ROWS[name]
    row = row.tiny() if tiny else row
    return row if rounds is None else row.again(rounds)


if __name__ == "__main__":
    main()
