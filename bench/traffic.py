"""Bytes that operators read and write, beside the least that any implementation must."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.kernels.catalog import CATALOG

BODIES = {kernel.overload: kernel.body for op in CATALOG for kernel in op.kernels}
# They make memory and write nothing to it.
_UNWRITTEN = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Traffic(TorchDispatchMode):
    """Counts, while it is active, each operand and each result of each operator once, in `moved` [bytes].

    Fused ops are opened: the operators of their ATen bodies count. Views count nothing. An operator that gathers rows
    counts no more of its table than it returns. Caches are not modelled: what a body does block by block, to stay in a cache,
    counts as if it went to memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = BODIES.get(func)
        if body is not None:
            with self:
                return body(*args)
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns) or schema.name.split("::")[1] in _UNWRITTEN:
            return out
        written = distinct(pytree.tree_leaves(out))
        given = dict(kwargs or {})
        results = [given.pop(argument.name) for argument in schema.arguments if argument.is_out and argument.name in given]
        read = [size(x) for x in distinct(pytree.tree_leaves((args, given)))]
        if "index" in schema.name or "embedding" in schema.name or "gather" in schema.name:
            read = [min(each, sum(map(size, written))) for each in read]
        self.moved += sum(map(size, written or distinct(results))) + sum(read)
        return out


def size(x: Tensor) -> int:
    """Bytes of the elements that exist: an expanded dimension counts once."""
    count = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        count *= length if stride else min(length, 1)
    return count * x.element_size()


def distinct(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values, each memory once."""
    return list({(x.data_ptr(), x.shape, x.stride()): x for x in values if isinstance(x, Tensor)}.values())


def kept(values: Iterable[Any], args: Iterable[Any]) -> int:
    """Bytes of memory that values hold beyond the arguments."""
    known = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves(args) if isinstance(x, Tensor)}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in values if isinstance(x, Tensor)}
    return sum(bytes_ for place, bytes_ in storages.items() if place not in known)


def least(args: Sequence[Any], outputs: Sequence[Tensor], saved: Sequence[Any], grads: Sequence[Tensor], gathers: bool) -> int:
    """Bytes that must move: forward reads its arguments and writes its results, and what it keeps beside them; backward reads
    a gradient for each result and what was saved, and writes the gradients.

    Args:
        gathers: the op reads no more rows of an argument than it returns.
    """
    results = sum(map(size, outputs))
    most = results if gathers else None
    total = sum(min(size(x), most or size(x)) for x in distinct(args)) + results + kept(saved, [*args, *outputs])
    if grads:
        total += results + sum(min(size(x), most or size(x)) for x in distinct(saved)) + sum(map(size, grads))
    return total
