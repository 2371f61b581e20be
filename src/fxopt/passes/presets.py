"""Pipelines for common wishes. They are ordinary values: print them, change them, write your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxopt.passes.base import Pass
from fxopt.passes.catalog import PASSES
from fxopt.passes.pipeline import Pipeline, build


def exact() -> Pipeline:
    """What makes any training step cheaper and changes no result beyond rounding: fused ops, a causal mask by flag, a fused loss."""
    return Pipeline((*_named("canonicalize", "causal", "fuse", "loss", "dead_code"),))


def finetune(rank: int = 16, alpha: float | None = None, quantize: str | None = None, targets: str | Sequence[str] | None = None,
             remat: bool = False) -> Pipeline:
    """LoRA fine-tuning: adapters on the linear layers, the rest frozen and perhaps quantized, then what `exact` does.

    Args:
        rank: rank of the adapters.
        alpha: scale of the adapters (None: the default of the lora pass).
        quantize: a format for the frozen weights, such as "nf4"; None keeps them as they are.
        targets: which layers take adapters; None is the default of the lora pass.
        remat: recompute activations in the backward instead of keeping them.
    """
    given: dict[str, Any] = {"alpha": alpha, "targets": targets}
    lora = build("lora", rank=rank, **{name: value for name, value in given.items() if value is not None})
    stored = (build("quantize", quantize),) if quantize is not None else ()
    return Pipeline((*_named("canonicalize", "causal"), lora, *stored, *_named("fuse", "loss", *(("remat",) if remat else ()), "dead_code")))


def _named(*names: str) -> list[Pass]:
    known = {cls.name for cls in PASSES}
    return [build(name) for name in names if name in known]
