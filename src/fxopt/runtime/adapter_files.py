"""Between the adapters on a live model and PEFT's files: which tensor of the one is which of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from fxopt.errors import DataError
from fxopt.ir.facts import LowRank, Trained
from fxopt.runtime import adapted, install, store
from fxopt.runtime.store import Adapter, Contents


def place(folder: str | Path, adapter: str) -> Path:
    """Where PEFT keeps an adapter of this name: in the folder itself the default one, else in a folder of its name."""
    return Path(folder) if adapter == "default" else Path(folder) / adapter


def save(model: nn.Module, adapter: str | None, folder: str | Path, base_model: str | None = None) -> Path:
    """Write an adapter's PEFT files. Returns the folder that they lie in.

    Raises:
        DataError: the model has no such adapter, or one that PEFT's files cannot hold.
    """
    found: list[Adapter] = []
    saved: dict[str, torch.Tensor] = {}
    dropout, tied, seen = 0.0, False, set()
    for path, module, weights in adapted.adapted_modules(model):
        order = list(module._parameters)
        for leaf in sorted(weights, key=lambda leaf: order.index(leaf) if leaf in order else len(order)):
            fact = weights[leaf].adapters.get(adapter or "")
            if fact is None:
                continue
            parts = {name: part.detach() for name, part in adapted.factors(module, leaf, fact.adapter).items()}
            if isinstance(fact, Trained):
                saved[f"{path}.{leaf}"] = parts["whole"]
                saved |= {f"{path}.{name}": value for name, value in _buffers(module).items()}
            else:
                found.append(_to_file(module, path, leaf, fact, parts))
                dropout = max(dropout, fact.dropout)
            tied = tied or fact.target in seen
            seen.add(fact.target)
    if not found and not saved:
        raise DataError("the model has no adapters to save", do="optimize with the lora pass, and call the model once")
    whole = {name.rpartition(".")[0] for name in saved}
    for name, _ in model.named_parameters():
        owner = name.rpartition(".")[0]
        if name not in saved and owner in whole and not any(part in name for part in ("lora_", "modules_to_save")):
            raise DataError(f"{name} is not trained, but its module is one of modules_to_save: PEFT saves modules whole", do="name the module there")
    plain = [adapter_ for adapter_ in found if not adapter_.by_parameter]
    modules = [name for name, module in model.named_modules(remove_duplicate=False) if not isinstance(module, nn.ParameterDict)]
    return store.write_adapters(place(folder, adapter or ""), found, base_model=base_model, modules=modules, saved=saved, tied=tied,
                                dropout=dropout if plain else 0.0)


def load(model: nn.Module, adapter: str, folder: str | Path) -> None:
    """Read PEFT files into an adapter, all or nothing.

    Args:
        folder: where the files lie, or (for an adapter that is not called `default`) the folder above, as PEFT writes it.

    Raises:
        DataError: the files are malformed, or the adapter's targets, shapes or scales are not the model's.
    """
    inner = place(folder, adapter)
    where = inner if (inner / store.CONFIG_FILE).exists() else Path(folder)

    def shapes(path: str) -> Mapping[str, tuple[int, ...]]:
        module = _module(model, path)
        return {} if module is None else {leaf: tuple(value.shape) for leaf, value in module._parameters.items() if value is not None}

    contents = store.read(where, shapes)
    _check_base(model, contents, str(where))
    given: dict[str, tuple[dict[str, torch.Tensor], float | None]] = {}
    for item in contents.adapters:
        name, parts = _from_file(model, item)
        _add(given, name, parts, item.scale, item.key)
    for name, value in contents.saved.items():
        path, _, leaf = name.rpartition(".")
        module = _module(model, path)
        weight = adapted.records(module).get(leaf) if module is not None else None
        if weight is not None:
            _add(given, weight.name, {"whole": value}, None, name)
        elif module is not None and leaf in _buffers(module):
            _check_equal(module._buffers[leaf], value, name, str(where))
        else:
            given[name] = ({"whole": value}, None)  # which the model does not have: said with the others
    install.load_factors(model, given, adapter)


def _add(given: dict[str, Any], name: str, parts: dict[str, torch.Tensor], scale: float | None, where: str) -> None:
    known = given.setdefault(name, (parts, scale))
    same = known[0].keys() == parts.keys() and all(known[0][part].shape == value.shape and torch.equal(known[0][part], value) for part, value in parts.items())
    if not same or known[1] != scale:
        raise DataError(f"{name} is tied, and the file has two adapters for it that differ", where=where, do="untie the two weights, or train one adapter for both")


# -- shapes and orders -----------------------------------------------------------------------------------------------------


def _to_file(module: nn.Module, path: str, leaf: str, fact: LowRank, parts: Mapping[str, torch.Tensor]) -> Adapter:
    a, b, kind = parts["a"], parts["b"], fact.kind
    if kind in ("embedding", "linear") and leaf == "weight":
        if kind == "embedding" and not isinstance(module, nn.Embedding):  # a head that is tied to its embedding
            a, b, kind = b.t(), a.t(), "linear"
        transposed = fact.transposed and fact.kind == "linear"
    elif kind == "conv":
        transposed = False
        dilated = any(size != 1 for size in _sizes(getattr(module, "dilation", 1)))
        if dilated or getattr(module, "padding_mode", "zeros") != "zeros":
            raise DataError(f"{path}: PEFT's adapters of convolutions have no dilation and pad with zeros", do="`opt.merge()` gives ordinary weights")
    else:  # what PEFT calls a target parameter
        if not path:
            raise DataError(f"{fact.target}: PEFT's files hold adapters of parameters of submodules only")
        kind, transposed = "experts" if a.dim() == 3 else "linear", False
        if fact.transposed != _reads_transposed(module, a.dim()):
            a, b = b.mT, a.mT
    return Adapter(path, a, b, fact.alpha, rslora=fact.variant == "rslora", fan_in_fan_out=transposed, kind=kind, parameter=leaf,
                   magnitude=parts.get("magnitude"))


def _from_file(model: nn.Module, item: Adapter) -> tuple[str, dict[str, torch.Tensor]]:
    """(slot of the weight, its factors by part) of an adapter in a file."""
    module = _module(model, item.path)
    weight = adapted.records(module).get(item.parameter) if module is not None else None
    parts = {"a": item.a, "b": item.b} | ({} if item.magnitude is None else {"magnitude": item.magnitude})
    fact = next(iter(weight.adapters.values()), None) if weight is not None else None
    if not isinstance(fact, LowRank):
        return f"{item.path}.{item.parameter}", parts
    turned = item.by_parameter and fact.transposed != _reads_transposed(module, item.a.dim())
    if turned or fact.kind == "embedding" and item.kind == "linear":
        parts |= {"a": item.b.mT, "b": item.a.mT}
    return weight.name, parts


def _reads_transposed(module: nn.Module, dims: int) -> bool:
    """Whether PEFT adds the transpose of B A to a parameter: it asks the module, where we look at what reads the parameter."""
    return dims == 3 and bool(getattr(module, "is_transposed", False))


def _sizes(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


# -- the model -------------------------------------------------------------------------------------------------------------


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a state dict has."""
    return {name: value for name, value in module._buffers.items() if value is not None and name not in module._non_persistent_buffers_set}


def _check_base(model: nn.Module, contents: Contents, where: str) -> None:
    """Raise if the file's own copy of a base weight is not the model's."""
    for name, value in contents.base.items():
        path, _, leaf = name.rpartition(".")
        module = _module(model, path)
        if module is not None and (leaf in module._parameters or leaf in adapted.records(module)):
            _check_equal(adapted.base_of(module, leaf), value, name, where)


def _check_equal(mine: torch.Tensor | None, given: torch.Tensor, name: str, where: str) -> None:
    if mine is None or mine.shape != given.shape or not torch.equal(mine.detach().cpu(), given.to(mine.dtype)):
        raise DataError(f"the file has another {name} than the model", where=where, do="load the adapter on the base that it was trained on")
