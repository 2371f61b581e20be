"""Adapters on embeddings: y = W[ids] becomes W[ids] + scale (B A)^T[ids], a row gather and a product from the low side."""

from __future__ import annotations

from collections.abc import Set

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.kernels.lora_embedding import OP as LORA_EMBEDDING
from fxopt.passes import linears
from fxopt.passes.adapters.site import Config, Site, factor, gain, normal, zeros

aten = torch.ops.aten


def find(node: fx.Node, parameters: Set[str]) -> Site | None:
    """The embedding that a node is, if its table is one of the parameters."""
    if node.op != "call_function" or node.target is not aten.embedding.default:
        return None
    table = node.args[0]
    return Site(node, str(table.target), "embedding") if table.op == "get_attr" and table.target in parameters else None


def factors(edit: Edit, site: Site, config: Config) -> tuple[fx.Node, fx.Node]:
    """A [rank, vocabulary], zero at first, and B [width, rank], normal at first, as in the paper's code: then the first gradient
    touches A's columns of the tokens that occur and nothing else."""
    words, width = edit.slots[site.name].shape
    return (factor(edit, site, config, "a", (config.rank, words), zeros, True), factor(edit, site, config, "b", (width, config.rank), normal, True))


def rewrite(edit: Edit, site: Site, config: Config) -> None:
    """W[ids] becomes `lora_embedding`; DoRA multiplies each column by m / ||W'||, the norm over the vocabulary."""
    node = site.node
    table, ids, padding, *_ = (*node.args, -1)
    a, b = factors(edit, site, config)
    new = edit.item(edit.call(LORA_EMBEDDING.forward.overload, (table, ids, a, b, config.scale, padding), like=node), 0, like=node)
    if config.variant == "dora":
        columns = gain(edit, site, config, table, list(edit.slots[site.name].shape), a, b, True, (b.meta["val"].shape[0],))
        new = edit.call(aten.mul.Tensor, (new, linears.cast(edit, columns, meta.tensor(node).dtype, node)), like=node)
    edit.replace(node, new, rule=rule_here("lora"))
    edit.erase(node)
