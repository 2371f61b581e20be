"""A certificate of an optimized model: every pass application, and the program as it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from fxopt.ir.program import Program
from fxopt.passes.bisect import Culprit, Judge, bisect
from fxopt.passes.certificate import Certificate
from fxopt.passes.certify import certify
from fxopt.passes.pipeline import Pipeline, applied
from fxopt.runtime.at_hand import base_state, counting_adapters


def certified(program: Program, model: nn.Module, passes: Pipeline, example: Sequence[torch.Tensor], run: Callable[[list[torch.Tensor]], Sequence[Any]], *,
              runs: int, seed: int, original: Mapping[str, torch.Tensor] | None = None, name: str | None = None,
              inputs: Sequence[str] | None = None) -> Certificate:
    """Test how a live model's program was made, and how it runs.

    Args:
        program: the one that calls run. run: flat inputs to flat outputs, as a call does it.
        original: weights before anything was quantized, by name; None: what the stored ones stand for.
        name, inputs: how the model and its inputs were named, for the record.
    """
    raw = list(program.history())[-1]
    state = base_state(model, raw, original)
    with counting_adapters(model, program) as live:
        return certify(program, applied(program, passes), example, state, runs=runs, seed=seed, text=passes.text(), model=name or type(model).__name__,
                       inputs=inputs, run=run, live=live)


def bisected(program: Program, model: nn.Module, passes: Pipeline, example: Sequence[torch.Tensor], *, predicate: Judge | None, certificate: Certificate | None,
             original: Mapping[str, torch.Tensor] | None) -> Culprit:
    """The pass and the rewrite that make a live model's program wrong: see `bisect`."""
    state = base_state(model, list(program.history())[-1], original)
    return bisect(program, applied(program, passes), example, state, predicate=predicate, certificate=certificate)
