"""The structure of return values: pytrees, and plain objects that hold tensors (dataclasses, key-value caches)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.torch_private import pytree

DEPTH = 8  # of objects in objects


class Opened:
    """An object that pytree does not know, opened: its class and attributes. Unflattening makes the object again."""

    def __init__(self, kind: type, attributes: dict[str, Any]) -> None:
        self.kind, self.attributes = kind, attributes


def _flatten(opened: Opened) -> tuple[list[Any], Any]:
    return list(opened.attributes.values()), (opened.kind, tuple(opened.attributes))


def _unflatten(children: Any, context: Any) -> Any:
    kind, names = context
    made = kind.__new__(kind)
    made.__dict__.update(zip(names, children))
    return made


pytree.register_pytree_node(Opened, _flatten, _unflatten, serialized_type_name="fxopt.ir.structure.Opened")


def opened(value: Any, depth: int = 0, only: Callable[[Any], bool] = lambda x: True) -> Any:
    """`value` with every object that holds tensors, that pytree does not know, and that `only` admits, opened."""

    def leaf(x: Any) -> Any:
        if isinstance(x, torch.Tensor) or isinstance(x, type) or not hasattr(x, "__dict__") or depth >= DEPTH or not only(x) or not _holds_tensors(x):
            return x
        return Opened(type(x), {name: opened(held, depth + 1, only) for name, held in vars(x).items()})

    return pytree.tree_map(leaf, value)


def _holds_tensors(value: Any, depth: int = 0) -> bool:
    if isinstance(value, torch.nn.Module) or depth >= DEPTH:
        return False
    return any(isinstance(x, torch.Tensor) or (hasattr(x, "__dict__") and not isinstance(x, type) and _holds_tensors(x, depth + 1))
               for held in vars(value).values() for x in pytree.tree_leaves(held))
