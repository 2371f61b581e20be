"""A stable hash of a Program: equal for the same operations on the same state, whatever the nodes are called and wherever the source lies."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.program import Program
from fxopt.ir.text import Symbols


def digest(program: Program) -> str:
    """SHA-256 of the program's canonical text, in hexadecimal. The same in every process and on every machine."""
    return hashlib.sha256("\n".join(lines(program)).encode()).hexdigest()


def lines(program: Program) -> Iterator[str]:
    """The canonical text: nodes are numbered in order, symbolic sizes in order of appearance; slots with what takes a gradient,
    constants with their values, facts and assumptions."""
    symbols = Symbols()
    names = {node: f"%{i}" for i, node in enumerate(program.graph.nodes)}
    inputs = {node.name: names[node] for node in program.graph.nodes if node.op == "placeholder"}
    yield f"training={program.training} grad={program.grad}"
    for node in program.graph.nodes:
        target = "input" if node.op == "placeholder" else _state(program, str(node.target)) if node.op == "get_attr" else str(node.target)
        yield symbols.rename(f"{names[node]} = {node.op} {target} {_said(node.args, names)} {_said(node.kwargs, names)}: {_kind(meta.value(node))}")
    for kind, found in (("fact", program.facts), ("assumes", program.assumptions)):
        # a node or input that a fact names goes by its number
        known = {node.name: number for node, number in names.items()} | inputs
        yield from sorted(symbols.rename(f"{kind} {_said(each, names, known)}") for each in found)
    yield f"frozen {sorted(program.frozen)}"


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors by name: shapes, dtypes and every byte."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(f"{name} {_bytes(state[name])}\n".encode())
    return found.hexdigest()


def _bytes(tensor: torch.Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else b""
    return f"{str(plain.dtype)} {list(plain.shape)} {hashlib.sha256(data).hexdigest()}"


def _state(program: Program, name: str) -> str:
    slot = program.slots.get(name)
    if slot is not None and slot.kind != "constant":
        return f"{slot.kind} {name}{' trainable' if program.trainable(name) else ''}"
    value = program.constants.get(name)
    if isinstance(value, torch.Tensor):
        return f"constant {_bytes(value)}"
    return f"constant {type(value).__name__}"


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{meta.describe(value)} on {value.device.type}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_kind, value))})"
    return meta.describe(value)


def _said(value: Any, names: Mapping[fx.Node, str], known: Mapping[str, str] | None = None) -> str:
    """A value in an order that does not depend on hashes."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, str):
        return repr((known or {}).get(value, value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_said(each, names, known) for each in value)}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_said(each, names, known) for each in value))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_said(k, names, known)}: {_said(v, names, known)}' for k, v in value.items()))}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({', '.join(f'{f.name}={_said(getattr(value, f.name), names, known)}' for f in dataclasses.fields(value))})"
    if isinstance(value, slice):
        return f"slice({', '.join(_said(each, names, known) for each in (value.start, value.stop, value.step))})"
    return str(value)
