"""What `fxopt.Trainer` costs beside the bare loop.

    python -m bench.trainer [--rounds N]

The same model, batches, optimizer, schedule, clipping, and the loss read back after each step; one thread, processor time (others may use
the machine), the two in turn, the least of all rounds of each. Writes bench/results/trainer.jsonl. Exit code 1 when the losses differ, or the
trainer costs more than `ALLOWED`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from bench.machine import describe
from bench.run import RESULTS
import fxopt
from fxopt.runtime.optim import AdamW
from fxopt.train.schedule import make_schedule
from fxopt.train.trainer import Trainer

STEPS = 100
ALLOWED = 0.02
Data = Sequence[tuple[Tensor, Tensor]]


class Convolutions(nn.Module):
    """Convolutions of so many channels and a linear layer on images of 8 x 8: 3 ms a step of 64 images with 16, 40 ms with 128."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * channels, 10))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of images [batch, 1, 8, 8] and classes [batch]."""
        return nn.functional.cross_entropy(self.body(x), y)


def images(number: int, size: int = 64) -> Data:
    """Batches of random images and classes."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 1, 8, 8, generator=generator), torch.randint(0, 10, (size,), generator=generator)) for _ in range(number)]


def bare(model: nn.Module, data: Data) -> list[float]:
    """The loop as one writes it by hand; the losses."""
    optimizer, factor, losses = AdamW(list(model.parameters()), lr=1e-3, weight_decay=0.0), make_schedule("cosine", len(data)), []
    for step, (x, y) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor(step)
        optimizer.zero_grad(set_to_none=True)
        loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(model: nn.Module, data: Data) -> list[float]:
    """The trainer; the losses."""
    return Trainer(epochs=1, lr=1e-3, progress=False).fit(model, data).losses


def measure(make: Callable[[], nn.Module], data: Data, rounds: int) -> dict[str, Any]:
    """Seconds of processor time of a step, bare and in the trainer, and whether the losses are equal.

    Args:
        make: a model with the same first weights each time. rounds: of both, in turn.
    """
    loops = {"bare": bare, "trainer": trained}
    times: dict[str, list[float]] = {name: [] for name in loops}
    losses = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, loop in loops.items():
            model, began = make(), time.process_time()
            losses[name] = loop(model, data)
            times[name].append((time.process_time() - began) / len(data))
    least = {name: min(found[1:]) for name, found in times.items()}
    return {**least, "ratio": least["trainer"] / least["bare"], "equal": losses["bare"] == losses["trainer"], "rounds": rounds, "steps": len(data)}


def optimized(channels: int) -> Callable[[], nn.Module]:
    """The same model through fxopt, captured once: its weights are put back each time."""
    model = fxopt.optimize(Convolutions(channels), inputs=images(1)[0])
    first = {name: value.clone() for name, value in model.state_dict().items()}

    def make() -> nn.Module:
        model.load_state_dict(first)
        model(*images(1)[0]).backward()  # the graphs are there
        model.zero_grad(set_to_none=True)
        return model

    return make


ROWS = (("convolutions", 16, True), ("convolutions, optimized", 16, False), ("convolutions", 128, True), ("convolutions, optimized", 128, True))
"""Name, channels, and whether the trainer may cost `ALLOWED` at most. What it asks of a program (how many items the loss is the mean of, whether
it is one of the checkpoint's) takes 0.2 ms of a batch: 5 to 7% of the second row's steps, which are of 3 ms."""
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_TOP_PAD_": str(1 << 28)}
"""glibc keeps what is freed. Otherwise page faults make larger steps 5% shorter or 7% longer, by the order of the runs and not by the loop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args(argv).rounds
    if any(os.environ.get(name) != value for name, value in KEEP.items()):
        return subprocess.run([sys.executable, "-m", "bench.trainer", "--rounds", str(rounds)], env={**os.environ, **KEEP}).returncode
    torch.set_num_threads(1)
    lines = [json.dumps({"machine": describe()})]
    bad = False
    for name, channels, held in ROWS:
        make = optimized(channels) if "optimized" in name else lambda channels=channels: Convolutions(channels)
        found = {"row": name, "channels": channels, **measure(make, images(STEPS if channels < 100 else STEPS // 5), max(5, rounds * 16 // channels))}
        bad |= not found["equal"] or held and found["ratio"] > 1 + ALLOWED
        lines.append(json.dumps(found))
        print(f"{name}, {channels} channels: bare {found['bare'] * 1e3:.3f} ms, trainer {found['trainer'] * 1e3:.3f} ms ({found['ratio'] - 1:+.1%}), losses {'equal' if found['equal'] else 'DIFFER'}")
    (RESULTS / "trainer.jsonl").write_text("\n".join(lines) + "\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
