"""The weights that a captured program reads, as far as the live model still has them; and adapters that count for the length of a test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn as nn

from fxopt.ir.program import Program
from fxopt.runtime import adapted
from fxopt.runtime.binding import live_state, locate


def base_state(model: nn.Module, program: Program, original: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A value for every slot of a program as captured: `original`'s where it has one, else the live one without adapters; of a weight
    that is stored quantized, what its codes stand for."""
    found: dict[str, torch.Tensor] = {}
    for name in program.slots:
        if name in program.constants:
            continue
        if original is not None and name in original:
            found[name] = original[name].detach()
            continue
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        found[name] = adapted.base_of(owner, leaf).detach() if leaf in adapted.records(owner) else locate(model, name)[1][leaf].detach()
    return found


@contextlib.contextmanager
def counting_adapters(model: nn.Module, program: Program) -> Iterator[dict[str, torch.Tensor]]:
    """The live tensors of all slots that a program reads; inside, trained ones that a pass made and that are zero have random values."""
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    live = live_state(model, [name for name in program.slots if name in read and name not in program.constants])
    zeros = [name for name, value in live.items() if program.slots[name].made is not None and program.trainable(name) and not value.any()]
    with torch.no_grad():
        for name in zeros:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            live[name].copy_(0.1 * torch.randn(live[name].shape, generator=generator))
    try:
        yield live
    finally:
        with torch.no_grad():
            for name in zeros:
                live[name].zero_()
