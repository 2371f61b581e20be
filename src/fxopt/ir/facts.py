"""What passes say about the state they introduce. Installed by the runtime, read by dumps, adapters' files and merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Installed:
    """A fact: the model carries this state already. Passes use these slots instead of making them anew.

    Attributes:
        names: of all its parameters and buffers.
        formats: of the weights that it stores quantized, by slot.
        adapters: for each adapter's name, the weights that it adapts, each with its kind (see `LowRank`; "whole": `Trained`).
        transposed: (adapter, weight) of those whose factors are made for a weight that is read as [in, out].
    """

    names: frozenset[str] = frozenset()
    formats: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    adapters: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    transposed: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class LowRank:
    """A slot that is one part of a low-rank adapter: W' = W + scale * B A (transposed weights: W + scale * (B A)^T).

    The factors' shapes by kind: "linear" a [rank, in], b [out, rank]; "embedding" a [rank, vocabulary], b [width, rank], always
    transposed; "conv" a [rank, in, *kernel], b [out, rank, 1, ...]; "experts" (a stack of matrices) a [experts, rank, in],
    b [experts, out, rank].

    DoRA: W' = m * (W + scale * B A) / ||W + scale * B A||, with one magnitude m for each output.

    Attributes:
        target: slot of the adapted weight.
        factor: "a", "b" or "magnitude" (one for each output; [1, out, 1, ...] of a convolution).
        scale: what B A is multiplied by.
        transposed: the weight is stored as [in, out].
        kind: "linear", "embedding", "conv" or "experts": what reads the weight.
        variant: "lora", "rslora" or "dora".
        dropout: probability of a zero in the adapter's input, in training.
    """

    target: str
    factor: str
    rank: int
    alpha: float
    scale: float
    transposed: bool = False
    adapter: str = "default"
    kind: str = "linear"
    variant: str = "lora"
    dropout: float = 0.0


@dataclass(frozen=True)
class Trained:
    """A slot that is an adapter's own copy of a parameter, trained whole: W' is the copy, the original stays as it is.

    Attributes:
        target: slot of the original.
    """

    target: str
    adapter: str = "default"


@dataclass(frozen=True)
class Stored:
    """A slot that is one part of a weight kept in a quantized format.

    Attributes:
        target: slot of the dense weight that it replaces.
        part: name of the part, as the format calls it.
        format: name of the format (see kernels/formats).
        shape, dtype: of the dense weight.
    """

    target: str
    part: str
    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Budget:
    """A fact: a training step should not need more memory than this.

    Attributes:
        bytes: weights, gradients, optimizer, activations and scratch together; None: as little as can be.
        optimizer: whose state counts, a name that the runtime knows.
        compress: saved values may be kept in 8 bits where no exact way is as good.
    """

    bytes: int | None
    optimizer: str = "adamw"
    compress: bool = False


@dataclass(frozen=True)
class LossScale:
    """A fact: the program has gradients in fp16; its loss is to be multiplied by about `scale` before the backward (runtime/scaler.py)."""

    scale: float


@dataclass(frozen=True)
class Hoist:
    """A fact: what depends on no trainable tensor and no random number may be kept for each sample, from one epoch to the next.

    Attributes:
        bytes: that may be kept. folder: where; None: in memory.
    """

    bytes: int
    folder: str | None = None
