"""Adapters on convolutions: A is a convolution like the base's with `rank` outputs, B a pointwise one."""

from __future__ import annotations

import functools
from collections.abc import Set
from typing import Any

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.passes import linears
from fxopt.passes.adapters.site import Config, Site, drops, factor, gain, kaiming, wide, zeros

aten = torch.ops.aten

_TARGETS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def find(node: fx.Node, parameters: Set[str]) -> Site | None:
    """The convolution that a node is, if its weight is one of the parameters."""
    if node.op != "call_function" or node.target not in _TARGETS:
        return None
    weight = node.args[1]
    return Site(node, str(weight.target), "conv") if weight.op == "get_attr" and weight.target in parameters else None


def rewrite(edit: Edit, site: Site, config: Config) -> None:
    """y = x * W + b becomes x * W + b + scale (drop(x) * A) * B; DoRA scales both products by m / ||W'||."""
    node, call = site.node, functools.partial(edit.call, like=site.node)
    given = _arguments(node)
    if given["groups"] != 1:
        raise PassError(f"lora: {site.name} is a convolution with {given['groups']} groups, which takes no adapter", where=str(meta.provenance(node)),
                        do="leave it out of targets: W + B A of its shape would need a B for each group")
    shape = edit.slots[site.name].shape
    pointwise = (1,) * (len(shape) - 2)
    a = factor(edit, site, config, "a", (config.rank, *shape[1:]), kaiming)
    b = factor(edit, site, config, "b", (shape[0], config.rank, *pointwise), zeros)
    x, dtype, low_dtype, p = given["input"], meta.tensor(node).dtype, wide(edit, given["input"], a, node), drops(edit, config)
    kept = call(aten.dropout.default, (x, p, True)) if p else x
    where = [given[name] for name in ("stride", "padding", "dilation")]
    low = call(node.target, (linears.cast(edit, kept, low_dtype, node), linears.cast(edit, a, low_dtype, node), None, *where, 1))
    change = call(aten.mul.Tensor, (call(_plain(node.target), (low, linears.cast(edit, b, low_dtype, node))), config.scale))
    change = linears.cast(edit, change, dtype, node)
    if config.variant != "dora":
        new = call(aten.add.Tensor, (call(node.target, tuple(given.values())), change))
    else:
        weight, bias = given["weight"], given["bias"]
        flat = [shape[0], a.meta["val"][0].numel()]
        rows, low_a, low_b = (call(aten.reshape.default, (n, sizes)) for n, sizes in ((weight, flat), (a, [config.rank, flat[1]]), (b, [flat[0], config.rank])))
        channels = linears.cast(edit, gain(edit, site, config, rows, flat, low_a, low_b, False, (1, shape[0], *pointwise)), dtype, node)
        product = functools.partial(call, node.target)
        new = call(aten.mul.Tensor, (channels, call(aten.add.Tensor, (product((kept, weight, None, *where, 1)), change))))
        if p:  # what dropout took away is not the adapter's: it goes through the base alone
            new = call(aten.add.Tensor, (new, product((call(aten.sub.Tensor, (x, kept)), weight, None, *where, 1))))
        if bias is not None:
            new = call(aten.add.Tensor, (new, call(aten.reshape.default, (linears.cast(edit, bias, dtype, node), [1, shape[0], *pointwise]))))
    edit.replace(node, new, rule=rule_here("lora"))
    edit.erase(node)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A convolution's arguments by name, defaults filled in."""
    schema = node.target._schema.arguments
    found = {argument.name: node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value) for i, argument in enumerate(schema)}
    return {name: found[name] for name in _NAMES}


def _plain(target: Any) -> Any:
    """The convolution of as many dimensions that takes numbers for its padding."""
    return getattr(aten, target._schema.name.partition("::")[2]).default
