"""State as data: nested plain values to JSON, their tensors beside it. Reading runs no code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import DataError

_TENSOR, _TUPLE, _PAIRS, _FLOAT, _DTYPE, _PIECE = "$tensor", "$tuple", "$pairs", "$float", "$dtype", "$piece"
_MARKS = {_TENSOR, _TUPLE, _PAIRS, _FLOAT, _DTYPE, _PIECE}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class Mark:
    """Stands in a state for a tensor that lies in pieces in other files (see `sharded`).

    Attributes:
        shape: of the whole; None: each rank has its own.
    """

    name: str
    shape: tuple[int, ...] | None


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """A value as strict JSON knows it; its tensors go into `tensors` under names that begin with `where`.

    None, booleans, whole and floating-point numbers (NaN and infinities too), strings, tensors, numpy arrays and numbers, dtypes, and
    dicts, lists and tuples of them.

    Raises:
        DataError: something else, with its place.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if isinstance(value, Tensor):
        tensors[where] = value.detach()
        return {_TENSOR: where}
    if isinstance(value, Mark):
        return {_PIECE: [value.name, None if value.shape is None else list(value.shape)]}
    if isinstance(value, np.ndarray):
        return encode(torch.from_numpy(np.ascontiguousarray(value)), where, tensors)
    if isinstance(value, np.generic):
        return encode(value.item(), where, tensors)
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value)}
    if isinstance(value, (list, tuple)):
        found = [encode(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
        return found if isinstance(value, list) else {_TUPLE: found}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and not _MARKS & set(value):
            return {key: encode(item, f"{where}/{key}", tensors) for key, item in value.items()}
        return {_PAIRS: [[encode(key, f"{where}/key{i}", tensors), encode(item, f"{where}/{key}", tensors)] for i, (key, item) in enumerate(value.items())]}
    raise DataError(f"A {type(value).__name__} cannot be saved.", where=where, do="Give plain values and tensors: numbers, strings, dicts, lists, tuples.")


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given.

    Raises:
        DataError: marks that nothing is known of, or a tensor that is not there.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    mark = _MARKS & set(value)
    if not mark:
        return {key: decode(item, tensors) for key, item in value.items()}
    if len(value) != 1:
        raise DataError(f"A saved value has the entries {', '.join(value)}.", do="The file was not written by fxopt, or is damaged.")
    kind, held = next(iter(value.items()))
    try:
        if kind == _TENSOR:
            return tensors[held]
        if kind == _TUPLE:
            return tuple(decode(item, tensors) for item in held)
        if kind == _FLOAT:
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[held]
        if kind == _DTYPE:
            return _DTYPES[held]
        if kind == _PIECE:
            return Mark(held[0], None if held[1] is None else tuple(held[1]))
        return {decode(key, tensors): decode(item, tensors) for key, item in held}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"The saved value {kind} cannot be read: {error!r}.", do="The file was not written by fxopt, or is damaged.") from error


def cloned(value: Any) -> Any:
    """The same structure with copies of its tensors on the CPU, so that training may go on while it is written."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: cloned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cloned(item) for item in value)
    return value
