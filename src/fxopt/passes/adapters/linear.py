"""Adapters on linears: one fused op, whatever the base's format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.kernels.lora_linear import OP as LORA_LINEAR
from fxopt.passes import linears
from fxopt.passes.adapters import embedding
from fxopt.passes.adapters.site import Config, Site, drops, factor, gain, kaiming, zeros

aten = torch.ops.aten


def find(node: fx.Node, parameters: Set[str]) -> Site | None:
    """The linear that a node is, if its weight is one of the parameters."""
    linear = linears.read(node)
    if linear is None or linear.name not in parameters:
        return None
    return Site(node, linear.name, "linear", linear.chain, linear.transposed)


def rewrite(edit: Edit, site: Site, config: Config) -> None:
    """y = x W^T + b becomes `lora_linear`; with DoRA, products of it."""
    linear = linears.read(site.node)  # read again: its input may have been an earlier site, and be another node since
    assert linear is not None
    node, transposed = linear.node, linear.transposed
    a, b = _factors(edit, site, config, linear)
    dtype = meta.tensor(node).dtype
    x, weight, bias = (linears.cast(edit, n, dtype, node) for n in (linear.x, linear.weight, linear.bias))
    shape = list(edit.slots[site.name].shape)

    def product(given: fx.Node, added: fx.Node | None, p: float) -> fx.Node:
        seeds = edit.call(aten.randint.low, (-(1 << 63), (1 << 63) - 1, [1]), {"device": edit.device(node)}, like=node) if p else None
        args = (given, [weight], ["dense"], shape, [added] if added is not None else [], [a], [b], [config.scale], transposed, p, seeds)
        return edit.item(edit.call(LORA_LINEAR.forward.overload, args, like=node), 0, like=node)

    if config.variant != "dora":
        new = product(x, bias, drops(edit, config) if config.kind == "linear" else 0.0)
    else:
        new = _dora(edit, site, config, x, weight, bias, a, b, product, transposed)
    edit.replace(node, new, rule=rule_here("lora"))
    edit.erase(node)


def _factors(edit: Edit, site: Site, config: Config, linear: linears.Linear) -> tuple[fx.Node, fx.Node]:
    fan_in, fan_out = linear.features
    if config.kind == "linear":
        return (factor(edit, site, config, "a", (config.rank, fan_in), kaiming, linear.transposed),
                factor(edit, site, config, "b", (fan_out, config.rank), zeros, linear.transposed))
    if config.variant == "dora":
        raise PassError(f"lora: {site.name} is read by an embedding and by a linear, whose outputs DoRA would scale in different ways",
                        where=str(meta.provenance(site.node)), do="use variant=lora or rslora for it, or untie the two")
    a, b = embedding.factors(edit, site, config)  # of an embedding: W' = W + scale (B A)^T
    if linear.transposed:
        return a, b
    return edit.call(aten.t.default, (b,), like=site.node), edit.call(aten.t.default, (a,), like=site.node)


def _dora(edit: Edit, site: Site, config: Config, x: fx.Node, weight: fx.Node, bias: fx.Node | None, a: fx.Node, b: fx.Node,
          product: Callable[..., fx.Node], transposed: bool) -> fx.Node:
    """y = (m / ||W'||) (x W'^T) + b. With dropout only the change is computed of what is left of x, as in PEFT:
    y = (m / ||W'||) (z W'^T) + (x - z) W^T + b with z = drop(x)."""
    node, call, p = site.node, functools.partial(edit.call, like=site.node), drops(edit, config)
    factor_ = gain(edit, site, config, weight, list(edit.slots[site.name].shape), a, b, transposed, (b.meta["val"].shape[0],))
    kept = call(aten.dropout.default, (x, p, True)) if p else x
    y = call(aten.mul.Tensor, (product(kept, None, 0.0), linears.cast(edit, factor_, meta.tensor(node).dtype, node)))
    if p:
        lost = call(aten.sub.Tensor, (x, kept))
        y = call(aten.add.Tensor, (y, call(aten.matmul.default, (lost, weight)) if transposed else call(aten.linear.default, (lost, weight))))
    return y if bias is None else call(aten.add.Tensor, (y, bias))
