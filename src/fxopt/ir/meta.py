"""Typed access to `node.meta`: what a node's value is, which module and source line it came from."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from fxopt.torch_private import pytree

PROVENANCE = "fxopt_provenance"
_TORCH = os.path.dirname(torch.__file__) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n?\s*(.*)')


@dataclass(frozen=True)
class Provenance:
    """Where a node came from. Carried through every rewrite.

    Attributes:
        path: dotted path of the innermost module that ran the node, "" for the root. A second call of one module
            has the path `name@1`.
        stack: (path, class name) of every module around the node, outermost first.
        source: `file.py:line` of the innermost user frame, "" if unknown.
        code: the text of that line.
        passes: names of the passes that made or rewrote the node, in order.
        checkpoint: number of the user's `torch.utils.checkpoint` region the node ran in, or None.
    """

    path: str = ""
    stack: tuple[tuple[str, str], ...] = ()
    source: str = ""
    code: str = ""
    passes: tuple[str, ...] = field(default=())
    checkpoint: int | None = None

    def __str__(self) -> str:
        at = self.path or "<root>"
        return f"{at} ({self.source})" if self.source else at


def from_capture(node: fx.Node) -> Provenance:
    """Read what torch.export left in `node.meta`."""
    stack = []
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        path, kind = entry[0], entry[1]
        if path.startswith("_empty_nn_module_stack"):
            continue  # torch marks nodes without a module (shape arithmetic) with a module that is none
        name = kind if isinstance(kind, str) else getattr(kind, "__qualname__", str(kind))
        stack.append((path, name.rsplit(".", 1)[-1]))
    source = code = ""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    if frames:
        file, line, _, code = frames[-1]
        source = f"{os.path.basename(file)}:{line}"
    mark = (node.meta.get("custom") or {}).get("checkpoint")
    return Provenance(stack[-1][0] if stack else "", tuple(stack), source, code.strip(), (), mark)


def provenance(node: fx.Node) -> Provenance:
    """The provenance of a node; an empty one if none was recorded."""
    found = node.meta.get(PROVENANCE)
    return found if isinstance(found, Provenance) else Provenance()


def placed(node: fx.Node) -> str:
    """A node in a sentence: its name and the user's source line that it comes from, "`mul_3` (model.py:12)"."""
    source = provenance(node).source
    return f"`{node.name}` ({source})" if source else f"`{node.name}`"


def moved(node: fx.Node, old: str, new: str, around: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The provenance of a copy in the module `new` of a node in the module `old`; `around` is the stack of a node of `new`."""

    def path(name: str) -> str:
        return new + name[len(old):] if name == old or name.startswith(f"{old}.") else name

    was = provenance(node)
    at, to = (next((i for i, (name, _) in enumerate(stack) if name == wanted), 0) for stack, wanted in ((was.stack, old), (around, new)))
    stack = (*around[:to], *((path(name), kind) for name, kind in was.stack[at:]))
    found = {PROVENANCE: dataclasses.replace(was, path=path(was.path), stack=stack)}
    if "nn_module_stack" in node.meta:
        found["nn_module_stack"] = {key: (path(entry[0]), *entry[1:]) for key, entry in node.meta["nn_module_stack"].items()}
    return found


def value(node: fx.Node) -> Any:
    """The fake value of a node: FakeTensor, SymInt, number, or a tuple of those. None if unknown."""
    return node.meta.get("val")


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node, or None if its value is not one tensor."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return val if isinstance(val, torch.Tensor) else None


def tensors(node: fx.Node) -> list[torch.Tensor]:
    """All fake tensors in a node's value."""
    val = value(node)
    if isinstance(val, torch.Tensor):
        return [val]
    return [leaf for leaf in pytree.tree_leaves(val) if isinstance(leaf, torch.Tensor)]


def float_dtypes(nodes: Iterable[fx.Node]) -> set[torch.dtype]:
    """The floating point dtypes that some nodes' values have: a program is no more exact than the coarsest of them."""
    return {t.dtype for node in nodes for t in tensors(node) if t.is_floating_point()}


def describe(val: Any) -> str:
    """`float32[2, s0, 64]` for a tensor, the plain text of anything else."""
    if isinstance(val, torch.Tensor):
        return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in val.shape)}]"
    if isinstance(val, (tuple, list)):
        return "(" + ", ".join(describe(item) for item in val) + ")"
    return str(val)


def signature(val: Any) -> Any:
    """What a value is to a fake run: dtype, device, sizes and strides of a tensor, the expression of a size."""
    if isinstance(val, torch.Tensor):
        return val.dtype, val.device, tuple(map(signature, val.shape)), tuple(map(signature, val.stride())) if val.layout is torch.strided else None
    if isinstance(val, torch.SymInt):
        return "size", val.node.expr
    return type(val), val


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes (int or SymInt) are equal by structure, without adding a guard."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return str(a) == str(b)
    return bool(a == b)


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fake tensors have the same shape by structure, without adding a guard."""
    return a.dim() == b.dim() and all(same_size(x, y) for x, y in zip(a.shape, b.shape))
