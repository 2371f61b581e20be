"""The small model whose dumps lie in tests/golden. `python -m tests.golden_models` writes them anew; look at the difference before you commit it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from fxopt.explain import explain
from fxopt.ir.capture import Call, capture
from fxopt.ir.program import Program
from fxopt.ir.text import diff, text
from fxopt.passes.pipeline import run
from fxopt.runtime.step_text import step_text

FOLDER = Path(__file__).parent / "golden"


class Block(nn.Module):
    """A gated block; the mean of the gate reads a value that a fused op would not make."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32, bias=False), nn.Linear(32, 16)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        gate = nn.functional.silu(self.gate(y))
        x = x + self.down(gate * self.up(y))
        return x * gate.mean() if self.shared else x


class Stack(nn.Module):
    """Equal blocks, a head and a loss."""

    def __init__(self, shared: bool, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(shared) for _ in range(depth))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, *, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.view(-1, 4), labels.view(-1)), "logits": logits}


def stacked(shared: bool = False, depth: int = 3) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model and its arguments by name."""
    torch.manual_seed(0)
    return Stack(shared, depth), {"x": torch.randn(2, 6, 16), "labels": torch.randint(0, 4, (2, 6))}


def program(passes: str, shared: bool = False, depth: int = 3) -> tuple[Program, nn.Module, Call]:
    """The model's program after some passes."""
    model, kwargs = stacked(shared, depth)
    call = Call.of((), kwargs)
    return run(passes, capture(model, call)), model, call


def _fused() -> str:
    return text(program("canonicalize | fuse | dead_code")[0], fold=True)


def _difference() -> str:
    after = program("canonicalize | fuse")[0]
    return diff(after.parent, after, fold=True) + "\n"


def _step() -> str:
    found, model, call = program("lora(rank=2) | fuse | remat")
    return step_text(found, model, tuple(tuple(t.shape) for t in call.tensors))


def _explanation() -> str:
    said = str(explain(*program("lora(rank=2) | fuse", shared=True), predict="none")) + "\n"
    return re.sub(r"\((?!golden)(\w+\.py):\d+\)", r"(\1)", said)  # lines of the library move often


GOLDEN: dict[str, Callable[[], str]] = {"fused": _fused, "difference": _difference, "step": _step, "explanation": _explanation}

if __name__ == "__main__":
    for name, make in GOLDEN.items():
        (FOLDER / f"{name}.txt").write_text(make(), encoding="utf-8")
        sys.stdout.write(f"{name}.txt\n")
