"""Adapted weights on a live module: one meaning, whether a graph or the original Python code runs.

A weight with a low-rank adapter, or one kept in a quantized format, is a *getter* of its module under the weight's own
name: W' = dequantized(base) + scale * B A. The passes' ops are the algebraic rewrite of that. The base tensor stays in
the module's `_parameters` under its own name (or, quantized, in a child module of that name), so `state_dict` keeps the
original names, and quantized weights appear under bitsandbytes' keys.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from fxopt.errors import DataError, LowerError
from fxopt.ir.facts import LowRank, Stored
from fxopt.ir.program import Program, Slot
from fxopt.kernels import nf4
from fxopt.runtime.binding import locate, unbind

_STATE = "_fxopt_adapted"
_CLASSES: dict[tuple[type, tuple[str, ...]], type] = {}


@dataclass
class Weight:
    """What is known of one adapted weight of a module: its adapters, and its storage if it is quantized."""

    name: str
    adapters: dict[str, LowRank] = field(default_factory=dict)
    stored: Stored | None = None
    position: int = 0  # among the module's parameters, so that names keep their order
    enabled: bool = True
    dense: torch.Tensor | None = None  # kept only inside `dense_weights`


class NF4Weight(nn.Module):
    """The packed codes and scales of one NF4 weight. A child module with the weight's own name.

    Its entries in a state dict are bitsandbytes': `weight` (uint8 codes), `weight.absmax`, `weight.quant_map`,
    `weight.quant_state.bitsandbytes__nf4`.
    """

    def __init__(self, packed: torch.Tensor, absmax: torch.Tensor, stored: Stored) -> None:
        super().__init__()
        self.stored = stored
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)

    def dequantize(self) -> torch.Tensor:
        """The dense weight, in its original shape and dtype."""
        return torch.ops.fxopt.nf4_dequantize(self.packed, self.absmax, list(self.stored.shape), self.stored.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Weight:
        # codes and scales only move; a cast changes the dtype of the dense weight that they stand for
        probe = fn(torch.empty(0, dtype=self.stored.dtype, device=self.packed.device))
        device, self.stored = probe.device, dataclasses.replace(self.stored, dtype=probe.dtype)
        self.packed, self.absmax = self.packed.to(device), self.absmax.to(device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        base = prefix[:-1]
        state = nf4.quant_state_json(self.stored.shape, self.stored.dtype)
        levels = torch.as_tensor(nf4.LEVELS, dtype=torch.float32)
        for key, value in ((base, self.packed), (f"{base}.absmax", self.absmax), (f"{base}.quant_map", levels), (f"{base}.{nf4.KEY}", state)):
            destination[key] = value

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the module that owns the weight hands its keys over (see `Adapted`)."""

    def load(self, state: Mapping[str, torch.Tensor], key: str, missing: list[str], errors: list[str]) -> None:
        """Take codes and scales from a state dict with bitsandbytes' keys; `key` is the weight's own."""
        lacking = [name for name in (key, f"{key}.absmax") if name not in state]
        if lacking:
            missing.extend(lacking)
            return
        known = f"{key}.{nf4.KEY}"
        if known in state:
            found = nf4.parse_quant_state(state[known])
            if tuple(found.shape) != tuple(self.stored.shape):
                errors.append(f"{key}: the stored weight has the shape {tuple(found.shape)}, the model's is {self.stored.shape}")
                return
        for mine, name in ((self.packed, key), (self.absmax, f"{key}.absmax")):
            if mine.shape != state[name].shape or mine.dtype != state[name].dtype:
                errors.append(f"{name}: {tuple(state[name].shape)} {state[name].dtype} where {tuple(mine.shape)} {mine.dtype} is needed")
                return
        with torch.no_grad():
            self.packed.copy_(state[key])
            self.absmax.copy_(state[f"{key}.absmax"])


