"""A weight that is kept in a quantized format, as a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from fxopt.errors import DataError
from fxopt.ir.facts import Stored
from fxopt.kernels.dequantize import OP as DEQUANTIZE
from fxopt.kernels.formats import FORMATS


class StoredWeight(nn.Module):
    """The parts of one stored weight, as buffers under the format's names. A child module with the weight's own name.

    Its entries in a state dict are those of the format's files: for NF4 bitsandbytes' (`weight` uint8 codes,
    `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`).

    Args:
        parts: one tensor for each part of the format.
        stored: format, shape and dtype of the dense weight.
    """

    def __init__(self, parts: Sequence[torch.Tensor], stored: Stored) -> None:
        super().__init__()
        self.stored, self.format = stored, FORMATS[stored.format]
        for part, value in zip(self.format.parts, parts, strict=True):
            self.register_buffer(part.name, value)

    @property
    def parts(self) -> list[torch.Tensor]:
        """The tensors, in the format's order."""
        return [self._buffers[part.name] for part in self.format.parts]  # type: ignore[misc]

    def dequantize(self) -> torch.Tensor:
        """The dense weight, in its original shape and dtype."""
        return DEQUANTIZE.forward.overload(self.parts, self.format.name, list(self.stored.shape), self.stored.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> StoredWeight:
        # codes and scales only move; a cast changes the dtype of the dense weight that they stand for
        probe = fn(torch.empty(0, dtype=self.stored.dtype, device=self.parts[0].device))
        self.stored = dataclasses.replace(self.stored, dtype=probe.dtype)
        for part in self.format.parts:
            self._buffers[part.name] = self._buffers[part.name].to(probe.device)  # type: ignore[union-attr]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "format"}  # a format holds functions

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.format = FORMATS[self.stored.format]

    def keys(self, key: str) -> set[str]:
        """The entries of a file that this weight is made of, `key` being the weight's own."""
        return set(self.format.write(key, self.parts, self.stored.shape, self.stored.dtype))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update(self.format.write(prefix[:-1], self.parts, self.stored.shape, self.stored.dtype))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the module that owns the weight hands its keys over (see `Adapted`)."""

    def load(self, state: Mapping[str, torch.Tensor], key: str, missing: list[str], errors: list[str]) -> None:
        """Take the parts from a state dict with the format's keys; `key` is the weight's own."""
        if key not in state:
            missing.append(key)
            return
        try:
            parts = self.format.read(key, state, self.stored.shape)
        except DataError as error:
            errors.append(str(error))
            return
        with torch.no_grad():
            for mine, given in zip(self.parts, parts, strict=True):
                mine.copy_(given)
