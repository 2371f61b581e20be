"""The headline rows as tables: on the terminal and for docs/benchmarks.md. The numbers are those of the records, nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import json
from pathlib import Path
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.headlines_workloads import LONGEST, MEGA, ROWS, Row

OURS, DEFAULT = "fxopt", "eager"
Record = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A ratio (better is larger) and what it should reach; `least` None: for information."""

    text: str
    value: float
    least: float | None = None

    @property
    def verdict(self) -> str:
        """Met, or missed by how much."""
        if self.least is None:
            return ""
        if self.value >= self.least:
            return "met"
        return f"missed: {self.least / self.value:.2f}x short" if self.value > 0 else "missed"


def fit(tokens: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(slope, value at 0) of the line with the least squares."""
    found = statistics.linear_regression(tokens, values)
    return found.slope, found.intercept


def figures(records: Sequence[Record]) -> dict[str, Figures]:
    """Per system, over its rounds: medians of memory and of times; sums for tokens per second.

    step: of the last phase. speed, padded: real and all tokens of the last phase over its seconds (a median would leave out long batches).
    step_bytes: peak of the last phase above what is resident between steps: the optimizer's state, and what a compiler keeps, is not in it.
    points: per phase (tokens, bytes above the weights, bytes at the allocator or None). slope, allocator: bytes per token of each.
    """
    found: dict[str, Figures] = {}
    for name in dict.fromkeys(r["system"] for r in records if "failed" not in r):
        mine = [r for r in records if r["system"] == name and "failed" not in r]
        last = [step for r in mine for step in r["phases"][-1]["steps"]]
        seconds = sum(step["seconds"] for step in last)
        points = []
        for phases in zip(*(r["phases"] for r in mine), strict=True):
            sizes = [phase["allocator"] for phase in phases if phase["allocator"] is not None]
            points.append((phases[0]["steps"][0]["padded"], statistics.median(phase["above"] for phase in phases),
                           statistics.median(sizes) if sizes else None))
        held = [(tokens, size) for tokens, _, size in points if size is not None]
        found[name] = {
            "step": statistics.median(step["seconds"] for step in last), "steps": len(last), "rounds": len(mine),
            "speed": sum(step["tokens"] for step in last) / seconds, "padded": sum(step["padded"] for step in last) / seconds,
            "points": points, "held": points[-1][2], "above": max(above for _, above, _ in points),
            "step_bytes": statistics.median(r["phases"][-1]["peak"] - r["phases"][-1]["settled"] for r in mine),
            "slope": fit(*zip(*((tokens, above) for tokens, above, _ in points), strict=True))[0] if len(points) > 1 else None,
            "allocator": fit(*zip(*held, strict=True))[0] if len(held) > 1 else None,
            "prepare": statistics.median(r["prepare_seconds"] for r in mine), "first": statistics.median(r["first_step_seconds"] for r in mine),
            "cold": statistics.median(r["prepare_seconds"] + r["first_step_seconds"] for r in mine),
            "colds": [r["prepare_seconds"] + r["first_step_seconds"] for r in mine],
            "budget": next((r["budget"] for r in mine if r.get("budget") is not None), None), "weights": mine[0]["weights"],
            "parity": max((r["largest_relative_loss_difference"] for r in mine if "largest_relative_loss_difference" in r), default=None),
            "norm": min(r["smallest_gradient_norm"] for r in mine), "passes": mine[0].get("passes"),
            "operators": mine[0]["phases"][-1].get("operators", []),
        }
    return found


def goals(row: Row, of: dict[str, Figures]) -> list[Goal]:
    """The row's ratios: against the default peer, against the best peer, and those that the goals name. Systems that did not run are left out."""
    if OURS not in of:
        return []
    mine = of[OURS]
    peers = {name: found for name, found in of.items() if not name.startswith(OURS)}
    found: list[Goal] = []

    def less(what: str, key: str, names: Sequence[tuple[str, float | None]], among: dict[str, Figures] = peers) -> None:
        able = {name: each[key] for name, each in among.items() if each[key]}
        if able and mine[key]:
            best = min(able, key=able.__getitem__)
            for name, least in names:
                peer = best if name == "best" else name
                if peer in able and (name != "best" or least is not None or all(best != other for other, _ in names)):
                    found.append(Goal(f"{what} than {'the best peer, ' if name == 'best' else ''}{peer}", able[peer] / mine[key], least))

    if row.name == "C1":
        less("fewer bytes per token", "slope", [(DEFAULT, 20.0), ("checkpointing", 8.0), ("best", None)])
        less("fewer bytes per token at the allocator", "allocator", [(DEFAULT, 20.0), ("checkpointing", 8.0), ("best", None)])
        less("less memory above the weights at the longest", "above", [(DEFAULT, None), ("checkpointing", None), ("best", None)])
        less("shorter step at the longest", "step", [("checkpointing", 1.0), (DEFAULT, None), ("best", None)])
    elif row.name == "C2":
        best = max(peers, key=lambda name: peers[name]["speed"], default=None)
        if DEFAULT in peers:
            found.append(Goal(f"more real tokens/s than {DEFAULT}", mine["speed"] / peers[DEFAULT]["speed"], 5.0))
        if best is not None:
            found.append(Goal(f"more real tokens/s than the best peer, {best}", mine["speed"] / peers[best]["speed"], 1.6))
    elif row.name == "C3":
        less("shorter step", "step", [("checkpointing", 1.6), (DEFAULT, None)])
        if "checkpointing" in peers:
            limit, bytes_ = peers["checkpointing"]["above"], peers["checkpointing"]["step_bytes"]

            def fits(peer: Figures) -> bool:  # a compiler's own objects are not held against it
                return peer["above"] <= limit or peer["step_bytes"] <= bytes_

            found.append(Goal("less memory above the weights than the budget allows", limit / mine["above"], 1.0))
            less("less memory at the allocator", "held", [("checkpointing", None)])
            if (tight := of.get(f"{OURS}-tight")) is not None:
                peer = peers["checkpointing"]
                found.append(Goal("shorter step than checkpointing, within what that holds at the allocator", peer["step"] / tight["step"], 1.6))
                if tight["held"] and peer["held"]:
                    found.append(Goal("less memory at the allocator than checkpointing (fxopt-tight)", peer["held"] / tight["held"], 1.0))
            budgets = {name: each for name, each in peers.items() if name.startswith("compile-budget")}
            fitting = {name: each for name, each in budgets.items() if fits(each)}
            if fitting:
                less("shorter step (of the torch.compile budgets that fit)", "step", [("best", 1.15)], fitting)
            elif budgets:
                less("shorter step (no torch.compile budget fits; the fastest is taken)", "step", [("best", 1.15)], budgets)
            less("shorter step (of all peers that fit)", "step", [("best", None)], {name: e for name, e in peers.items() if fits(e)})
        less("shorter step (of all peers, whatever memory they take)", "step", [("best", None)])
    else:
        less("sooner at the end of the first step", "cold", [("compile", 10.0), (DEFAULT, 0.5), ("compile-blocks", None), ("best", None)])
    return found


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**30:.2f} GiB"


