"""What an entry of the zoo is: a model, and the inputs of training steps in two sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn as nn
import transformers

SHAKE = 0.05
Batch = dict[str, Any]
"""Keyword arguments of a call; under the key "" a tuple of positional ones."""
Batches = Callable[[torch.Generator, int, int], Batch]
"""Makes the inputs of one training step from (generator, batch, length)."""


class Entry(Protocol):
    """One model of the zoo.

    Attributes:
        name: how the page and `--only` call it.
        family: the table that it is in.
        sizes: (batch, length) of two steps. Length is what the entry's batches take it for: tokens, pixels, frames.
    """

    name: str
    family: str
    sizes: tuple[tuple[int, int], ...]

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in training mode, the same at each call."""

    def inputs(self, step: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        """The inputs of a training step; floating-point ones in `dtype`."""


class Stepping:
    """Entries whose inputs come from a function of the two sizes."""

    batches: Batches
    sizes: tuple[tuple[int, int], ...]

    def inputs(self, step: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        """The inputs of a training step; floating-point ones in `dtype`."""
        made = self.batches(torch.Generator().manual_seed(2 + step), *self.sizes[step])
        return {name: _cast(value, dtype) for name, value in made.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(each, dtype) for each in value)
    return {key: _cast(each, dtype) for key, each in value.items()} if isinstance(value, dict) else value


def shaken(model: nn.Module) -> nn.Module:
    """The model in training mode with every parameter moved, norms' weights and biases too, so that a wrong gradient of any shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((SHAKE * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model.train()


@dataclass(frozen=True)
class Configured(Stepping):
    """A class of transformers with a configuration: names and values, imported when it is built.

    Attributes:
        model: the class of the model.
        config: the class of its configuration.
        settings: arguments of the configuration. Under a key that ends in "_config": arguments of a part's, which has "model_type".
    """

    name: str
    family: str
    model: str
    config: str
    settings: Mapping[str, Any]
    batches: Batches
    sizes: tuple[tuple[int, int], ...] = ((2, 12), (3, 20))

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in training mode, the same at each call."""
        return shaken(self.made(self.settings).to(dtype))

    def made(self, settings: Mapping[str, Any]) -> nn.Module:
        """The model with these settings, as its class initializes it."""
        torch.manual_seed(0)
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**settings))


@dataclass(frozen=True)
class Written(Stepping):
    """A model that is written in plain PyTorch.

    Attributes:
        make: a class or a function that makes the model.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    batches: Batches
    sizes: tuple[tuple[int, int], ...] = ((2, 12), (3, 20))

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in training mode, the same at each call."""
        torch.manual_seed(0)
        made = self.make()
        return shaken(made if dtype == torch.float32 else made.to(dtype))


def call_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    return batch.get("", ()), {key: value for key, value in batch.items() if key != ""}
