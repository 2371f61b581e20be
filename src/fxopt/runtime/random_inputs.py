"""Inputs to compare two models on, when nobody gives any: like the last call's, with random token ids."""

from __future__ import annotations

import torch

from fxopt.ir.capture import Call
from fxopt.ir.program import Program

aten = torch.ops.aten
SAMPLES = 2
# What an index may pass through between the call and the embedding that reads it.
_SAME = {aten.view.default, aten.reshape.default, aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default,
         aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.detach.default, aten.alias.default}


def token_ids(program: Program) -> tuple[int, int] | None:
    """(position among the call's tensors, rows of the table) of the input that indexes the largest embedding; None if none does."""
    found: list[tuple[int, int]] = []
    inputs = program.placeholders
    for node in program.nodes:
        if node.op == "call_function" and node.target is aten.embedding.default:
            table, index = node.args[:2]
            while index.op == "call_function" and index.target in _SAME:
                index = index.args[0]
            if index.op == "placeholder":
                found.append((int(table.meta["val"].shape[0]), inputs.index(index)))
    rows, position = max(found, default=(0, 0))
    return (position, rows) if found else None


def drawn(program: Program, last: Call, seed: int = 0) -> tuple[Call, str]:
    """A call like `last` and what to call its inputs: the first samples of it, with random token ids if the program takes ids.

    Args:
        program: as captured, before any pass, from a call of the same kind.
    """
    tensors = list(last.tensors)
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(sizes) == 1 and max(sizes) > SAMPLES:
        tensors = [t[:SAMPLES] for t in tensors]
    ids = token_ids(program)
    if ids is not None:
        position, rows = ids
        given = tensors[position]
        generator = torch.Generator().manual_seed(seed)
        tensors[position] = torch.randint(0, rows, given.shape, generator=generator).to(given.device, given.dtype)
    return Call(last.spec, last.leaves, tuple(tensors)), "the last call" if ids is None else "random"
