"""Attention under a mask of documents as packed attention, for the pass that reads the mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.formula import Affine
from fxopt.ir.index import static
from fxopt.ir.masks import Reader
from fxopt.ir.segments import QUERY, Segments
from fxopt.kernels.catalog import packed_attention
from fxopt.kernels.packed_attention.torch_kernels import FLOATS

aten = torch.ops.aten

_ROW = Affine(0, ((-4, 1),))


class Refused(Exception):
    """Why an attention is not packed."""


def packed(edit: Edit, like: fx.Node, sources: tuple[fx.Node, ...], given: Mapping[str, Any], found: tuple[Reader, Segments], causal: bool) -> fx.Node:
    """Packed attention of query, key and value in place of the attention `like`, whose arguments are `given`.

    Raises:
        Refused: what the op does not do.
    """
    query, key, value = map(meta.tensor, sources)
    if "dropout_p" in given:
        raise Refused(f"the attention drops out with probability {given['dropout_p']}, and packed attention has no dropout")
    if not query.dim() == key.dim() == value.dim() == 4:
        raise Refused("packed attention takes queries, keys and values [batch, heads, seq, width]")
    if query.dtype not in FLOATS:
        raise Refused(f"packed attention does not compute in {query.dtype}")
    if not all(meta.same_size(query.shape[dim], other.shape[dim]) for dim in (0, 2) for other in (key, value)):
        raise Refused("queries, keys and values differ in batch or length")
    heads, kv_heads = static(query.shape[1]), static(key.shape[1])
    if heads is None or kv_heads is None or heads % kv_heads:
        raise Refused(f"{query.shape[1]} heads of queries, {key.shape[1]} of keys")
    reader, segments = found
    node = _rows(edit, reader.leaves[segments.query.leaf], segments.query.index, query)
    call = edit.call(packed_attention.overload, (*sources, node, given.get("scale"), causal), like=like)
    return edit.item(call, 0, like=like)


def _rows(edit: Edit, node: fx.Node, index: tuple[Affine, ...], query: torch.Tensor) -> fx.Node:
    """The segments [1 or batch, seq] from the tensor that the mask reads at `index`."""
    name, like = node.name, node
    shape = meta.tensor(node).shape
    if index == (Affine(0), QUERY) and meta.same_size(shape[0], 1):
        index = (_ROW, QUERY)
    for dim in reversed(range(len(index))):
        if index[dim].fixed:
            node = edit.call(aten.select.int, (node, dim, index[dim].const), like=like, before=node.next)
    kept = [part for part in index if not part.fixed]
    if kept not in ([QUERY], [_ROW, QUERY], [QUERY, _ROW]):
        raise Refused(f"`{name}` does not hold one segment for each token")
    if kept == [QUERY]:
        node = edit.call(aten.unsqueeze.default, (node, 0), like=like, before=node.next)
    elif kept == [QUERY, _ROW]:
        node = edit.call(aten.transpose.int, (node, 0, 1), like=like, before=node.next)
    rows, seq = meta.tensor(node).shape
    if not meta.same_size(seq, query.shape[2]) or not (meta.same_size(rows, 1) or meta.same_size(rows, query.shape[0])):
        raise Refused(f"`{name}` has segments [{rows}, {seq}] for queries [{query.shape[0]}, {query.shape[2]}]")
    return node
