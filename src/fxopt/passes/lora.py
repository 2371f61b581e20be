"""Low-rank adapters on linear-like nodes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.passes import adapters, linears
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class Lora(Pass):
    """add low-rank adapters to linears, freeze everything else

    y = x W^T + b becomes y = x W^T + b + scale (drop(x) A^T) B^T with A [rank, in] uniform as in the paper's code (Kaiming,
    a = sqrt(5)) and B [out, rank] zero, so that the outputs do not change (Hu et al., 2021,
    https://arxiv.org/abs/2106.09685). The trainable parameters are then exactly the adapters and what `modules_to_save`
    names.

    Attributes:
        rank: r.
        alpha: default 2 * rank. scale is alpha / rank.
        targets: "all-linear" (every linear-like node but the output head), or names: a module path, its last parts, or a
            parameter's full name. A name that matches nothing is an error.
        seed: of A's first values, which depend on the parameter's name and on nothing else.
        dropout: probability of a zero in the adapters' input; in training mode only.
        variant: "lora"; "rslora": scale is alpha / sqrt(rank) (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732);
            "dora": y = m (x W'^T) / ||W'|| + b with W' = W + scale B A, a trained magnitude m for each output, and the norm a
            constant to the gradient (Liu et al., 2024, https://arxiv.org/abs/2402.09353, section 4.3).
        rank_pattern, alpha_pattern: other ranks and alphas by target name (as in `targets`); the first that matches counts.
        modules_to_save: modules (by path or its last parts) that are trained whole, without adapters.
        adapter: name of the adapter; several of them can share one base.

    Raises:
        PassError: a target matches nothing, or names a weight that something else than a linear reads.
    """

    name: ClassVar[str] = "lora"
    establishes: ClassVar[frozenset[str]] = frozenset({"adapters"})
    # not "exact": the base product may take another path (mm for bmm) on strided inputs, which is one ulp
    promise: ClassVar[Promise] = Promise(values="tolerance", gradients="declared", random="declared")
    must_fire: ClassVar[bool] = True

    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all-linear"
    seed: int = 0
    dropout: float = 0.0
    variant: Literal["lora", "rslora", "dora"] = "lora"
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    modules_to_save: tuple[str, ...] = ()
    adapter: str = "default"

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise PassError(f"lora: rank must be at least 1, got {rank}")
        if not 0 <= self.dropout < 1:
            raise PassError(f"lora: dropout must be in [0, 1), got {self.dropout}")
        if not self.adapter.isidentifier():
            raise PassError(f"lora: an adapter's name is a word, got {self.adapter!r}")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            object.__setattr__(self, "targets", (self.targets,))
        if not self.targets:
            raise PassError("lora: targets is empty", do='name modules, or write "all-linear"')

    def run(self, edit: Edit) -> None:
        """Rewrite the chosen sites and freeze the model's own parameters."""
        parameters = {name for name, slot in edit.slots.items() if slot.kind == "parameter"}
        saved = self._saved(edit, parameters)
        found = [site for site in adapters.find(edit.nodes, parameters) if site.name not in saved]
        chosen = self._choose(edit, found)
        for site in found:
            if site.name in chosen:
                adapters.rewrite(edit, adapters.again(site), self._config(edit, site.name))
        edit.dead()
        edit.freeze(name for name, slot in edit.slots.items() if slot.made is None and name not in saved)

    def _config(self, edit: Edit, name: str) -> adapters.Config:
        def picked(patterns: Mapping[str, float], default: float) -> float:
            return next((value for target, value in patterns.items() if _names(edit, name, target)), default)

        rank = int(picked(self.rank_pattern, self.rank))
        alpha = float(picked(self.alpha_pattern, 2.0 * rank if self.alpha is None else self.alpha))
        scale = alpha / math.sqrt(rank) if self.variant == "rslora" else alpha / rank
        return adapters.Config(self.name, self.adapter, rank, alpha, scale, self.variant, self.dropout, self.seed)

    def _saved(self, edit: Edit, parameters: set[str]) -> set[str]:
        """The parameters of the modules that are trained whole."""
        found: set[str] = set()
        for target in self.modules_to_save:
            hits = {name for name in parameters if edit.slots[name].made is None and _inside(name, target)}
            if not hits:
                raise _nothing(target, sorted(parameters), "modules_to_save names")
            found |= hits
        return found

    def _choose(self, edit: Edit, found: list[adapters.Site]) -> set[str]:
        names = list(dict.fromkeys(site.name for site in found))
        known = edit.installed.adapters.get(self.adapter)
        if known is not None:  # another kind of call of an adapted model: the same adapters
            return {name for name in names if name in known}
        sites = {name: [site for site in found if site.name == name] for name in names}
        shared = {name: readers for name in names if (readers := linears.others(edit, name, sites[name]))}
        tied = {name: edit.slots[name].aliases[0] for name in names if edit.slots[name].aliases and name not in shared}
        for target in (*self.rank_pattern, *self.alpha_pattern):
            if not any(_names(edit, name, target) for name in names):
                raise _nothing(target, names, "a pattern names")
        if self.targets == "all-linear":
            products = [site.linear for site in found if site.linear is not None]
            head = linears.head(edit, products)
            plain = {linear.name for linear in products}
            for site in found:
                if site.name in shared and site.name in plain:
                    edit.missed("lora", site.node, f"{site.name} is also read by {shared[site.name][0].name}")
                elif site.name in tied and site.name in plain:
                    edit.missed("lora", site.node, f"{site.name} is tied to {tied[site.name]}")
                elif site.name == head:
                    edit.missed("lora", site.node, f"{site.name} is the output head, which all-linear leaves out")
            return {name for name in names if name in plain and name not in shared and name not in tied and name != head}
        chosen: set[str] = set()
        for target in self.targets:
            hits = {name for name in names if _names(edit, name, target)}
            if not hits:
                raise _nothing(target, names, "the target")
            for name in hits & shared.keys():
                raise PassError(f"lora: {name} is also read by {shared[name][0].name}, which an adapter of it would change too",
                                where=str(meta.provenance(shared[name][0])), do="leave it out of targets, or untie the two")
            for name in hits & tied.keys():
                raise PassError(f"lora: {name} is tied to {tied[name]}", do="leave it out of targets: an adapter would change both uses")
            chosen |= hits
        return chosen


def _names(edit: Edit, name: str, target: str) -> bool:
    return any(matches(known, target) for known in (name, *edit.slots[name].aliases))


def matches(name: str, target: str) -> bool:
    """Whether a target names a parameter: its full name, its module's path, or the last parts of that path."""
    path, _ = linears.module_of(name)
    return target in (name, path) or path.endswith("." + target)


def _inside(name: str, target: str) -> bool:
    """Whether a parameter lies in a module that a target names."""
    parts = name.split(".")
    return any(matches(".".join([*parts[:i], "_"]), target) for i in range(1, len(parts))) or name == target


def _nothing(target: str, names: list[str], what: str) -> PassError:
    paths = [linears.module_of(name)[0] for name in names]
    pool = list(dict.fromkeys([path.rpartition(".")[2] for path in paths] + paths))
    near = difflib.get_close_matches(target, pool, n=4, cutoff=0.3) or pool[:4]
    return PassError(f"lora: {what} {target!r}, which matches nothing that can be adapted",
                     do=f"the nearest names are {', '.join(near)}" if near else "the program has no linears")
