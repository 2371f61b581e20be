"""Adapted weights on a live module: one meaning, whether a graph or the original Python code runs.

A weight with a low-rank adapter, or one kept in a quantized format, is a *getter* of its module under the weight's own
name: W' = dequantized(base) + scale * B A. The passes' ops are the algebraic rewrite of that. The base tensor stays in
the module's `_parameters` under its own name (or, quantized, in a child module of that name), so `state_dict` keeps the
original names, and quantized weights appear under the keys of their format's files. A parameter that an adapter trains
whole is the adapter's copy; the original stays beside it. Tied weights share one record and one set of factors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from fxopt.errors import FxoptError
from fxopt.ir.facts import Installed, LowRank, Stored, Trained
from fxopt.runtime.computed import Computed
from fxopt.runtime.recompute import noted
from fxopt.runtime.stored import StoredWeight

_STATE, _LOADING = "_fxopt_adapted", "_fxopt_loading"
_CLASSES: dict[tuple[type, tuple[str, ...]], type] = {}
FACTORS = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector", "whole": "modules_to_save"}


@dataclass
class Weight:
    """What is known of one adapted weight of a module: its adapters, and its storage if it is quantized.

    Attributes:
        name: of its slot. Tied weights have one record, under the first of their names.
        adapters: by name; the fact of factor A stands for the whole adapter.
        active: the adapter that the weight has now; None: the base alone.
    """

    name: str
    adapters: dict[str, LowRank | Trained] = field(default_factory=dict)
    stored: Stored | None = None
    holder: StoredWeight | None = None  # of a stored weight
    position: int = 0  # among the module's parameters, so that names keep their order
    active: str | None = None
    dense: torch.Tensor | None = None  # kept only inside `dense_weights`


class Adapted:
    """Mixed into the class of a module that has adapted weights."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
                              unexpected_keys: list[str], error_msgs: list[str]) -> None:
        rest = dict(state_dict)
        for leaf, weight in self.__dict__[_STATE].items():
            if weight.stored is not None:
                key, holder = f"{prefix}{leaf}", self._modules[leaf]  # type: ignore[attr-defined]
                holder.load(state_dict, key, missing_keys, error_msgs)
                for name in holder.keys(key):
                    rest.pop(name, None)
        self.__dict__[_LOADING] = True
        try:
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)  # type: ignore[misc]
        finally:
            del self.__dict__[_LOADING]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module, but an adapted weight is computed, and cannot be assigned (`load_state_dict(assign=True)` gives it
        another base).

        Raises:
            FxoptError: `name` is an adapted weight's.
        """
        weight: Weight | None = self.__dict__.get(_STATE, {}).get(name)
        if weight is None or _LOADING in self.__dict__:
            super().register_parameter(name, param)  # type: ignore[misc]
            return
        if weight.holder is not None:
            self._modules[name] = weight.holder  # type: ignore[attr-defined]  # nn.Module has taken it out already
        raise FxoptError(f"{weight.name} is an adapted weight, computed from its base and adapter: it cannot be assigned",
                         do="write into the adapter's parameters, or into the base with `load_state_dict`; or `opt.merge()`, and assign in what it gives")

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
        value = value_of(self, leaf)
        return value if isinstance(value, nn.Parameter) or self.__dict__[_STATE][leaf].dense is not None else Computed.of(value)

    return get


# -- values --------------------------------------------------------------------------------------------------------------


def value_of(module: nn.Module, leaf: str) -> torch.Tensor:
    """The adapted weight: dequantized base plus the active adapter. (Dropout acts on activations and is not in here.)"""
    weight: Weight = module.__dict__[_STATE][leaf]
    if weight.dense is not None:
        return weight.dense
    fact = weight.adapters.get(weight.active or "")
    if isinstance(fact, Trained):
        return factors(module, leaf, fact.adapter)["whole"]
    base = base_of(module, leaf)
    if fact is not None:
        base = with_adapter(base, module, leaf, fact.adapter)
    return base if isinstance(base, nn.Parameter) else noted(base, functools.partial(value_of, module, leaf))


def with_adapter(base: torch.Tensor, module: nn.Module, leaf: str, adapter: str) -> torch.Tensor:
    """A base weight with one of the module's adapters added, in the base's dtype."""
    fact = weight_of(module, leaf).adapters[adapter]
    parts = factors(module, leaf, adapter)
    if isinstance(fact, Trained):
        return parts["whole"].to(base.dtype)
    change = delta(fact, parts["a"], parts["b"])
    if fact.variant != "dora":
        return base + change.to(base.dtype)
    whole = base.to(change.dtype) + change
    rows = whole.t() if fact.transposed else whole.reshape(whole.shape[0], -1)
    gain = parts["magnitude"].reshape(-1) / rows.detach().norm(dim=1)  # the norm is a constant to the gradient
    return (whole * (gain if fact.transposed else gain.view(-1, *[1] * (whole.dim() - 1)))).to(base.dtype)


def delta(fact: LowRank, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """scale * B A in the weight's own layout and the factors' dtype; their shapes are by kind, see `LowRank`."""
    if fact.kind == "conv":
        product = (b.flatten(1) @ a.flatten(1)).view(b.shape[0], *a.shape[1:])
    else:
        product = b @ a  # of a stack: matrix by matrix
    product = product * fact.scale
    return product.mT if fact.transposed else product


def base_of(module: nn.Module, leaf: str) -> torch.Tensor:
    """The weight without its adapters."""
    kept = module._parameters.get(leaf)
    return kept if kept is not None else module._modules[leaf].dequantize()  # type: ignore[union-attr,operator]


def holder_name(leaf: str, factor: str) -> str:
    """The child of the weight's module that holds one factor of all its adapters."""
    return f"{'' if leaf == 'weight' else leaf + '_'}{FACTORS[factor]}"


