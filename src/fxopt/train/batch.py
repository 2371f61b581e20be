"""What a batch is, and what a model makes of one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import DataError

Batch = Any
"""A mapping of keyword arguments, a tuple of arguments, or one argument of the model."""


def call(model: nn.Module, batch: Batch) -> Any:
    """What `model` returns for `batch`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Calls `model` on `batch` and gives its loss: the output's `loss`, or the output itself if it is one number."""
    return loss_of(call(model, batch), type(model).__name__)


def loss_of(output: Any, where: str) -> Tensor:
    """The loss in what a model, or a loss function, returned: one number, its `loss` attribute or its entry `loss`.

    Raises:
        DataError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise DataError("The model gave no loss: neither `output.loss` nor one number.", where=where,
                        do="Put `labels` into the batches, or give the trainer a function as `loss`.")
    return loss


def real_tokens(batch: Batch) -> int:
    """Tokens of `batch` that are not padding; 0 if it has neither `attention_mask` nor `input_ids`."""
    if not isinstance(batch, Mapping):
        return 0
    if (mask := batch.get("attention_mask")) is not None:
        return int(mask.ne(0).sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; a named tuple stays one."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        moved = copy.copy(batch)
        for name, value in vars(batch).items():
            object.__setattr__(moved, name, to_device(value, device))  # a frozen one too
        return moved
    return batch