def _kib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**10:.0f} KiB"


Column = tuple[str, Callable[[Figures], str]]
_STEP: Column = ("step", lambda f: f"{f['step']:.2f} s")
_STEPS: Column = ("steps timed", lambda f: str(f["steps"]))
_ABOVE: Column = ("above weights", lambda f: _gib(f["above"]))
_LAST: list[Column] = [("prepare", lambda f: f"{f['prepare']:.1f} s"), ("first step", lambda f: f"{f['first']:.1f} s"),
                       ("loss difference", lambda f: "-" if f["parity"] is None else f"{f['parity']:.0e}"),
                       ("least gradient norm", lambda f: f"{f['norm']:.0e}")]
_SPEED: list[Column] = [("real tokens/s", lambda f: f"{f['speed']:.1f}"), ("all tokens/s", lambda f: f"{f['padded']:.1f}")]


def _columns(row: Row, of: dict[str, Figures]) -> list[Column]:
    if row.name == "C1":
        lengths = [tokens for tokens, _, _ in next(iter(of.values()))["points"]] if of else []
        each: list[Column] = [(f"above, {n}", lambda f, i=i: _gib(f["points"][i][1])) for i, n in enumerate(lengths)]
        return [("bytes/token", lambda f: _kib(f["slope"])), ("at the allocator", lambda f: _kib(f["allocator"])), *each, _STEP, _STEPS, *_SPEED[:1], *_LAST]
    if row.name == "C2":
        return [*_SPEED, _STEP, _STEPS, _ABOVE, *_LAST]
    if row.name == "C3":
        held: list[Column] = [("above rest", lambda f: _gib(f["step_bytes"])), ("at the allocator", lambda f: _gib(f["points"][-1][2]))]
        return [_STEP, _STEPS, _ABOVE, *held, *_SPEED[:1], *_LAST]
    each_cold: Column = ("each", lambda f: " ".join(f"{x:.1f}" for x in f["colds"]))
    return [("cold start", lambda f: f"{f['cold']:.1f} s"), each_cold, ("next step", _STEP[1]), _ABOVE, *_LAST]


def shares(operators: Sequence[tuple[str, float, int]]) -> str:
    """Operators in words."""
    return ", ".join(f"`{name}` {share:.0%} ({calls} calls)" for name, share, calls in operators if share >= 0.01)