class Adapted:
    """Mixed into the class of a module that has adapted weights."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
                              unexpected_keys: list[str], error_msgs: list[str]) -> None:
        rest = dict(state_dict)
        for leaf, weight in self.__dict__[_STATE].items():
            if weight.stored is not None:
                key = f"{prefix}{leaf}"
                self._modules[leaf].load(state_dict, key, missing_keys, error_msgs)  # type: ignore[attr-defined]
                rest = {name: value for name, value in rest.items() if name != key and not name.startswith(f"{key}.")}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        return _rebuild, (kind.__mro__[2], tuple(self.__dict__[_STATE])), self.__dict__


def _rebuild(base: type, leaves: tuple[str, ...]) -> Any:
    kind = adapted_class(base, leaves)
    return kind.__new__(kind)


def adapted_class(base: type, leaves: tuple[str, ...]) -> type:
    """The subclass of `base` in which the named parameters are computed."""
    key = base, leaves
    if key not in _CLASSES:
        getters = {leaf: property(_getter(leaf)) for leaf in leaves}
        _CLASSES[key] = type(base.__name__, (Adapted, base), {**getters, "__module__": base.__module__, "__qualname__": base.__qualname__})
    return _CLASSES[key]


def _getter(leaf: str) -> Any:
    def get(self: nn.Module) -> torch.Tensor:
        return value_of(self, leaf)

    return get


def value_of(module: nn.Module, leaf: str) -> torch.Tensor:
    """The adapted weight: dequantized base plus the enabled adapters."""
    weight: Weight = module.__dict__[_STATE][leaf]
    if weight.dense is not None:
        return weight.dense
    base = base_of(module, leaf)
    if not weight.enabled:
        return base
    for adapter, fact in weight.adapters.items():
        a, b = factors(module, leaf, adapter)
        delta = (b @ a) * fact.scale
        base = base + (delta.t() if fact.transposed else delta).to(base.dtype)
    return base


def base_of(module: nn.Module, leaf: str) -> torch.Tensor:
    """The weight without its adapters."""
    kept = module._parameters.get(leaf)
    return kept if kept is not None else module._modules[leaf].dequantize()  # type: ignore[union-attr,operator]


def factors(module: nn.Module, leaf: str, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """(A, B) of an adapter."""
    prefix = "" if leaf == "weight" else f"{leaf}_"
    return module._modules[f"{prefix}lora_A"]._parameters[adapter], module._modules[f"{prefix}lora_B"]._parameters[adapter]  # type: ignore[union-attr,return-value]


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Weight]]]:
    """(path, module, its adapted weights) for every module that has some."""
    for path, module in model.named_modules():
        if _STATE in module.__dict__:
            yield path, module, module.__dict__[_STATE]


# -- installing ----------------------------------------------------------------------------------------------------------


def install(model: nn.Module, program: Program) -> list[str]:
    """Give the model the state that a program's passes introduced. What exists already is kept. Returns the new names.

    A dense weight is freed as soon as its quantized form exists: the peak is one weight.
    """
    pending: dict[str, list[Slot]] = {}
    for slot in program.slots.values():
        if slot.made is not None and not _exists(model, slot.name):
            pending.setdefault(slot.made.source or slot.name, []).append(slot)
    created: list[str] = []
    for source, slots in pending.items():
        memo: dict[Any, Any] = {}
        with torch.no_grad():
            values = {slot.name: slot.made.value(_source(model, slot), memo) for slot in slots}
        memo.clear()
        for slot in slots:
            made = values[slot.name]
            if tuple(made.shape) != slot.shape or made.dtype != slot.dtype:
                raise LowerError(f"{slot.made.by} made {tuple(made.shape)} {made.dtype} for {slot.name}, which is {slot.shape} {slot.dtype}")
            if isinstance(slot.made.facts, LowRank):
                _add_factor(model, slot, made)
            elif not isinstance(slot.made.facts, Stored):
                raise LowerError(f"{slot.made.by} made state of a kind that the runtime does not know", where=slot.name)
        stored = {slot.made.facts.part: slot for slot in slots if isinstance(slot.made.facts, Stored)}
        if stored:
            _replace_weight(model, stored["packed"].made.facts, values[stored["packed"].name], values[stored["absmax"].name])
        created += [slot.name for slot in slots]
    for name in program.frozen:
        if _exists(model, name):
            _, store, leaf = locate(model, name)
            store[leaf].requires_grad_(False)
    return created


def _exists(model: nn.Module, name: str) -> bool:
    try:
        locate(model, name)
    except KeyError:
        return False
    return True


def _source(model: nn.Module, slot: Slot) -> torch.Tensor | None:
    if slot.made is None or slot.made.source is None or not _exists(model, slot.made.source):
        return None
    _, store, leaf = locate(model, slot.made.source)
    return store[leaf].detach()


def _weight(model: nn.Module, target: str) -> tuple[nn.Module, str, Weight]:
    """The record of an adapted weight; made, and the module's class extended, if there is none yet."""
    path, _, leaf = target.rpartition(".")
    module = model.get_submodule(path)
    weights: dict[str, Weight] = module.__dict__.setdefault(_STATE, {})
    if leaf not in weights:
        base = type(module).__mro__[2] if isinstance(module, Adapted) else type(module)
        weights[leaf] = Weight(target)
        module.__class__ = adapted_class(base, tuple(weights))
    return module, leaf, weights[leaf]


def _add_factor(model: nn.Module, slot: Slot, value: torch.Tensor) -> None:
    fact: LowRank = slot.made.facts  # type: ignore[union-attr,assignment]
    module, leaf, weight = _weight(model, fact.target)
    holder_path = slot.name.rpartition(".")[0].rpartition(".")[2]
    if holder_path not in module._modules:
        module._modules[holder_path] = nn.ParameterDict()
    module._modules[holder_path][fact.adapter] = nn.Parameter(value, requires_grad=slot.requires_grad)  # type: ignore[index]
    weight.adapters[fact.adapter] = fact


