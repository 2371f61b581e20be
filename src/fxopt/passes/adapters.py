"""Sites that can take a low-rank adapter, and how each kind is rewritten."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.ir.facts import LowRank
from fxopt.ir.program import Made, Slot
from fxopt.kernels.dora_norm import OP as DORA_NORM
from fxopt.kernels.lora_linear import OP as LORA_LINEAR
from fxopt.passes import linears

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A node that reads a parameter in a way that an adapter can follow.

    Attributes:
        node: the node. name: slot of the weight. kind: see `LowRank`.
        linear: what is known of it if it is a linear.
    """

    node: fx.Node
    name: str
    kind: str
    linear: linears.Linear | None = None


@dataclass(frozen=True)
class Config:
    """What one weight's adapter is like. by: name of the pass; the rest as in `LowRank`. seed: of A's first values."""

    by: str
    adapter: str
    rank: int
    alpha: float
    scale: float
    variant: str
    dropout: float
    seed: int


def find(nodes: Iterable[fx.Node], parameters: set[str]) -> list[Site]:
    """Every site whose weight is one of the parameters, in order."""
    return [Site(linear.node, linear.name, "linear", linear) for linear in linears.find(nodes, parameters)]


def again(site: Site) -> Site:
    """The site as it is now: its input may have been an earlier site, and be another node since."""
    linear = linears.read(site.node)
    return site if linear is None else Site(linear.node, linear.name, site.kind, linear)


def rewrite(edit: Edit, site: Site, config: Config) -> None:
    """Put the adapter in."""
    _REWRITES[site.kind](edit, site, config)


def factor(edit: Edit, site: Site, config: Config, part: str, shape: tuple[int, ...], init: Callable[..., torch.Tensor], transposed: bool = False,
           source: str | None = None) -> fx.Node:
    """The node that reads one part of the site's adapter; declares its slot."""
    weight = edit.slots[site.name]
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    fact = LowRank(site.name, part, config.rank, config.alpha, config.scale, transposed, config.adapter, site.kind, config.variant, config.dropout)
    first = functools.partial(init, site.name, config.seed, shape, dtype, edit.device(site.node))
    made = Made(config.by, first, source or site.name, facts=fact)
    return edit.state(Slot(adapter_slot(site.name, part, config.adapter), shape, dtype, "parameter", True, made), like=site.node)


def _linear(edit: Edit, site: Site, config: Config) -> None:
    linear = site.linear
    assert linear is not None
    node, (fan_in, fan_out), transposed = linear.node, linear.features, linear.transposed
    a = factor(edit, site, config, "a", (config.rank, fan_in), kaiming, transposed)
    b = factor(edit, site, config, "b", (fan_out, config.rank), zeros, transposed)
    dtype = meta.tensor(node).dtype
    x, weight, bias = (linears.cast(edit, n, dtype, node) for n in (linear.x, linear.weight, linear.bias))
    shape, drops = list(edit.slots[site.name].shape), config.dropout if edit.source.training else 0.0

    def product(given: fx.Node, added: fx.Node | None, p: float) -> fx.Node:
        seeds = edit.call(aten.randint.low, (-(1 << 63), (1 << 63) - 1, [1]), {"device": edit.device(node)}, like=node) if p else None
        args = (given, [weight], ["dense"], shape, [added] if added is not None else [], [a], [b], [config.scale], transposed, p, seeds)
        return edit.item(edit.call(LORA_LINEAR.forward.overload, args, like=node), 0, like=node)

    if config.variant != "dora":
        new = product(x, bias, drops)
    else:
        new = _dora(edit, site, config, x, weight, bias, a, b, product, drops, transposed)
    edit.replace(node, new, rule=rule_here("lora"))
    edit.erase(node)


def _dora(edit: Edit, site: Site, config: Config, x: fx.Node, weight: fx.Node, bias: fx.Node | None, a: fx.Node, b: fx.Node,
          product: Callable[..., fx.Node], drops: float, transposed: bool) -> fx.Node:
    """y = (m / ||W'||) (x W'^T) + b. With dropout only the change is computed of what is left of x, as in PEFT:
    y = (m / ||W'||) (z W'^T) + (x - z) W^T + b with z = drop(x)."""
    node, call = site.node, functools.partial(edit.call, like=site.node)
    shape = list(edit.slots[site.name].shape)
    m = factor(edit, site, config, "magnitude", (b.meta["val"].shape[0],), functools.partial(magnitude, transposed), transposed)
    fixed = [call(aten.detach.default, (factor_,)) for factor_ in (a, b)]
    norm = call(DORA_NORM.forward.overload, ([weight], "dense", shape, *fixed, config.scale, transposed))
    gain = call(aten.div.Tensor, (m, norm))
    dtype = meta.tensor(node).dtype
    kept = x
    if drops:
        kept = call(aten.dropout.default, (x, drops, True))
    y = call(aten.mul.Tensor, (product(kept, None, 0.0), linears.cast(edit, gain, dtype, node)))
    if drops:
        lost = call(aten.sub.Tensor, (x, kept))
        y = call(aten.add.Tensor, (y, call(aten.matmul.default, (lost, weight)) if transposed else call(aten.linear.default, (lost, weight))))
    return y if bias is None else call(aten.add.Tensor, (y, bias))


_REWRITES: dict[str, Callable[[Edit, Site, Config], None]] = {"linear": _linear}

_LETTERS = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}


def adapter_slot(weight: str, part: str, adapter: str = "default") -> str:
    """Where a part of an adapter lives: `<module>.lora_A.default` beside `<module>.weight`."""
    path, leaf = linears.module_of(weight)
    prefix = f"{path}." if path else ""
    return f"{prefix}{'' if leaf == 'weight' else leaf + '_'}{_LETTERS[part]}.{adapter}"


def kaiming(name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: Any) -> torch.Tensor:
    """A's first values, uniform in +-1/sqrt(fan in), from a generator that depends on the name and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator).to(dtype=dtype, device=device)


def zeros(name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: Any) -> torch.Tensor:
    """B's first values."""
    return torch.zeros(shape, dtype=dtype, device=device)


def magnitude(transposed: bool, name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, weight: Any) -> torch.Tensor:
    """DoRA's first magnitudes: the norm of each output's weights, so that the outputs do not change."""
    wide = weight.detach().to(dtype)
    return (wide if transposed else wide.t()).reshape(-1, shape[0]).norm(dim=0)
