"""Writes docs/benchmarks.md from bench/results/*.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import json
from pathlib import Path
import statistics
import sys
from typing import Any

from bench import headlines_table
from bench.run import REFERENCE, RESULTS
from fxopt.kernels.catalog import CATALOG

_SHOWN = ("fxopt", "eager", "compile")
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

Written by `python -m bench.report` from `bench/results/*.jsonl`, which `make bench-all` measures (`make bench`: the headlines). Do not edit.

Rules: one process per system; the same batches in the same order from the same first adapter; systems in turns, round
after round; medians of the timed steps after warm-up; losses within 1e-4 (relative) of the eager ones and a gradient
for every adapter, checked inside the timed runs; tokens that are padding are not counted; memory is the peak of
resident memory during training, above what was resident when it began. Arithmetic is fp32. The peers run in their
strongest settings that we know of, with and without gradient checkpointing, and the ratio is against the best of them.
"""


def read(kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(machine, records) of one results file."""
    first, *rest = (RESULTS / f"{kind}.jsonl").read_text().splitlines()
    return json.loads(first)["machine"], [json.loads(line) for line in rest]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_line(machine: dict[str, Any]) -> str:
    """The machine in one sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    units = ", ".join(machine["units"]) or "no AVX"
    commit = f", commit {machine['commit']}" if machine.get("commit") else ""
    return (
        f"{machine['date']}: {machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads, {units}), "
        f"{machine['memory_gib']} GiB, Python {machine['python']}, {versions}{commit}."
    )


def demo_section() -> str:
    """The demo's workload and the cold start."""
    machine, records = read("demo")
    good = [record for record in records if "failed" not in record]
    names = list(dict.fromkeys(record["row"] for record in good))
    of = {name: [record for record in good if record["row"] == name] for name in names}

    def timed(name: str) -> list[dict[str, Any]]:
        return [step for record in of[name] for step in record["steps"][record["warmup"] :]]

    speed = {name: statistics.median(step["tokens"] / step["seconds"] for step in timed(name)) for name in names}
    above = {name: statistics.median(record["memory"]["above"] for record in of[name]) for name in names}
    rows = []
    for name in names:
        steps = timed(name)
        padded = statistics.median(record["padded_tokens_per_second"] for record in of[name])
        cold = of[name][0]
        rows.append(
            [
                name,
                f"{speed[name]:.0f}",
                f"{padded:.0f}",
                f"{statistics.median(step['seconds'] for step in steps):.2f} s",
                str(len(steps)),
                _gib(above[name]),
                _gib(statistics.median(record["memory"]["peak"] for record in of[name])),
                _gib(statistics.median(record["memory"]["before"] for record in of[name])),
                f"{cold['prepare_seconds'] + cold['steps'][0]['seconds']:.1f} s",
                f"{max(record.get('largest_relative_loss_difference', 0.0) for record in of[name]):.0e}",
            ]
        )
    head = ["system", "real tokens/s", "all tokens/s", "step", "steps", "above weights", "peak", "peak before",
            "cold start", "loss difference"]  # fmt: skip
    peers = [name for name in names if not name.startswith("fxopt")]
    lines = []
    for name in (name for name in names if name.startswith("fxopt")):
        fastest, smallest = max(peers, key=speed.__getitem__), min(peers, key=above.__getitem__)
        lines.append(
            f"- `{name}`: {speed[name] / speed[fastest]:.2f}x the tokens/s of the fastest peer (`{fastest}`), "
            f"{speed[name] / speed[REFERENCE]:.2f}x those of plain eager (`{REFERENCE}`); "
            f"{above[smallest] / above[name]:.2f}x less training memory than the smallest peer (`{smallest}`), "
            f"{above[REFERENCE] / above[name]:.2f}x less than plain eager."
        )
    failed = sorted({f"- `{r['row']}` did not run: {r['failed'].splitlines()[-1]}" for r in records if "failed" in r})
    return "\n\n".join(
        [
            "## Fine-tuning SmolLM2-135M-Instruct (the demo's workload)",
            machine_line(machine),
            f"LoRA rank 16 on every linear layer of every block, {good[0]['batch']} dictionary entries per step, right-padded, grouped by "
            "length; only answers are supervised. `peft-nf4` is Transformers + PEFT + bitsandbytes (QLoRA); "
            "`peft-dense` starts from the same weight values, held in fp32. Cold start: from the model object to the "
            "end of the first step, capture and checks or compilation included, with empty caches. `peak before`: the "
            "peak of loading and preparing.",
            table(head, rows),
            "\n".join(lines + failed),
        ]
    )


def ops_section() -> str:
    """Every fused op of the catalog."""
    machine, records = read("ops")
    known = {op.name for op in CATALOG}
    good = [record for record in records if "failed" not in record and record["row"].split()[0] in known]
    missing = sorted(known - {record["row"].split()[0] for record in good})
    rows, others = [], []
    for name in dict.fromkeys(record["row"] for record in good):
        of = {record["system"]: [r for r in good if r["row"] == name and r["system"] == record["system"]] for record in good if record["row"] == name}
        if "fxopt" not in of:
            continue
        time = {system: statistics.median(second for record in found for second in record["seconds"]) for system, found in of.items()}
        best = min((system for system in of if system != "fxopt"), key=time.__getitem__)
        bytes_ = {system: {key: statistics.median(record[key] for record in of[system]) for key in ("above", "kept")} for system in _SHOWN if system in of}
        floor = of["fxopt"][0]["least"]
        rows.append(
            [
                name,
                *(f"{time[s] * 1e3:.2f} ms" if s in of else "failed" for s in _SHOWN),
                f"{time['eager'] / time['fxopt']:.2f}x",
                f"{time[best] / time['fxopt']:.2f}x",
                *(_mib(bytes_[s]["kept"]) for s in ("fxopt", "eager")),
                *(f"{of[s][0]['moved'] / floor:.1f}" for s in ("fxopt", "eager")),
                *(f"{bytes_[s]['above'] / 2**20:.0f} MiB" if s in of else "failed" for s in _SHOWN),
                f"{max(record['relative_error'] for record in of['fxopt']):.0e}",
            ]
        )
        others += [f"- {name}: {time[s] * 1e3:.2f} ms in {s}, {time['fxopt'] / time[s]:.2f}x that in fxopt." for s in of if s not in _SHOWN]
    head = ["op", *_SHOWN, "against eager", "against the best", "kept: fxopt", "eager", "moved / least: fxopt", "eager",
            *(f"peak: {s}" if s == "fxopt" else s for s in _SHOWN), "error"]  # fmt: skip
    return "\n\n".join(
        [
            "## Fused ops on the CPU, forward and backward",
            machine_line(machine),
            "1,024 tokens at SmolLM2-135M's sizes. fxopt's nodes are timed as a region of a program runs them, the others under "
            "autograd. A value under 1x is a loss: such an op is kept for what it saves in memory or for a graph with one node, or is "
            "not chosen on this device. `kept`: what lives from forward to backward beyond arguments and results. `moved / least`: "
            "bytes that the operators read and write, over the bytes of reading each argument and each saved tensor once and writing "
            "each result once; what a body does block by block stays in the cache but is counted.",
            table(head, rows),
            "Kernels of other libraries for the same call:\n\n" + "\n".join(others) if others else "No kernel of another library could be measured.",
            f"Not measured yet: {', '.join(missing)}." if missing else "Every op of the catalog is measured.",
        ]
    )


def headlines_section() -> str:
    """The headline rows."""
    return headlines_table.section(RESULTS / "headlines.jsonl", table, machine_line)


def _mib(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def page() -> str | None:
    """The page of the records there are; None without any."""
    kinds = {"headlines": headlines_section, "demo": demo_section, "ops": ops_section}
    sections = [section() for kind, section in kinds.items() if (RESULTS / f"{kind}.jsonl").exists()]
    return "\n\n".join([INTRODUCTION.strip(), *sections]) + "\n" if sections else None


def main() -> int:
    """Writes the page."""
    text = page()
    if text is None:
        print("no results: run `make bench` first", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
