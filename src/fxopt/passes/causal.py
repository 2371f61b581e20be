"""causal: attention masks that say no more than "causal", "everything", or that within documents, are read and go away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.ir.formula import EVERYWHERE, Affine, All, AtLeastZero, Formula, flags_of, inputs_of, said, simplify
from fxopt.ir.index import Flow, arguments, called, relaid, static
from fxopt.ir.masks import Reader, Unknown
from fxopt.ir.pattern import strip
from fxopt.ir.program import Assumption, AtMost
from fxopt.ir.segments import same_segment
from fxopt.passes.base import Pass, Promise
from fxopt.passes.packing import Refused, packed

aten = torch.ops.aten

_GAPS = ([(-2, -1), (-1, 1)], [(-1, -1), (-2, 1)])  # k - q and q - k
_CAUSAL = AtLeastZero(Affine(0, ((-2, 1), (-1, -1))))  # q - k >= 0


@dataclass(frozen=True)
class Causal(Pass):
    """attention masks as flags: causal, or none; packed documents as segments

    A dense mask costs memory of the size of the scores and keeps attention off its fastest kernels. The mask is read as
    a formula over positions; one that is exactly causal, or allows everything, goes. One that says so within documents
    makes the attention packed: each document attends to itself, at a cost of its own length squared. With keys and values
    repeated for grouped heads, attention without a mask takes them unrepeated.

    Args:
        assume: whether the program may be for calls only in which a padding mask masks nothing and no sequence is longer
            than a sliding window. The caller checks it.
    """

    assume: bool = True

    name: ClassVar[str] = "causal"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    promise: ClassVar[Promise] = Promise(values="tolerance")

    def run(self, edit: Edit) -> None:
        """Try every attention in the graph."""
        flow = Flow(edit.graph, edit.slots)
        reader = Reader(edit.source.constants, {node for root in flow.written for node in flow.aliases[root]})
        for node in edit.nodes:
            if called(node, aten.scaled_dot_product_attention.default) and not edit.spent:
                node = self._unmask(edit, reader, node)
                if called(node, aten.scaled_dot_product_attention.default):
                    say_casts(edit, ungroup(edit, node))

    def _unmask(self, edit: Edit, reader: Reader, node: fx.Node) -> fx.Node:
        given = arguments(node)
        mask = given.get("attn_mask")
        if mask is None:
            return node
        try:
            formula = reader.allowed(mask)
        except Unknown as unknown:
            edit.missed("mask", node, unknown.reason)
            return node
        sizes = _sizes(meta.tensor(mask), given)
        inputs = {leaf for leaf, source in reader.leaves.items() if source.op == "placeholder"}
        leaves = flags_of(simplify(formula, sizes, frozenset())) & inputs
        formula = simplify(formula, sizes, leaves if self.assume else frozenset())
        segments, formula = same_segment(reader, formula)
        formula = simplify(formula, sizes, frozenset())
        windows: list[Assumption] = []
        if self.assume:
            formula, windows = without_windows(edit, formula, given["key"])
        why = _other(formula, given)
        if why is not None:
            edit.missed("mask", node, why if segments is None else f"within documents {why}")
            return node
        causal = formula == _CAUSAL
        try:
            if segments is not None:
                new = packed(edit, node, _cast_sources(edit, node, grouped(given)), given, (reader, segments), causal)
            else:
                new = attention(edit, node, (given["query"], given["key"], given["value"]), causal, _options(given))
        except Refused as refused:
            edit.missed("mask", node, str(refused))
            return node
        if (view := relaid(new, node)) is not None:
            edit.missed("mask", node, f"attention without a mask returns other strides, and `{view.name}` may depend on them")
            _unmade(edit, new)
            return node
        for assumption in (*(Assumption(leaf) for leaf in sorted(leaves)), *windows) if self.assume else ():
            edit.assume(assumption)
        edit.replace(node, new, rule=rule_here("packed mask" if segments is not None else "causal mask" if causal else "full mask"))
        edit.erase(node)
        return new


def _unmade(edit: Edit, node: fx.Node) -> None:
    """Erase a node that nobody reads, and what was made for it alone."""
    sources = node.all_input_nodes
    edit.erase(node)
    for source in sources:
        if not source.users and source.op == "call_function":
            _unmade(edit, source)


def _other(formula: Formula, given: Mapping[str, Any]) -> str | None:
    """What the mask says that no flag does; None if a flag does."""
    queries, keys = (meta.tensor(given[name]).shape[-2] for name in ("query", "key"))
    if formula == _CAUSAL and not meta.same_size(queries, keys):
        return f"the mask is causal for {queries} queries and {keys} keys: their ends may not be aligned"
    if formula in (_CAUSAL, EVERYWHERE):
        return None
    left = inputs_of(formula)
    return f"the mask depends on the values of {', '.join(sorted(left))}" if left else f"the mask is neither causal nor full: {said(formula)}"


_LAYOUT = (aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten.transpose.int)


def say_casts(edit: Edit, node: fx.Node) -> None:
    """Cast the inputs of an attention as autocast does, before they are laid out and repeated: rotations then see that
    their result is wanted in few bits."""
    dtype = meta.tensor(node).dtype
    new = {x: _cast(edit, x, dtype, node) for x in node.all_input_nodes if meta.tensor(x).is_floating_point() and meta.tensor(x).dtype != dtype}
    if new:
        edit.set_args(node, *fx.node.map_arg((node.args, node.kwargs), lambda x: new.get(x, x)))
        edit.rewrote(rule_here("said casts"), node)


def _cast(edit: Edit, x: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    if called(x, *_LAYOUT) and len(x.users) == 1:
        return edit.call(x.target, (_cast(edit, x.args[0], dtype, like), *x.args[1:]), dict(x.kwargs), like=like)
    return edit.call(aten.to.dtype, (x, dtype), like=like)


def attention(edit: Edit, like: fx.Node, sources: tuple[fx.Node, ...], causal: bool, options: Mapping[str, Any]) -> fx.Node:
    """Attention without a mask in place of `like`. Under autocast its inputs have several dtypes: cast as autocast does."""
    cast = _cast_sources(edit, like, sources)
    return edit.call(like.target, (*cast, None, arguments(like).get("dropout_p", 0.0), causal), dict(options), like=like)


def _cast_sources(edit: Edit, like: fx.Node, sources: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    dtype = meta.tensor(like).dtype
    return tuple(x if meta.tensor(x).dtype == dtype else edit.call(aten.to.dtype, (x, dtype), like=like) for x in sources)


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("scale", "enable_gqa") if name in given}


def _sizes(mask: torch.Tensor, given: Mapping[str, Any]) -> dict[int, int | None]:
    """Static sizes of the scores by dimension."""
    scores = {-1: meta.tensor(given["key"]).shape[-2], -2: meta.tensor(given["query"]).shape[-2]}
    shape = {i - mask.dim(): size for i, size in enumerate(mask.shape)}
    return {dim: static(size) for dim, size in {**shape, **scores}.items()}


def without_windows(edit: Edit, formula: Formula, key: fx.Node) -> tuple[Formula, list[Assumption]]:
    """The formula without windows that are wider than the captured call is long, and what that assumes of the calls.

    A window allows `q - k <= reach` (and, looking both ways, `k - q <= reach`). It hides nothing while there are no more
    than reach + 1 positions. A window that is narrower than the captured call stays: the assumption would be idle.
    """
    length = meta.tensor(key).shape[-2]
    found = [(node, dim) for node in edit.nodes if node.op == "placeholder" for dim, size in enumerate(meta.tensor(node).shape)
             if static(size) is None and meta.same_size(size, length)]
    parts = list(formula.parts) if isinstance(formula, All) else [formula]
    windows = [part for part in parts if isinstance(part, AtLeastZero) and part.value.const > 0 and sorted(part.value.terms, key=lambda term: term[1]) in _GAPS]
    if not found or not windows:
        return formula, []
    leaf, dim = found[0]
    size = min(part.value.const for part in windows) + 1
    if length.node.hint is None or length.node.hint > size:
        return formula, []
    kept = tuple(part for part in parts if part not in windows)
    return kept[0] if len(kept) == 1 else All(kept), [AtMost(leaf.name, dim, size)]


def ungroup(edit: Edit, node: fx.Node) -> fx.Node:
    """Attention without a mask takes grouped keys and values as they are. Returns the attention.

    On CPU the kernel is the same and the copies go. On other devices only the 16-bit kernel without a mask takes
    grouped heads; any other would fall back to one that holds all scores.
    """
    given = arguments(node)
    query = meta.tensor(given["query"])
    if query.device.type != "cpu" and query.dtype.itemsize > 2:
        return node
    if given.get("attn_mask") is not None or given.get("enable_gqa"):
        return node
    sources = grouped(given)
    if sources[1] is given["key"]:
        return node
    new = attention(edit, node, sources, given.get("is_causal", False), {**_options(given), "enable_gqa": True})
    edit.replace(node, new, rule=rule_here("grouped heads"))
    edit.erase(node)
    return new


def grouped(given: Mapping[str, Any]) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Query, key and value of an attention; keys and values unrepeated if both are repeated for groups of heads."""
    key, value = (repeated(strip(given[name])) for name in ("key", "value"))
    if key is None or value is None or not meta.same_size(meta.tensor(key).shape[1], meta.tensor(value).shape[1]):
        return given["query"], given["key"], given["value"]
    return given["query"], key, value


def repeated(node: Any) -> fx.Node | None:
    """What `unsqueeze(2) -> expand -> reshape` repeats along the heads, [batch, heads, seq, width]; None if it is not that."""
    if not called(node, aten.reshape.default, aten.view.default) or not called(node.args[0], aten.expand.default):
        return None
    expand = node.args[0]
    narrow = expand.args[0]
    if not called(narrow, aten.unsqueeze.default) or narrow.args[1] not in (2, -3):
        return None
    x, wide, flat = meta.tensor(narrow.args[0]), meta.tensor(expand), meta.tensor(node)
    if x.dim() != 4 or flat.dim() != 4:
        return None
    heads, times, all_heads = static(x.shape[1]), static(wide.shape[2]), static(flat.shape[1])
    if heads is None or times is None:
        return None
    same = all(meta.same_size(x.shape[i], flat.shape[i]) for i in (0, 2, 3)) and all_heads == heads * times
    return narrow.args[0] if same else None
