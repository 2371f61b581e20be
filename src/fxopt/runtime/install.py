"""Putting the state that passes declared onto a live model, and values into its adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from fxopt.errors import DataError, LowerError
from fxopt.ir.facts import LowRank, Stored, Trained
from fxopt.ir.program import Program, Slot
from fxopt.kernels.formats import FORMATS
from fxopt.runtime import adapted
from fxopt.runtime.binding import locate
from fxopt.runtime.stored import StoredWeight


def install(model: nn.Module, program: Program) -> list[str]:
    """Give the model the state that a program's passes introduced. What exists already is kept. Returns the new names.

    A dense weight is freed as soon as its quantized form exists: the peak is one weight. Other state that is made from the
    weight (DoRA's magnitudes) is made from what the quantized form stands for.
    """
    pending: dict[str, list[Slot]] = {}
    for slot in program.slots.values():
        if slot.made is not None and not _exists(model, slot.name):
            pending.setdefault(slot.made.source or slot.name, []).append(slot)
    created: list[str] = []
    for source, slots in pending.items():
        parts = [slot for slot in slots if isinstance(slot.made.facts, Stored)]
        if parts:
            store_weight(model, parts[0].made.facts, list(_made(model, source, parts).values()))
        rest = [slot for slot in slots if not isinstance(slot.made.facts, Stored)]
        for slot, value in _made(model, source, rest).items():
            if not isinstance(slot.made.facts, LowRank | Trained):
                raise LowerError(f"{slot.made.by} made state of a kind that the runtime does not know", where=slot.name)
            _add_factor(model, slot, value, program.slots[slot.made.facts.target].aliases)
        created += [slot.name for slot in slots]
    for name in program.frozen:
        if _exists(model, name):
            _, store, leaf = locate(model, name)
            store[leaf].requires_grad_(False)
    return created


def _made(model: nn.Module, source: str, slots: list[Slot]) -> dict[Slot, torch.Tensor]:
    memo: dict[Any, Any] = {}
    with torch.no_grad():
        given = _base(model, source) if slots else None
        values = {slot: slot.made.value(given, memo) for slot in slots}
    for slot, value in values.items():
        if tuple(value.shape) != slot.shape or value.dtype != slot.dtype:
            raise LowerError(f"{slot.made.by} made {tuple(value.shape)} {value.dtype} for {slot.name}, which is {slot.shape} {slot.dtype}")
    return values


def _exists(model: nn.Module, name: str) -> bool:
    try:
        locate(model, name)
    except KeyError:
        return False
    return True


def _base(model: nn.Module, name: str) -> torch.Tensor | None:
    """A weight without adapters, dense; None if there is no such weight."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return None
    if leaf in owner._parameters or isinstance(owner._modules.get(leaf), StoredWeight):
        return adapted.base_of(owner, leaf).detach()
    return owner._buffers.get(leaf)


def _add_factor(model: nn.Module, slot: Slot, value: torch.Tensor, aliases: Sequence[str]) -> None:
    fact: LowRank | Trained = slot.made.facts
    factor = fact.factor if isinstance(fact, LowRank) else "whole"
    path, _, leaf = fact.target.rpartition(".")
    module = model.get_submodule(path)
    weight = adapted.record(module, leaf, fact.target)
    holder = adapted.holder_name(leaf, factor)
    if holder not in module._modules:
        module._modules[holder] = nn.ParameterDict()
    module._modules[holder][fact.adapter] = nn.Parameter(value, requires_grad=slot.requires_grad)  # type: ignore[index]
    if factor in ("a", "whole"):
        weight.adapters[fact.adapter] = fact
        weight.active = fact.adapter
    for alias in aliases:
        other, _, name = alias.rpartition(".")
        adapted.share(model.get_submodule(other), name, module, leaf)


def store_weight(model: nn.Module, stored: Stored, parts: Sequence[torch.Tensor]) -> None:
    """Replace a weight by its stored form; the dense one is freed here if nothing else holds it."""
    path, _, leaf = stored.target.rpartition(".")
    module = model.get_submodule(path)
    weight = adapted.record(module, leaf, stored.target)
    weight.position = list(module._parameters).index(leaf)
    FORMATS[stored.format].check(parts, stored.shape)
    del module._parameters[leaf]
    module._modules[leaf] = weight.holder = StoredWeight(parts, stored)
    weight.stored = stored


def load_factors(model: nn.Module, given: Mapping[str, tuple[Mapping[str, torch.Tensor], float | None]], adapter: str = "default") -> None:
    """Copy values into the adapters of the named weights, all or nothing.

    Args:
        given: for each weight's name its factors ("a", "b", perhaps "magnitude") and scale; or "whole" and None, for a parameter that
            the adapter trains whole.

    Raises:
        DataError: if the weights are not exactly the model's adapted ones, or a factor, a shape or a scale differs.
    """
    mine = {weight.name: (module, leaf, weight) for module, leaf, weight in adapted.weights_of(model) if adapter in weight.adapters}
    extra, missing = sorted(given.keys() - mine.keys()), sorted(mine.keys() - given.keys())
    if extra or missing:
        raise DataError(f"the adapter's weights are not the model's: {len(extra)} unknown, {len(missing)} missing",
                        where=", ".join((extra + missing)[:4]), do="optimize the model with the adapter's own targets and modules_to_save")
    pairs = []
    for name, (parts, scale) in given.items():
        module, leaf, weight = mine[name]
        have, fact = adapted.factors(module, leaf, adapter), weight.adapters[adapter]
        if have.keys() != parts.keys():
            raise DataError(f"{name}: the adapter has {', '.join(sorted(parts))}, the model's has {', '.join(sorted(have))}",
                            do="optimize with the adapter's own variant (lora or dora), targets and modules_to_save")
        for factor, value in parts.items():
            if have[factor].shape != value.shape:
                rank = parts["a"].shape[-2 if fact.kind == "experts" else 0] if isinstance(fact, LowRank) else 0
                raise DataError(f"{name}: the adapter is {tuple(value.shape)}, the model's is {tuple(have[factor].shape)}",
                                do=f"optimize with lora(rank={rank})" if rank else "load it on the model that it was trained on")
            pairs.append((have[factor], value))
        if isinstance(fact, LowRank) and scale is not None and abs(scale - fact.scale) > _SAME_SCALE * max(abs(scale), 1.0):
            alpha = scale * (fact.rank**0.5 if fact.variant == "rslora" else fact.rank)
            raise DataError(f"{name}: the adapter was trained with the scale {scale:g}, the model has {fact.scale:g}",
                            do=f"optimize with lora(alpha={alpha:g}), or with the adapter's own variant (rslora divides by the root of the rank)")
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)


_SAME_SCALE = 1e-9
