"""What an adapter's kinds share: the place that reads a weight, the adapter's settings, its factors and their first values."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.facts import LowRank
from fxopt.ir.program import Made, Slot
from fxopt.kernels.dora_norm import OP as DORA_NORM
from fxopt.passes import linears

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """A node that reads a parameter in a way that an adapter can follow.

    Attributes:
        node: the node whose value the adapter changes. name: slot of the weight. kind: what the node is.
        chain: the nodes between the parameter's `get_attr` and the node (transposes, the choice of an expert).
        transposed: the node reads the weight, or each matrix of the stack, as [in, out].
    """

    node: fx.Node
    name: str
    kind: str
    chain: tuple[fx.Node, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class Config:
    """What one weight's adapter is like. by: name of the pass; kind and the rest as in `LowRank`. seed: of A's first values."""

    by: str
    adapter: str
    rank: int
    alpha: float
    scale: float
    variant: str
    dropout: float
    seed: int
    kind: str = "linear"


@dataclass(frozen=True)
class Kind:
    """One kind of site.

    Attributes:
        name: see `LowRank`.
        find: the site that a node is, if it reads one of the named parameters.
        rewrite: puts the adapter in.
    """

    name: str
    find: Callable[[fx.Node, Set[str]], Site | None]
    rewrite: Callable[[Edit, Site, Config], None]


Init = Callable[[str, int, tuple[int, ...], torch.dtype, torch.device, Any], torch.Tensor]


def factor(edit: Edit, site: Site, config: Config, part: str, shape: tuple[int, ...], init: Init, transposed: bool = False) -> fx.Node:
    """The node that reads one part of the site's adapter; declares its slot."""
    weight = edit.slots[site.name]
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    fact = LowRank(site.name, part, config.rank, config.alpha, config.scale, transposed, config.adapter, config.kind, config.variant, config.dropout)
    first = functools.partial(init, site.name, config.seed, shape, dtype, edit.device(site.node))
    made = Made(config.by, first, site.name, facts=fact)
    return edit.state(Slot(adapter_slot(site.name, part, config.adapter), shape, dtype, "parameter", True, made), like=site.node)


def gain(edit: Edit, site: Site, config: Config, base: fx.Node, shape: list[int], a: fx.Node, b: fx.Node, transposed: bool,
         magnitudes: tuple[int, ...]) -> fx.Node:
    """DoRA's factor of each output, m / ||W'||: the norm is a constant to the gradient (section 4.3 of the paper).

    Args:
        base: the weight as a matrix [out, in], or [in, out] if transposed; shape: its sizes. a: [r, in]. b: [out, r].
        magnitudes: shape of m, with as many elements as there are outputs.
    """
    call = functools.partial(edit.call, like=site.node)
    m = factor(edit, site, config, "magnitude", magnitudes, functools.partial(magnitude, transposed), transposed)
    fixed = [call(aten.detach.default, (each,)) for each in (a, b)]
    norm = call(DORA_NORM.forward.overload, ([base], "dense", shape, *fixed, config.scale, transposed))
    if len(magnitudes) > 1:
        norm = call(aten.reshape.default, (norm, list(magnitudes)))
    return call(aten.div.Tensor, (m, norm))


def drops(edit: Edit, config: Config) -> float:
    """The probability of a zero in the adapter's input, in this program."""
    return config.dropout if edit.source.training else 0.0


def wide(edit: Edit, x: fx.Node, factor_: fx.Node, node: fx.Node) -> torch.dtype:
    """The dtype of the low-rank product: the adapter's, or what autocast computes the node in."""
    return meta.tensor(factor_).dtype if meta.tensor(x).dtype == meta.tensor(node).dtype else meta.tensor(node).dtype


_LETTERS = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector", "whole": "modules_to_save"}


def adapter_slot(weight: str, part: str, adapter: str = "default") -> str:
    """Where a part of an adapter lives: `<module>.lora_A.default` beside `<module>.weight`."""
    path, leaf = linears.module_of(weight)
    prefix = f"{path}." if path else ""
    return f"{prefix}{'' if leaf == 'weight' else leaf + '_'}{_LETTERS[part]}.{adapter}"


def kaiming(name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: Any) -> torch.Tensor:
    """A's first values: uniform in +-1/sqrt(fan_in), a function of the weight's name and the seed alone. Drawn on the CPU."""
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=_generator(name, seed)).to(dtype=dtype, device=device)


def stacked_kaiming(name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: Any) -> torch.Tensor:
    """`kaiming` for a stack of matrices [experts, rank, in]: the fan is that of one matrix."""
    return kaiming(name, seed, (shape[0] * shape[1], *shape[2:]), dtype, device, _).view(shape)


def normal(name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: Any) -> torch.Tensor:
    """The first values of an embedding's B: standard normal, a function of the weight's name and the seed alone."""
    return torch.randn(shape, generator=_generator(name, seed)).to(dtype=dtype, device=device)


def zeros(name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: Any) -> torch.Tensor:
    """B's first values (A's, for an embedding)."""
    return torch.zeros(shape, dtype=dtype, device=device)


def magnitude(transposed: bool, name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, weight: Any) -> torch.Tensor:
    """DoRA's first magnitudes: the norm of each output's weights, so that the outputs do not change."""
    kept = weight.detach().to(dtype)
    rows = kept.t() if transposed else kept.reshape(kept.shape[0], -1)
    return rows.norm(dim=1).view(shape)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