def factors(module: nn.Module, leaf: str, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of an adapter by factor: "a", "b", and for DoRA "magnitude"."""
    holders = {factor: module._modules.get(holder_name(leaf, factor)) for factor in FACTORS}
    return {factor: holder._parameters[adapter] for factor, holder in holders.items() if holder is not None and adapter in holder._parameters}  # type: ignore[misc]


def weight_of(module: nn.Module, leaf: str) -> Weight:
    """The record of an adapted weight."""
    return module.__dict__[_STATE][leaf]


def records(module: nn.Module) -> dict[str, Weight]:
    """The records of a module's adapted weights."""
    return module.__dict__.get(_STATE, {})


# -- finding and switching -----------------------------------------------------------------------------------------------


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Weight]]]:
    """(path, module, its adapted weights) for every module that has some."""
    for path, module in model.named_modules():
        if _STATE in module.__dict__:
            yield path, module, module.__dict__[_STATE]


def weights_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, Weight]]:
    """(module, leaf, record) of every adapted weight; of tied ones, each place."""
    for _, module, weights in adapted_modules(model):
        for leaf, weight in weights.items():
            yield module, leaf, weight


def installed(model: nn.Module) -> Installed | None:
    """What a model carries already, for passes; None for a plain model."""
    found = list(weights_of(model))
    if not found:
        return None
    names = frozenset(name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    adapters: dict[str, dict[str, str]] = {}
    transposed = set()
    for *_, weight in found:
        for name, fact in weight.adapters.items():
            adapters.setdefault(name, {})[weight.name] = "whole" if isinstance(fact, Trained) else fact.kind
            if isinstance(fact, LowRank) and fact.transposed:
                transposed.add((name, weight.name))
    return Installed(names, {w.name: w.stored.format for *_, w in found if w.stored is not None}, adapters, frozenset(transposed))


def activate(model: nn.Module, adapter: str | None) -> None:
    """Give every weight this adapter, or none. Only the active adapter's factors take gradients."""
    for module, leaf, weight in weights_of(model):
        weight.active = adapter
        for name in weight.adapters:
            for parameter in factors(module, leaf, name).values():
                parameter.requires_grad_(name == adapter)
                if name != adapter:
                    parameter.grad = None


# -- looking from outside ------------------------------------------------------------------------------------------------


def record(module: nn.Module, leaf: str, name: str) -> Weight:
    """The record of an adapted weight; made, and the module's class extended, if there is none yet."""
    weights: dict[str, Weight] = module.__dict__.setdefault(_STATE, {})
    if leaf not in weights:
        base = type(module).__mro__[2] if isinstance(module, Adapted) else type(module)
        weights[leaf] = Weight(name)
        module.__class__ = adapted_class(base, tuple(weights))
    return weights[leaf]


def share(module: nn.Module, leaf: str, owner: nn.Module, of: str) -> None:
    """Give a weight that is tied to an adapted one the same record and the same factors."""
    weights: dict[str, Weight] = module.__dict__.setdefault(_STATE, {})
    if leaf not in weights:
        base = type(module).__mro__[2] if isinstance(module, Adapted) else type(module)
        weights[leaf] = weight_of(owner, of)
        module.__class__ = adapted_class(base, tuple(weights))
    for factor in FACTORS:
        holder = owner._modules.get(holder_name(of, factor))
        if holder is not None:
            module._modules[holder_name(leaf, factor)] = holder


def put(module: nn.Module, leaf: str, parameter: nn.Parameter, position: int) -> None:
    """Set a parameter at its place in the order of the module's parameters."""
    items = [(name, kept) for name, kept in module._parameters.items() if name != leaf]
    module._parameters.clear()
    module._parameters.update([*items[:position], (leaf, parameter), *items[position:]])


def _strip(module: nn.Module, leaf: str) -> None:
    """Take the children of an adapted weight away: factors and stored parts."""
    if leaf in module._modules:
        del module._modules[leaf]
    for factor in FACTORS:
        module._modules.pop(holder_name(leaf, factor), None)


def strip(module: nn.Module) -> None:
    """Make a module an ordinary one of its original class: adapters and stored weights go, dense base weights stay."""
    for leaf in module.__dict__.pop(_STATE):
        _strip(module, leaf)
    module.__class__ = type(module).__mro__[2]


@contextlib.contextmanager
def skeleton(model: nn.Module) -> Iterator[None]:
    """The model as it was before anything was installed, for capture: original classes, and for a quantized weight a
    parameter with shape, dtype and device but no memory."""
    undo: list[tuple[nn.Module, type, dict[str, Any], dict[str, Any]]] = []
    try:
        for _, module, weights in list(adapted_modules(model)):
            undo.append((module, type(module), dict(module._parameters), dict(module._modules)))
            for leaf, weight in weights.items():
                holder = module._modules.get(leaf)
                _strip(module, leaf)
                if isinstance(holder, StoredWeight):
                    empty = torch.empty(holder.stored.shape, dtype=holder.stored.dtype, device=holder.parts[0].device)
                    empty.untyped_storage().resize_(0)
                    put(module, leaf, nn.Parameter(empty, requires_grad=False), weight.position)
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

    Memory: one dense copy of all adapted weights until the block ends. No gradients; what is written into the copies is lost with
    them.
    """
    try:
        with torch.no_grad():
            for module, leaf, weight in weights_of(model):
                weight.dense = value_of(module, leaf).detach()
        yield
    finally:
        for *_, weight in weights_of(model):
            weight.dense = None


@contextlib.contextmanager
def using(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Every weight has this adapter, or (None) is its base alone, bit for bit; gradients' marks stay as they are."""
    before = [(weight, weight.active) for *_, weight in weights_of(model)]
    try:
        for weight, _ in before:
            weight.active = adapter
        yield
    finally:
        for weight, active in before:
            weight.active = active


@contextlib.contextmanager
def only(model: nn.Module, names: Container[str]) -> Iterator[None]:
    """Within, a weight whose adapter adds nothing yet (B is zero) is its base, unless one of the adapter's factors is named: the same
    function, and no dense weight to compute."""
    named = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    aside: list[tuple[Weight, str]] = []
    for module, leaf, weight in weights_of(model):
        parts = factors(module, leaf, weight.active) if weight.active is not None else {}
        if parts.keys() == {"a", "b"} and not parts["b"].any() and not named & {id(part) for part in parts.values()}:
            aside.append((weight, str(weight.active)))
    try:
        for weight, _ in aside:
            weight.active = None
        yield
    finally:
        for weight, adapter in aside:
            weight.active = adapter


def pulled_back(model: nn.Module, gradients: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None] | None:
    """Gradients of a model that has been given adapters since, from those that it had before: of a factor by the chain rule from its
    weight's, of what is trained as it was the same. What has none here is left out.

    Returns:
        By name; None if an adapter changes its weight's value already, or a weight is stored in another form.
    """
    known: dict[int, torch.Tensor | None] = {}
    for module, leaf, weight in weights_of(model):
        fact = weight.adapters.get(weight.active or "")
        if weight.stored is not None:
            return None
        if fact is None:
            continue
        parts, grad = factors(module, leaf, fact.adapter), gradients.get(weight.name)
        if isinstance(fact, Trained):
            if not torch.equal(parts["whole"], base_of(module, leaf)):
                return None
            pulled = [grad]
        elif parts.keys() != {"a", "b"} or parts["a"].any() and parts["b"].any():  # an embedding begins with A = 0
            return None
        elif grad is None:
            pulled = [None, None]
        else:
            with torch.enable_grad():
                pulled = list(torch.autograd.grad(delta(fact, parts["a"], parts["b"]).to(grad.dtype), list(parts.values()), grad))
        if weight.name in gradients:
            known.update(zip(map(id, parts.values()), pulled))
    named = [(name, id(parameter)) for name, parameter in model.named_parameters() if parameter.requires_grad]
    mine = {name: known[place] for name, place in named if place in known}
    plain = {name for name, _ in named}
    return mine | {name: grad for name, grad in gradients.items() if name not in mine and (name in plain or name.startswith("input "))}