def _replace_weight(model: nn.Module, stored: Stored, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    module, leaf, weight = _weight(model, stored.target)
    weight.position = list(module._parameters).index(leaf)
    del module._parameters[leaf]
    module._modules[leaf] = NF4Weight(packed, absmax, stored)
    weight.stored = stored


def _put(module: nn.Module, leaf: str, parameter: nn.Parameter, position: int) -> None:
    """Set a parameter at its place in the order of the module's parameters."""
    items = [(name, kept) for name, kept in module._parameters.items() if name != leaf]
    module._parameters.clear()
    module._parameters.update([*items[:position], (leaf, parameter), *items[position:]])


# -- looking from outside ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def skeleton(model: nn.Module) -> Iterator[None]:
    """The model as it was before anything was installed, for capture: original classes, and for a quantized weight a
    parameter with shape, dtype and device but no memory."""
    undo: list[tuple[nn.Module, type, dict[str, Any], dict[str, Any]]] = []
    try:
        for _, module, weights in list(adapted_modules(model)):
            undo.append((module, type(module), dict(module._parameters), dict(module._modules)))
            for leaf, weight in weights.items():
                if weight.stored is not None:
                    device = module._modules[leaf].packed.device  # type: ignore[union-attr]
                    empty = torch.empty(weight.stored.shape, dtype=module._modules[leaf].stored.dtype, device=device)  # type: ignore[union-attr]
                    empty.untyped_storage().resize_(0)
                    del module._modules[leaf]
                    _put(module, leaf, nn.Parameter(empty, requires_grad=False), weight.position)
                prefix = "" if leaf == "weight" else f"{leaf}_"
                for factor in ("A", "B"):
                    module._modules.pop(f"{prefix}lora_{factor}", None)
            module.__class__ = type(module).__mro__[2]
        yield
    finally:
        for module, kind, parameters, modules in undo:
            module.__class__ = kind
            module._parameters.clear()
            module._parameters.update(parameters)
            module._modules.clear()
            module._modules.update(modules)


@contextlib.contextmanager
def dense_weights(model: nn.Module) -> Iterator[None]:
    """Compute every adapted weight once and keep it dense, for many calls of the original code (generation).

    Memory: one dense copy of all adapted weights until the block ends. No gradients.
    """
    try:
        with torch.no_grad():
            for _, module, weights in adapted_modules(model):
                for leaf, weight in weights.items():
                    weight.dense = value_of(module, leaf).detach()
        yield
    finally:
        for _, module, weights in adapted_modules(model):
            for weight in weights.values():
                weight.dense = None


def merged(model: nn.Module) -> nn.Module:
    """A copy of the model in which every adapted weight is an ordinary dense parameter, of the original classes."""
    new = copy.deepcopy(model)
    unbind(new)
    for _, module, weights in list(adapted_modules(new)):
        values = {}
        with torch.no_grad():
            for leaf in weights:
                values[leaf] = value_of(module, leaf).detach().clone()
        for leaf, value in values.items():
            module._modules.pop(leaf, None)
            prefix = "" if leaf == "weight" else f"{leaf}_"
            for factor in ("A", "B"):
                module._modules.pop(f"{prefix}lora_{factor}", None)
            _put(module, leaf, nn.Parameter(value, requires_grad=False), weights[leaf].position)
        del module.__dict__[_STATE]
        module.__class__ = type(module).__mro__[2]
    return new


def load_factors(model: nn.Module, factors_of: Mapping[str, tuple[torch.Tensor, torch.Tensor, float]], adapter: str = "default") -> None:
    """Copy (A, B, alpha) into the adapters of the named weights, all or nothing.

    Raises:
        DataError: if the weights are not exactly the model's adapted ones, or a shape or scale differs.
    """
    mine = {weight.name: (module, leaf, weight) for _, module, weights in adapted_modules(model) for leaf, weight in weights.items()
            if adapter in weight.adapters}
    extra, missing = sorted(factors_of.keys() - mine.keys()), sorted(mine.keys() - factors_of.keys())
    if extra or missing:
        raise DataError(f"the adapter's weights are not the model's: {len(extra)} unknown, {len(missing)} missing",
                        where=", ".join((extra + missing)[:4]), do="optimize the model with the adapter's own targets")
    for name, (a, b, alpha) in factors_of.items():
        module, leaf, weight = mine[name]
        fact = weight.adapters[adapter]
        for have, given in zip(factors(module, leaf, adapter), (a, b)):
            if have.shape != given.shape:
                raise DataError(f"{name}: the adapter is {tuple(given.shape)}, the model's is {tuple(have.shape)}", do=f"optimize with lora(rank={a.shape[0]})")
        if abs(alpha - fact.alpha) > 1e-9 * max(abs(alpha), 1.0):
            raise DataError(f"{name}: the adapter was trained with alpha {alpha}, the model has alpha {fact.alpha}", do=f"optimize with lora(alpha={alpha})")
    with torch.no_grad():
        for name, (a, b, _) in factors_of.items():
            module, leaf, _weight_ = mine[name]
            for have, given in zip(factors(module, leaf, adapter), (a, b)):
                have.copy_(given)
