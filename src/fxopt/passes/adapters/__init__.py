"""Where a low-rank adapter can be put in, and how: one file for each kind of place."""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch.fx as fx

from fxopt.ir.edit import Edit
from fxopt.passes.adapters import convolution, embedding, experts, linear
from fxopt.passes.adapters.site import Config, Kind, Site, adapter_slot

__all__ = ["Config", "KINDS", "Site", "adapter_slot", "both_ways", "find", "kind_of", "others", "rewrite"]

KINDS = tuple(Kind(name, module.find, module.rewrite) for name, module in
              (("linear", linear), ("embedding", embedding), ("conv", convolution), ("experts", experts)))


def find(nodes: Iterable[fx.Node], parameters: Set[str]) -> list[Site]:
    """Every site whose weight is one of the parameters, in order."""
    found = []
    for node in nodes:
        site = next((site for kind in KINDS if (site := kind.find(node, parameters)) is not None), None)
        if site is not None:
            found.append(site)
    return found


def rewrite(edit: Edit, site: Site, config: Config) -> None:
    """Put the adapter in."""
    next(kind for kind in KINDS if kind.name == site.kind).rewrite(edit, site, config)


def kind_of(sites: Iterable[Site]) -> str | None:
    """The kind of one weight's adapter, by all that reads the weight; None if they do not go together."""
    kinds = {site.kind for site in sites}
    if kinds == {"embedding", "linear"}:  # a head that is its embedding's table
        return "embedding"
    return kinds.pop() if len(kinds) == 1 else None


def both_ways(sites: Iterable[Site]) -> fx.Node | None:
    """The first reader that takes the weight the other way round than the first one, W and W^T, if there is one.

    B A has the orientation of one of them. An embedding's adapter is not affected: it has the orientation of the table.
    """
    sites = list(sites)
    if kind_of(sites) not in ("linear", "experts"):
        return None
    return next((site.node for site in sites if site.transposed != sites[0].transposed), None)


def others(edit: Edit, name: str, sites: Iterable[Site]) -> list[fx.Node]:
    """Readers of a parameter that are not among its sites (a weight norm, a write)."""
    sites = list(sites)
    mine = {node for site in sites for node in (site.node, *site.chain)}
    stack = [node for node in edit.nodes if node.op == "get_attr" and node.target == name]
    chain = {node for site in sites for node in site.chain}
    found: list[fx.Node] = []
    while stack:
        for user in stack.pop().users:
            if user not in mine:
                found.append(user)
            elif user in chain:
                stack.append(user)
    return found
