"""What passes say about the state they introduce. Installed by the runtime, read by dumps, adapters' files and merges."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Installed:
    """A fact: the model carries this state of earlier programs. Passes use these slots and make no others."""

    names: frozenset[str]


@dataclass(frozen=True)
class LowRank:
    """A slot that is one factor of a low-rank adapter: W' = W + scale * B A (transposed weights: W + scale * (B A)^T).

    Attributes:
        target: slot of the adapted weight, [out, in], or [in, out] if `transposed`.
        factor: "a" ([rank, in]) or "b" ([out, rank]).
        scale: alpha / rank.
    """

    target: str
    factor: str
    rank: int
    alpha: float
    scale: float
    transposed: bool = False
    adapter: str = "default"


@dataclass(frozen=True)
class Stored:
    """A slot that is one part of a weight kept in a quantized format.

    Attributes:
        target: slot of the dense weight that it replaces.
        part: "packed" (uint8 codes) or "absmax" (fp32 block scales).
        format: "nf4".
        shape, dtype: of the dense weight.
    """

    target: str
    part: str
    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
