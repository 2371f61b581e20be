"""Predicted beside measured: peak memory and time of training steps of many architectures under three budgets each.

    python -m bench.plans [--only NAME ...] [--threads N]

Each architecture runs with the least memory that it can, with a budget half way, and without a limit; gradients must be those of the
last. Writes bench/results/plans.jsonl and docs/plans.md (with --only: prints). Exit code 1 when a gradient differs or a measured peak is
above its budget.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import statistics
import sys
from typing import Any

import torch

from bench.machine import describe
from bench.report import machine_line
import fxopt
from fxopt.errors import FxoptError
from fxopt.kernels.tolerance import same
from fxopt.train.batch import model_loss
from fxopt.runtime.plan import size
from fxopt.runtime.sizes import measure
from tests.zoo.entry import Configured
from tests.zoo.table import ZOO

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench" / "results" / "plans.jsonl", ROOT / "docs" / "plans.md"
NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Phi", "Cohere", "Granite", "OLMo", "GPT-2", "StarCoder2", "BERT")
"""Architectures whose widths can be set alike."""
WIDER = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 4096, "num_hidden_layers": 4, "head_dim": 64, "n_embd": 256, "n_layer": 4,
         "dim": 256, "hidden_dim": 768, "n_layers": 4, "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "n_inner": 1024, "d_model": 256,
         "embedding_size": 256, "emb_dim": 256, "num_layers": 4}
"""Large enough that tensors and not their bookkeeping take the memory and the time."""
BATCH, LENGTH = 4, 128
PASSES = "canonicalize | causal | fuse | loss"
UNITS = 1 << 40


def wider(entry: Configured) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """An entry of the zoo with more width and depth, and a batch for it."""
    model = entry.made({key: WIDER.get(key, value) for key, value in entry.settings.items()}).train()
    ids = torch.randint(3, 4096, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def rows(name: str) -> list[dict[str, Any]]:
    """One record for each budget of an architecture."""
    model, batch = wider(ZOO[name])
    parameters = [p for p in model.parameters() if p.requires_grad]
    found: list[dict[str, Any]] = []
    ends: dict[str, int] = {}
    expected: list[torch.Tensor | None] = []
    for label in ("no limit", "least", "half way"):
        budget = {"no limit": str(UNITS), "least": "least"}.get(label) or str((ends["least"] + ends["no limit"]) // 2)
        opt = fxopt.optimize(model, f"{PASSES} | memory({budget})", inputs=batch, check=False)
        plan = opt.plan()
        done = measure(lambda opt=opt: model_loss(opt, batch), plan, parameters)
        ends[label] = plan.peak.total
        gradients = [p.grad for p in parameters]
        expected = expected or gradients
        equal = all((a is None) == (b is None) and (a is None or same(a, b)) for a, b in zip(gradients, expected, strict=True))
        found.append({"row": name, "budget": label, "predicted": plan.peak.total, "measured": done.peak, "seconds": done.seconds,
                      "predicted_seconds": plan.seconds, "equal": equal, "within": label != "half way" or done.peak <= int(budget),
                      "twice": sum(bool(level.again) for level in plan.levels), "tiled": sum(bool(level.split.tiled) for level in plan.levels),
                      "regions": len(plan.levels)})
    return found


def page(records: list[dict[str, Any]], machine: str) -> str:
    """The document."""
    memory = [r["predicted"] / r["measured"] - 1 for r in records]
    clock = [r["predicted_seconds"] / r["seconds"] - 1 for r in records]
    lines = ["# Plans: predicted beside measured", "", "Written by `python -m bench.plans`. Do not edit.", "",
             f"{machine} {len(records)} configurations: {len({r['row'] for r in records})} architectures (4 layers of width 256, batch {BATCH} x {LENGTH}, fp32, "
             "all parameters trained) under three budgets. Measured: what torch's allocator gave, and what the plan counts beside (weights, "
             "AdamW's state, inputs); the least of three times.", "",
             f"Peak memory: median error {statistics.median(map(abs, memory)):.1%}, worst {max(memory, key=abs):+.1%}. "
             f"Time: median error {statistics.median(map(abs, clock)):.0%}, worst {max(clock, key=abs):+.0%}; "
             f"{sum(abs(e) <= 0.2 for e in clock)} of {len(clock)} within 20%. "
             f"Gradients equal those without a limit in {sum(r['equal'] for r in records)} of {len(records)}.", "",
             "| architecture | budget | predicted | measured | error | predicted time | measured time | error | regions that compute products twice | tiled |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for r, a, b in zip(records, memory, clock, strict=True):
        lines.append(f"| {r['row']} | {r['budget']} | {size(r['predicted'])} | {size(r['measured'])} | {a:+.1%} | {r['predicted_seconds'] * 1e3:.0f} ms | "
                     f"{r['seconds'] * 1e3:.0f} ms | {b:+.0%} | {r['twice']} of {r['regions']} | {r['tiled']} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write, and say what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NAMES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    records: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in arguments.only or NAMES:
        try:
            records += rows(name)
        except FxoptError as error:
            failed.append(f"{name}: {error}")
            continue
        print(*(f"{r['row']} {r['budget']}: {size(r['predicted'])} / {size(r['measured'])}, {r['predicted_seconds']:.3f} / {r['seconds']:.3f} s" for r in records[-3:]),
              sep="\n", file=sys.stderr)
    failed += [f"{r['row']}, {r['budget']}: the gradients differ" for r in records if not r["equal"]]
    failed += [f"{r['row']}, {r['budget']}: {size(r['measured'])} is above the budget" for r in records if not r["within"]]
    if records and not arguments.only:
        RESULTS.write_text("".join(json.dumps(r) + "\n" for r in [{"machine": describe()}, *records]))
        PAGE.write_text(page(records, machine_line(describe())))
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
