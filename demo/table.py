"""The demo's result on the terminal, and the claims that decide its exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import platform
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.measure import perplexity
from demo.plan import Plan, sample_words

PARITY_LIMIT = 1e-4
"""Largest relative difference of a loss from the peer's, in any step."""
LOGIT_LIMIT = 1e-3
"""Largest difference of a logit between fxopt and PEFT with the saved adapter (fp32, logits up to about 40)."""


@dataclass(frozen=True)
class Claim:
    """One sentence that the run shows or refutes."""

    text: str
    holds: bool


def introduce(plan: Plan) -> None:
    """Says what runs."""
    Console(stderr=True).print(
        f"SmolLM2-135M-Instruct learns to answer like a dictionary: {plan.steps} steps of {plan.batch} examples, "
        f"LoRA rank {plan.rank} on every linear layer over NF4 weights, fp32 arithmetic, one process per system."
    )


def relative_differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """|a - b| / |b| per step."""
    return [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]


def claims(ours: dict[str, Any], peers: Sequence[dict[str, Any]], verified: dict[str, Any]) -> list[Claim]:
    """What must hold for the demo to end with code 0."""
    largest = max(relative_differences(ours["losses"], peers[0]["losses"]))
    logit = verified["largest_difference"]
    return [
        Claim(
            f"all {len(ours['losses'])} losses equal the peer's: largest relative difference {largest:.1e} "
            f"(limit {PARITY_LIMIT:.0e})",
            largest <= PARITY_LIMIT,
        ),
        Claim(
            f"the saved adapter in PEFT: largest logit difference {logit:.1e} (limit {LOGIT_LIMIT:.0e}), "
            f"logits up to {verified['largest_logit']:.0f}, {verified['adapted_layers']} layers",
            logit <= LOGIT_LIMIT,
        ),
        Claim(
            f"held-out loss fell: {ours['held_out_before']:.3f} to {ours['held_out_after']:.3f}",
            ours["held_out_after"] < ours["held_out_before"],
        ),
        Claim(
            f"every adapter gets a gradient: smallest norm {ours['smallest_gradient_norm']:.1e}",
            ours["smallest_gradient_norm"] > 0,
        ),
    ]


def show(
    plan: Plan, ours: dict[str, Any], peers: Sequence[dict[str, Any]], verified: dict[str, Any], seconds: float
) -> int:
    """Prints the tables and returns the exit code."""
    console = Console()
    console.print(_comparison([ours, *peers]))
    console.print(_curves(ours, peers))
    console.print(_answers(plan, ours))
    found = claims(ours, peers, verified)
    for claim in found:
        console.print(f"[{'green' if claim.holds else 'red'}]{'holds' if claim.holds else 'FAILS'}[/]  {claim.text}")
    best = max(peers, key=lambda record: record["tokens_per_second"])
    least = min(peers, key=lambda record: record["memory"]["above"])
    console.print(
        f"\nfxopt: {ours['tokens_per_second'] / best['tokens_per_second']:.2f}x the tokens/s of the faster peer "
        f"({best['system']}), {least['memory']['above'] / ours['memory']['above']:.2f}x less training memory than the "
        f"smaller one ({least['system']}). `make bench-all` adds torch.compile and checkpointing."
    )
    console.print(f"adapter: {ours['adapter']}\ntotal: {seconds / 60:.1f} minutes on {platform.machine()}, torch "
                  f"{ours['versions']['torch']}")  # fmt: skip
    return 0 if all(claim.holds for claim in found) else 1


def _comparison(records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Fine-tuning SmolLM2-135M-Instruct", title_justify="left")
    table.add_column("")
    for record in records:
        table.add_column(record["system"], justify="right")

    def row(name: str, value: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(value(record) for record in records))

    def gib(part: str) -> Callable[[dict[str, Any]], str]:
        return lambda record: f"{record['memory'][part] / 2**30:.2f} GiB"

    row("held-out loss before", lambda r: f"{r['held_out_before']:.4f}")
    row("held-out loss after", lambda r: f"{r['held_out_after']:.4f}")
    row("perplexity before", lambda r: f"{perplexity(r['held_out_before']):.1f}")
    row("perplexity after", lambda r: f"{perplexity(r['held_out_after']):.1f}")
    row("real tokens per second", lambda r: f"{r['tokens_per_second']:.0f}")
    row("seconds per step", lambda r: f"{r['step_seconds']:.2f}")
    row("seconds to prepare", lambda r: f"{r['prepare_seconds']:.0f}")
    row("peak memory in training", gib("peak"))
    row("  of it above the weights", gib("above"))
    row("peak memory before", gib("before"))
    return table


def _curves(ours: dict[str, Any], peers: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Loss by step", title_justify="left")
    table.add_column("step", justify="right")
    for record in (ours, *peers):
        table.add_column(record["system"], justify="right")
    table.add_column("difference", justify="right")
    differences = relative_differences(ours["losses"], peers[0]["losses"])
    every = max(1, len(differences) // 8)
    for step in sorted({*range(0, len(differences), every), len(differences) - 1}):
        losses = [f"{record['losses'][step]:.5f}" for record in (ours, *peers)]
        table.add_row(str(step + 1), *losses, f"{differences[step]:.1e}")
    return table


def _answers(plan: Plan, ours: dict[str, Any]) -> Table:
    table = Table(title="Held-out words", title_justify="left", show_lines=True)
    for column in ("word", "before", "after", "dictionary"):
        table.add_column(column, ratio=None if column == "word" else 1)
    for entry, before, after in zip(sample_words(plan), ours["answers_before"], ours["answers_after"], strict=True):
        table.add_row(entry.word, before, after, entry.gloss)
    return table
