"""Pipelines for common wishes. They are ordinary values: print them, change them, write your own."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.errors import PassError
from fxopt.passes.base import Pass
from fxopt.passes.canonicalize import Canonicalize
from fxopt.passes.causal import Causal
from fxopt.passes.dead_code import DeadCode
from fxopt.passes.fuse import Fuse
from fxopt.passes.lora import Lora
from fxopt.passes.loss import Loss
from fxopt.passes.pipeline import Pipeline, build
from fxopt.passes.remat import Remat
from fxopt.passes.siblings import Siblings


def exact() -> Pipeline:
    """What makes any training step cheaper and changes no result beyond rounding: fused ops, a causal mask by flag, a fused loss,
    the smallest saved set that needs no heavy recomputation."""
    return Pipeline((Canonicalize(), Causal(), Fuse(), Loss(), Remat(), DeadCode()))


def finetune(rank: int = 16, alpha: float | None = None, quantize: str | None = None, targets: str | Sequence[str] = "all-linear",
             remat: bool = True, memory: int | str | None = None, pack: bool = False, precision: str | None = None) -> Pipeline:
    """LoRA fine-tuning: adapters on the linear layers, the rest frozen and perhaps quantized, then what `exact` does.

    Args:
        rank: rank of the adapters.
        alpha: scale of the adapters; None is 2 * rank.
        quantize: a format for the frozen weights, such as "nf4"; None keeps them as they are.
        targets: which layers take adapters; see the lora pass.
        remat: recompute what is pointwise in the backward instead of keeping it.
        memory: bytes that a training step may take, or "least": planned in place of `remat`.
        pack: leave padding out of the step, and rows without a label out of the last layer; see the pack and compact passes.
        precision: what matrix products compute in, such as "bf16"; None keeps the model's dtypes.

    Raises:
        PassError: an argument that the passes do not take.
    """
    for name, value in (("remat", remat), ("pack", pack)):
        if not isinstance(value, bool):
            raise PassError(f"finetune: {name} must be True or False, got {value!r}")
    adapters = Lora(rank, alpha, targets if isinstance(targets, str) else tuple(targets))
    stored: tuple[Pass, ...] = (build("quantize", quantize),) if quantize is not None else ()
    rows: tuple[Pass, ...] = (build("pack"), build("compact")) if pack else ()
    dtypes: tuple[Pass, ...] = (build("precision", precision),) if precision is not None else ()
    saved: tuple[Pass, ...] = (build("memory", memory),) if memory is not None else (Remat(),) if remat else ()
    # siblings behind compact: in the last layer queries have other rows than keys and values, and are no siblings of theirs
    return Pipeline((Canonicalize(), Causal(), adapters, *stored, Fuse(), Loss(), *rows, Siblings(), *dtypes, *saved, DeadCode()))
