"""Pipelines for common wishes. They are ordinary values: print them, change them, write your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxopt.passes.pipeline import Pipeline, build


def exact() -> Pipeline:
    """What makes any training step cheaper and changes no result beyond rounding: fused ops, a causal mask by flag, a fused loss."""
    return Pipeline((build("canonicalize"), build("causal"), build("fuse"), build("loss"), build("dead_code")))


def finetune(rank: int = 16, alpha: float | None = None, quantize: str | None = None, targets: Sequence[str] | None = None,
             remat: bool = False) -> Pipeline:
    """LoRA fine-tuning: adapters on the linear layers, the rest frozen and perhaps quantized, then what `exact` does.

    Args:
        rank: rank of the adapters.
        alpha: scale of the adapters (None: the default of the lora pass).
        quantize: a format for the frozen weights, such as "nf4"; None keeps them as they are.
        targets: which layers take adapters, by the end of their names; None is the default of the lora pass.
        remat: recompute activations in the backward instead of keeping them.
    """
    given: dict[str, Any] = {"alpha": alpha, "targets": targets}
    passes = [build("canonicalize"), build("causal"), build("lora", rank=rank, **{name: value for name, value in given.items() if value is not None})]
    if quantize is not None:
        passes.append(build("quantize", quantize))
    passes += [build("fuse"), build("loss")]
    if remat:
        passes.append(build("remat"))
    return Pipeline((*passes, build("dead_code")))
