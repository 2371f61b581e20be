"""Runs programs with taps beside the programs themselves, which stay as they are."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn as nn
from torch import Tensor

from fxopt.ir import regions
from fxopt.ir.program import Program
from fxopt.ir.taps import Tap, tapped
from fxopt.runtime import saving
from fxopt.runtime.binding import Binding
from fxopt.runtime.region import RegionRunner


class Tapping:
    """Asks for values of the programs of a model. While it is in use, calls run a variant with the taps, made once for each program; regions
    without a tap are those of the program itself.

    Args:
        taps: by the name under which `values` gives each.
    """

    def __init__(self, taps: Mapping[str, Tap]) -> None:
        self.taps = dict(taps)
        self.variants: dict[Program, tuple[Binding, tuple[str, ...], dict[str, Tensor]]] = {}
        self.seen: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    def run(self, model: nn.Module, program: Program, runners: dict[Any, RegionRunner], tensors: Sequence[Tensor]) -> list[Any]:
        """The flat outputs of a program for the flat inputs; the tapped values are kept until `values` is asked.

        Raises:
            CallError: see `fxopt.ir.taps.tapped`.
        """
        if program not in self.variants:
            made, names, leaves = tapped(program, self.taps)
            binding = Binding(model, made, regions.cut(made, regions.repeated_blocks(model)), saving.of(made), ChainMap({}, runners), taps=len(names))  # type: ignore[arg-type]
            binding.hoisting = None  # what is remembered from an earlier epoch has no value in the middle
            self.variants[program] = binding, names, leaves
        binding, names, self.leaves = self.variants[program]
        for leaf in self.leaves.values():
            leaf.grad = None
        found = binding(tensors)
        self.seen = dict(zip(names, found[len(found) - len(names):]))
        return found[: len(found) - len(names)]

    def values(self) -> dict[str, Tensor]:
        """What the latest call (and its backward, for gradients) gave, by name; a gradient that was not computed is left out."""
        gradients = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        return {name: value for name in self.taps for value in [self.seen.get(name, gradients.get(name))] if value is not None}
