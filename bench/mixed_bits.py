"""Formats of one size against formats chosen by measured sensitivity, on a real model.

    python -m bench.mixed_bits

Stores the linear weights of SmolLM2-135M-Instruct (fetched as the demo fetches it) in each format, and in the plans of
`quantize(bits=...)`, and compares with the fp32 model on held-out text. Writes docs/mixed-bits.md. Exit code 1 when a plan
chosen by measurement is no better than one of the same bytes chosen by chance. About 10 minutes on one core.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import fxopt
from bench.machine import describe
from demo import assets, data
from fxopt.ir.capture import Call, capture
from fxopt.ir.facts import Stored
from fxopt.ir.program import Sample
from fxopt.kernels.formats import FORMATS
from fxopt.passes import sensitivity

PAGE = Path(__file__).resolve().parent.parent / "docs" / "mixed-bits.md"
HELD_OUT, CALIBRATION = (8, 512), (4, 256)
"""Sequences and tokens in each."""
BUDGETS = (4.5, 5.0, 6.0, 8.0)
SEEDS = (0, 1, 2)

Plan = Mapping[str, str]


@dataclass
class Model:
    """The model, the dense weights of its linears by parameter name, the text, and what it makes of the text in fp32.

    Attributes:
        logits: log-probabilities fp32 [sequences, length, vocabulary], filled by the first evaluation.
    """

    model: nn.Module
    dense: dict[str, torch.Tensor]
    held_out: torch.Tensor
    calibration: torch.Tensor
    logits: list[torch.Tensor] = field(default_factory=list)

    def bits(self, plan: Plan) -> float:
        """Bits per weight, scales included."""
        return self.mib(plan) * 2**23 / sum(w.numel() for w in self.dense.values())

    def mib(self, plan: Plan) -> float:
        """MiB of all stored weights."""
        return sum(sensitivity.bits_of(w.shape, w.dtype, plan[name]) * w.numel() for name, w in self.dense.items()) / 2**23


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    mib: float
    bits: float
    perplexity: float
    divergence: float
    agreement: float
    estimate: float | None = None


def load() -> Model:
    """The model and its text: dictionary entries, held-out words apart from those that are calibrated on."""
    folder = assets.model_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    train, held = data.split(held_out=2000)
    dense = {f"{path}.weight": m.weight.detach().clone() for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"}
    return Model(model, dense, _ids(tokenizer, held, *HELD_OUT), _ids(tokenizer, train, *CALIBRATION))


def _ids(tokenizer: PreTrainedTokenizerBase, entries: list[data.Entry], sequences: int, length: int) -> torch.Tensor:
    text = "\n".join(f"{data.QUESTION.format(word=entry.word)} {entry.gloss}." for entry in entries)
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False)[: sequences * length]).view(sequences, length)


def store(loaded: Model, plan: Plan) -> None:
    """Give the model the values that the plan's formats stand for."""
    weights = dict(loaded.model.named_parameters())
    for name, weight in loaded.dense.items():
        format = FORMATS[plan[name]]
        assert format.quantize is not None
        weights[name].copy_(format.dequantize(format.quantize(weight), weight.shape, weight.dtype))


@torch.no_grad()
def evaluate(loaded: Model, run: nn.Module) -> tuple[float, float, float]:
    """(perplexity, mean KL divergence from the fp32 model in nats, share of positions with the same most likely token)."""
    loss = divergence = 0.0
    same = count = 0
    for i, ids in enumerate(loaded.held_out):
        out = run(input_ids=ids[None], labels=ids[None])
        found = out.logits[0].log_softmax(-1)
        if i == len(loaded.logits):
            loaded.logits.append(found)
        wanted = loaded.logits[i]
        divergence += float(F.kl_div(found, wanted, reduction="sum", log_target=True))
        same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
        loss += float(F.nll_loss(found[:-1], ids[1:], reduction="sum"))
        count += len(ids)
    return math.exp(loss / (count - len(loaded.held_out))), divergence / count, same / count


def by_chance(loaded: Model, bits: float, seed: int) -> dict[str, str]:
    """A plan of at most this size: weights in random order get int8 while it fits, all others the smallest format."""
    names = list(loaded.dense)
    random.Random(seed).shuffle(names)
    plan = dict.fromkeys(loaded.dense, "nf4_nested")
    for name in names:
        if loaded.bits(plan | {name: "int8"}) <= bits:
            plan[name] = "int8"
    return plan


def measure(loaded: Model, weighted: bool) -> sensitivity.Measured:
    """What `quantize(bits=...)` measures."""
    call = Call.of((), {"input_ids": loaded.calibration, "labels": loaded.calibration})
    state = dict((*loaded.model.named_parameters(), *loaded.model.named_buffers()))
    program = capture(loaded.model, call)
    sample = Sample(call.tensors, {name: state[name] for name in program.slots if name in state})
    return sensitivity.measure(program, sample, loaded.dense.keys(), weighted=weighted)


def optimized(loaded: Model, bits: float) -> tuple[fxopt.Optimized, dict[str, str]]:
    """The model as `optimize` quantizes it, and the formats that it chose."""
    opt = fxopt.optimize(loaded.model, f"quantize(bits={bits})", inputs={"input_ids": loaded.calibration, "labels": loaded.calibration}, check=False)
    facts = [slot.made.facts for slot in opt.program.slots.values() if slot.made is not None]
    return opt, {fact.target: fact.format for fact in facts if isinstance(fact, Stored)}


