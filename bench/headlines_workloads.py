"""The headline rows: shapes, batches, systems. Everything that a process needs to know, and no torch module yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
RANK, ALPHA = 16, 32
LONGEST = 400
"""Samples of C2 above this are drawn again (1.7% of them): eager needs 2.6 MB for each padded token there, so a batch with one of 512
would take 23 GB. This makes the peers' padding less than it would be."""
MEGA = 50
"""Batches among which `group_by_length` sorts, as transformers does."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """Steps on batches of one kind, measured together: one peak, one median.

    Attributes:
        label: such as "S=512".
        batches: one per step.
        profiled: a step under the memory profiler before them, on the first batch: the allocator's own peak, and a warm-up.
    """

    label: str
    batches: list[Batch]
    profiled: bool = False


@dataclass(frozen=True)
class System:
    """What runs a row.

    Attributes:
        peer: "hf" (transformers + PEFT) or "fxopt".
        compile: "whole": torch.compile of the model; "blocks": of each block (compiled once, as the blocks are equal).
        budget: torch.compile's activation_memory_budget.
        grouped: batches of samples of like length.
        rounds, steps: fewer than the row's, for the slow ones; `steps` cuts the last phase. A single step has no warm-up.
        tight: the budget is what the checkpointed peer held at the allocator, not what its process took: glibc keeps much of what a peer freed.
        extra: runs only where it is named, or with --all.
    """

    peer: str = "hf"
    checkpointing: bool = False
    compile: str | None = None
    budget: float | None = None
    grouped: bool = False
    lightning: bool = False
    rounds: int | None = None
    steps: int | None = None
    tight: bool = False
    extra: bool = False

    @property
    def reference(self) -> str:
        """The eager system with the same batches: its losses are the right ones."""
        return "eager-grouped" if self.grouped else "eager"


EAGER, COMPILE = System(), System(compile="whole")
BLOCKS, CHECKPOINTING = System(compile="blocks"), System(checkpointing=True)
OURS = System(peer="fxopt")
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960,
                   "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    "SmolLM2-135M": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
                     "rms_norm_eps": 1e-5, "rope_theta": 1e5},
}
TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                        "head_dim": 8, "vocab_size": 97}
"""What makes a shape small enough for a test."""


@dataclass(frozen=True)
class Row:
    """One headline.

    Attributes:
        title: one line for the page.
        shape: a name in SHAPES; `changes` are made to it.
        systems: by name; in every round they run in this order.
        rounds: processes per system; the batches of a round are its own.
        steps: timed steps per round (of the last phase).
        minutes: about, with all systems and rounds on two AVX-512 cores.
        memory: how our pipeline decides what is saved: "remat", "least", or "budget": within the measured peak of `checkpointing`.
        compact: our pipeline packs the batch and drops rows that nothing learns from.
        dynamic: torch.compile is told that sizes change.
        cold: the caches of torch.compile are empty in every process.
    """

    name: str
    title: str
    shape: str
    systems: dict[str, System]
    changes: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    lengths: Sequence[int] = ()
    rounds: int = 2
    steps: int = 4
    minutes: float = 0.0
    memory: str = "remat"
    compact: bool = False
    dynamic: bool = False
    cold: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration as keyword arguments."""
        return SHAPES[self.shape] | self.changes

    def again(self, rounds: int) -> Row:
        """The same with another number of rounds."""
        return replace(self, rounds=rounds, minutes=self.minutes * rounds / self.rounds)

    def rounds_of(self, system: System) -> int:
        """How many rounds a system takes part in."""
        return min(self.rounds, system.rounds or self.rounds)

    def quick(self) -> Row:
        """The same with fewer steps: shows that it runs, measures little."""
        return replace(self, rounds=1, steps=min(self.steps, 2), minutes=self.minutes / 3)

    def tiny(self) -> Row:
        """The same on a model and lengths for tests."""
        return replace(self, changes=TINY, lengths=tuple(length // 32 for length in self.lengths), batch=min(self.batch, 4), rounds=1, steps=2, minutes=0.0)

    def warmup(self) -> Batch:
        """The first step's batch: what is compiled or captured, is then. Short where lengths change anyway: a capture's checks run eager too."""
        if self.lengths:
            return _full(self, self.lengths[0] if len(self.lengths) == 1 else max(8, self.lengths[0] // 8), 0)
        generator = torch.Generator().manual_seed(99)
        return _collate(self, torch.randint(8, 65, (self.batch,), generator=generator).tolist(), generator)

    def phases(self, system: System, index: int) -> list[Phase]:
        """The steps of round `index`. Rounds of C2 have different batches; the others repeat one batch, whose loss then falls."""
        steps = min(self.steps, system.steps or self.steps)
        if not self.lengths:
            return [Phase("batches", _samples(self, system.grouped)[index :: self.rounds][:steps])]
        last = len(self.lengths) - 1
        return [Phase(f"S={length}", [_full(self, length, place)] * (steps if place == last else 1), profiled=not self.cold and (place < last or steps > 1))
                for place, length in enumerate(self.lengths)]


def _ids(row: Row, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, row.config["vocab_size"], shape, generator=generator)


def _full(row: Row, length: int, seed: int) -> Batch:
    """A batch without padding that is supervised throughout. input_ids, attention_mask, labels: [batch, length]."""
    ids = _ids(row, (row.batch, length), torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _collate(row: Row, lengths: Sequence[int], generator: torch.Generator) -> Batch:
    """Samples of these lengths, padded on the right to the longest; the last quarter of each is supervised."""
    shape = len(lengths), max(lengths)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.int64), "attention_mask": torch.zeros(shape, dtype=torch.int64),
             "labels": torch.full(shape, IGNORED)}
    for place, length in enumerate(lengths):
        ids = _ids(row, (length,), generator)
        batch["input_ids"][place, :length], batch["attention_mask"][place, :length] = ids, 1
        learned = -(-length // 4)
        batch["labels"][place, length - learned : length] = ids[-learned:]
    return batch


def short_lengths(number: int, generator: torch.Generator) -> list[int]:
    """Lognormal(4.3, 0.8), clipped to 8-512, those above LONGEST drawn again."""
    found: list[int] = []
    while len(found) < number:
        drawn = torch.empty(number).log_normal_(4.3, 0.8, generator=generator).round().clamp(8, 512).int().tolist()
        found += [length for length in drawn if length <= LONGEST]
    return found[:number]


def _samples(row: Row, grouped: bool) -> list[Batch]:
    """The batches of all rounds. Both ways of batching draw from one set of MEGA batches of samples: the default takes them as they come,
    the grouped sorts all by length and takes batches evenly over the sorted order, so that each length is as frequent as in the set."""
    generator = torch.Generator().manual_seed(7)
    lengths = short_lengths(MEGA * row.batch, generator)
    number = row.rounds * row.steps
    if grouped:
        lengths = sorted(lengths, reverse=True)
        places = [int(MEGA * (index + 0.5) / number) for index in range(number)]
    else:
        places = list(range(number))
    return [_collate(row, lengths[place * row.batch : (place + 1) * row.batch], torch.Generator().manual_seed(place)) for place in places]


def _budgets() -> dict[str, System]:
    """torch.compile with its budget swept. 1 is what `compile` has. Below 0.1 it keeps little more than checkpointing does."""
    return {f"compile-budget-{budget}": replace(COMPILE, budget=budget, rounds=1, steps=3, extra=budget > 0.5) for budget in (0.1, 0.3, 0.5, 0.7)}


ROWS: dict[str, Row] = {row.name: row for row in (
    Row("C1", "activation memory: bytes per token above the weights, batch 1", "Qwen3-0.6B", lengths=(512, 1024, 2048), rounds=1, steps=3, minutes=16,
        memory="least", dynamic=True, systems={
            "eager": replace(EAGER, steps=1), "checkpointing": CHECKPOINTING, "compile": replace(COMPILE, steps=2),
            "compile-checkpointing": replace(COMPILE, checkpointing=True, steps=1), "compile-blocks": replace(BLOCKS, extra=True),
            "compile-blocks-checkpointing": replace(BLOCKS, checkpointing=True, extra=True), "fxopt": OURS}),
    Row("C2", "short data: real tokens per second, batch 16, a quarter of the tokens supervised", "Qwen3-0.6B", changes={"num_hidden_layers": 8}, batch=16,
        minutes=11, dynamic=True, compact=True, systems={
            "eager": EAGER, "checkpointing": replace(CHECKPOINTING, rounds=1, steps=2), "compile": replace(COMPILE, rounds=1, extra=True),
            "lightning": System(lightning=True, rounds=1, steps=2), "eager-grouped": replace(EAGER, grouped=True),
            "checkpointing-grouped": replace(CHECKPOINTING, grouped=True, rounds=1, extra=True), "compile-grouped": replace(COMPILE, grouped=True),
            "fxopt": OURS}),
    Row("C3", "equal memory: step time within the peak of the checkpointed peer, batch 4 x 512", "SmolLM2-135M", batch=4, lengths=(512,), minutes=14,
        memory="budget", systems={
            "eager": replace(EAGER, rounds=1), "checkpointing": CHECKPOINTING, "compile": replace(COMPILE, rounds=1, steps=3),
            "compile-checkpointing": replace(COMPILE, checkpointing=True, rounds=1, extra=True), **_budgets(), "fxopt": OURS,
            "fxopt-tight": replace(OURS, tight=True, rounds=1)}),
    Row("C5", "cold start: from the model object to the end of the first optimizer step, 256 tokens", "Qwen3-0.6B", lengths=(256,), rounds=2, steps=1,
        minutes=6, cold=True, systems={
            "eager": EAGER, "checkpointing": replace(CHECKPOINTING, rounds=1), "compile": replace(COMPILE, rounds=1),
            "compile-blocks": replace(BLOCKS, rounds=1), "fxopt": OURS}),
)}