def show(console: Console, row: Row, records: Sequence[Record], *, quick: bool) -> None:
    """Prints a row."""
    of = figures(records)
    table = Table(title=f"{row.name} {row.title}{' (QUICK: not a measurement)' if quick else ''}", title_justify="left")
    columns = _columns(row, of)
    table.add_column("system")
    for head, _ in columns:
        table.add_column(head, justify="right")
    for name, found in of.items():
        table.add_row(name, *(value(found) for _, value in columns))
    console.print(table)
    if OURS in of:
        console.print(f"  a step of fxopt: {shares(of[OURS]['operators'])}", highlight=False)
    for goal in goals(row, of):
        wish = f" (goal {goal.least:g}x: {goal.verdict})" if goal.least is not None else ""
        console.print(f"  {goal.value:.2f}x {goal.text}{wish}", highlight=False)


_NOTES = {
    "C1": "`bytes/token`: the slope of the peak above the weights over the lengths; `at the allocator`: the same of what the allocator held, in a step of its "
          "own under the profiler.",
    "C2": f"Lengths are lognormal(4.3, 0.8), clipped to 8-512, those above {LONGEST} drawn again: with a batch of 512 eager would need 23 GB, so the "
          f"peers pad less here than they would. All take batches from one set of {MEGA} batches of samples: `grouped` sorts it by length and takes "
          "batches evenly over the order, the others (fxopt too) take samples as they come. Tokens per second: all tokens over all seconds of the timed "
          "steps.",
    "C3": "The budget is the measured peak of `checkpointing`; `memory` gets it in bytes, weights included. `compile-budget-*`: torch.compile with "
          "`activation_memory_budget`. `above rest`: the peak above what is resident between steps, so without the objects that a compiler keeps; a peer "
          "fits if this or `above weights` is within that of `checkpointing`. `fxopt-tight`: the budget is "
          "what `checkpointing` held at the allocator, which is less.",
    "C5": "From the model object (weights loaded) to the end of the first optimizer step: adding adapters, capture and its checks, or compilation with an "
          "empty cache. Modules are imported before it: ours, the peers', and the compiler.",
}


def read(file: Path) -> list[tuple[Row, Record, list[Record]]]:
    """(row, head, records) of each row in the results, in the order of ROWS. head has `machine` and `quick`."""
    heads: dict[str, Record] = {}
    records: dict[str, list[Record]] = {}
    for line in map(json.loads, file.read_text().splitlines()):
        if "machine" in line:
            heads[line["row"]], records[line["row"]] = line, []
        else:
            records[line["row"]].append(line)
    return [(row, heads[name], records[name]) for name, row in ROWS.items() if name in heads]


_INTRODUCTION = (
    "fp32 on the CPU, LoRA rank 16 on every linear layer of every block, random weights in the shape of the named model (their values change neither speed "
    "nor memory), the same first adapter, none of whose factors is zero. In the timed runs every loss is compared with eager's and every adapter has a "
    "gradient. `eager`: Transformers + PEFT as they come. Memory: the process's peak above what was resident before the first step. That has in it "
    "what glibc keeps of freed buffers under 32 MiB (the more, the more a step allocates and frees); `at the allocator` has not: what PyTorch's CPU allocator "
    "held at most above what was there before a step."
)


def section(file: Path, table: Callable[..., str], machine_line: Callable[[Record], str]) -> str:
    """The headlines of a results file, as a section of the page."""
    parts = ["## Headlines", _INTRODUCTION]
    for row, head, records in read(file):
        of = figures(records)
        columns = _columns(row, of)
        quick = " **Quick run: few steps, to see that it works.**" if head["quick"] else ""
        changes = "".join(f", {key} {value}" for key, value in row.changes.items())
        lines = []
        for goal in goals(row, of):
            wish = f" Goal {goal.least:g}x: {goal.verdict}." if goal.least is not None else ""
            lines.append(f"- {goal.value:.2f}x: {goal.text}.{wish}")
        lines += sorted({f"- `{r['system']}` did not run: {r['failed'].splitlines()[-1]}" for r in records if "failed" in r})
        if OURS in of:
            lines.append(f"- fxopt's pipeline: `{of[OURS]['passes']}`.")
            lines.append(f"- Where a step of fxopt goes: {shares(of[OURS]['operators'])}.")
        shown = table(["system", *(name for name, _ in columns)], [[name, *(value(found) for _, value in columns)] for name, found in of.items()])
        parts += [f"### {row.name}: {row.title}", f"{row.shape} shape{changes}. {_NOTES[row.name]}{quick}", machine_line(head["machine"]), shown]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