def run() -> tuple[list[Row], list[str], list[str]]:
    """(rows, facts for the page, complaints)."""
    loaded = load()
    weights, every = sum(w.numel() for w in loaded.dense.values()), sum(p.numel() for p in loaded.model.parameters())
    rows: list[Row] = []

    def add(name: str, plan: Plan, errors: sensitivity.Errors | None = None) -> Row:
        store(loaded, plan)
        estimate = sum(errors[each].get(format, 0.0) for each, format in plan.items()) if errors is not None else None
        rows.append(Row(name, loaded.mib(plan), loaded.bits(plan), *evaluate(loaded, loaded.model), estimate))
        print(_line(rows[-1]), file=sys.stderr, flush=True)
        return rows[-1]

    add("dense (fp32)", dict.fromkeys(loaded.dense, "dense"))
    start = time.process_time()
    measured = measure(loaded, weighted=True)
    seconds = time.process_time() - start
    relative = measure(loaded, weighted=False)
    shapes = {name: (tuple(weight.shape), weight.dtype) for name, weight in loaded.dense.items()}
    for format in ("int8", "fp8", "nf4", "nf4_nested"):
        add(format, dict.fromkeys(loaded.dense, format), measured.errors)
    complaints = []
    for bits in BUDGETS:
        plan = sensitivity.choose(measured.errors, shapes, bits)
        ours = add(f"`bits={bits:g}`", plan, measured.errors)
        add(f"{bits:g} by relative output error", sensitivity.choose(relative.errors, shapes, bits))
        chance = [add(f"{bits:g} by chance, seed {seed}", by_chance(loaded, loaded.bits(plan), seed)) for seed in SEEDS]
        if ours.divergence >= min(each.divergence for each in chance):
            complaints.append(f"at {bits} bits, a choice by chance is as good as the measured one")
    store(loaded, dict.fromkeys(loaded.dense, "dense"))
    opt, chosen = optimized(loaded, BUDGETS[0])
    if chosen != sensitivity.choose(measured.errors, shapes, BUDGETS[0]):
        complaints.append("optimize chose another plan than the one evaluated")
    perplexity = evaluate(loaded, opt)[0]
    theirs = next(row.perplexity for row in rows if row.name == f"`bits={BUDGETS[0]:g}`")
    if abs(perplexity - theirs) > 1e-3 * theirs:
        complaints.append(f"the optimized model has perplexity {perplexity:.4f}, the same values in the original code {theirs:.4f}")
    facts = [f"{len(loaded.dense)} weights of linears ({weights:,} of {every:,} parameters) are stored, everything else stays fp32.",
             f"The measurement took {seconds:.0f} processor seconds, capture included. `fxopt.optimize` chose the same plan for "
             f"`bits={BUDGETS[0]:g}`, and its graph has the perplexity {perplexity:.3f}."]
    return rows, facts, complaints


def _line(row: Row) -> str:
    estimate = "-" if row.estimate is None else f"{row.estimate:.4f}"
    return f"| {row.name} | {row.bits:.3f} | {row.mib:.1f} | {row.perplexity:.3f} | {row.divergence:.4f} | {estimate} | {100 * row.agreement:.1f}% |"


def page(rows: list[Row], facts: list[str]) -> str:
    """docs/mixed-bits.md."""
    machine = describe()
    lines = [
        "# Mixed formats under a byte budget",
        "",
        "Made by `python -m bench.mixed_bits`; do not edit.",
        "",
        "`quantize(bits=4.5)` stores each weight in one of several formats, so that all of them together take at most 4.5 bits per weight, scales "
        "included, and the model changes as little as possible. What a format costs is measured on the example call: one forward and one backward pass "
        "give, for every linear, the change of its output in each format, weighed by the gradient of the loss (Fisher information, diagonal in the "
        "output: [BRECQ](https://arxiv.org/abs/2102.05426), equation 10). The plan is then the solution of a knapsack (`passes/sensitivity.py`).",
        "",
        f"SmolLM2-135M-Instruct, fp32, on {HELD_OUT[0]} x {HELD_OUT[1]} tokens of held-out dictionary entries; calibrated on {CALIBRATION[0]} x {CALIBRATION[1]} "
        "tokens of other entries. KL is the mean KL divergence from the fp32 model in nats; top-1 how often both find the same token most likely; "
        "\"estimated\" the sum that the plan makes least: before anything is stored, it predicts the KL. " + " ".join(facts) + " The \"dense\" values come from a "
        f"Q4_1 file, whose grid none of these formats shares. One thread of {machine['cpu']}, torch {machine['versions']['torch']}, {machine['date']}.",
        "",
        "| formats | bits per weight | MiB | perplexity | KL | estimated | top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *map(_line, rows),
        "",
        "Against chance: weights in random order get int8 while the plan's bytes last, the others `nf4_nested`. \"By relative output error\" is a choice by "
        "each linear's own relative error, which does not know what the rest of the model makes of it.",
        "",
        "| bits | KL as chosen | KL by relative error | KL by chance (mean, least) |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for bits in BUDGETS:
        chance = [row.divergence for row in rows if row.name.startswith(f"{bits:g} by chance")]
        ours, relative = (next(row.divergence for row in rows if row.name == name) for name in (f"`bits={bits:g}`", f"{bits:g} by relative output error"))
        lines.append(f"| {bits:g} | {ours:.4f} | {relative:.4f} | {statistics.mean(chance):.4f}, {min(chance):.4f} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Measures, writes the page."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    rows, facts, complaints = run()
    PAGE.write_text(page(rows, facts))
    for line in complaints:
        print(f"FAILS  {line}", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
