"""Low-rank adapters on the weights of linears, embeddings, convolutions and stacks of experts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.fx as fx

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.ir.facts import Trained
from fxopt.ir.part import part_of
from fxopt.ir.program import Made, Slot
from fxopt.passes import adapters, linears, promises
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class Lora(Pass):
    """add low-rank adapters to linears, freeze everything else

    y = x W^T + b becomes y = x W^T + b + scale (drop(x) A^T) B^T with A [rank, in] uniform as in the paper's code (Kaiming,
    a = sqrt(5)) and B [out, rank] zero, so that the outputs do not change (Hu et al., 2021,
    https://arxiv.org/abs/2106.09685). Embeddings, convolutions and stacks of experts take one where `targets` names them (see
    passes/adapters). The trainable parameters are then exactly the adapters and what `modules_to_save` names.

    Attributes:
        rank: r.
        alpha: default 2 * rank. scale is alpha / rank.
        targets: "all-linear" (every linear-like node but the output head), or names: a module path, its last parts, or a
            parameter's full name. A name that matches nothing is an error. Tied weights get one adapter, if all their names are
            targets.
        seed: of A's first values, which depend on the parameter's name and on nothing else.
        dropout: probability of a zero in the adapters' input; in training mode only.
        variant: "lora"; "rslora": scale is alpha / sqrt(rank) (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732);
            "dora": y = m (x W'^T) / ||W'|| + b with W' = W + scale B A, a trained magnitude m for each output, and the norm a
            constant to the gradient (Liu et al., 2024, https://arxiv.org/abs/2402.09353, section 4.3).
        rank_pattern, alpha_pattern: other ranks and alphas by target name (as in `targets`); the first that matches counts.
        modules_to_save: modules (by path or its last parts) that are trained whole, without adapters. The adapter has its own copy
            of their parameters, so that other adapters, and the base, keep the originals. Memory: that copy.
        adapter: name of the adapter; several of them can share one base.

    Raises:
        PassError: a target matches nothing, or names a weight that something reads which an adapter cannot follow.
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
        """Rewrite the chosen sites, give what is trained whole a copy, and freeze the model's own parameters."""
        if "adapters" in edit.facts:
            raise PassError("lora: the pipeline has a lora pass already", do="name all targets in one pass (rank_pattern and alpha_pattern give them their "
                            "own settings); for an adapter to switch to, call `opt.add_adapter(name, lora)` on the optimized model")
        parameters = {name for name, slot in edit.slots.items() if slot.kind == "parameter"}
        linears.without_asserts(edit)
        saved = self._saved(edit, parameters)
        found = [site for site in adapters.find(edit.nodes, parameters) if site.name not in saved]
        kinds = self._choose(edit, found, parameters - saved)
        for site in found:
            if site.name in kinds and not edit.spent:
                adapters.rewrite(edit, site, self._config(edit, site.name, kinds[site.name]))
        if self.dropout and "embedding" in kinds.values():
            edit.note("dropout does not act on the adapters of embeddings: their inputs are ids")
        self._copy(edit, saved)
        edit.dead()
        edit.freeze(name for name, slot in edit.slots.items() if slot.made is None)

    def _config(self, edit: Edit, name: str, kind: str) -> adapters.Config:
        def picked(patterns: Mapping[str, float], default: float) -> float:
            return next((value for target, value in patterns.items() if _names(edit, name, target)), default)

        rank = int(picked(self.rank_pattern, self.rank))
        alpha = float(picked(self.alpha_pattern, 2.0 * rank if self.alpha is None else self.alpha))
        scale = alpha / math.sqrt(rank) if self.variant == "rslora" else alpha / rank
        return adapters.Config(self.name, self.adapter, rank, alpha, scale, self.variant, self.dropout, self.seed, kind)

    # -- trained whole -------------------------------------------------------------------------------------------------

    def _saved(self, edit: Edit, parameters: set[str]) -> set[str]:
        """The parameters of the modules that are trained whole."""
        found: set[str] = set()
        for target in self.modules_to_save:
            hits = {name for name in parameters if edit.slots[name].made is None and any(inside(known, target) for known in _known(edit, name))}
            if not hits and part_of(edit.facts) is None:
                raise _nothing(target, [(name, "") for name in sorted(parameters)], "modules_to_save names")
            found |= hits
        for name in found:
            for known in _known(edit, name):
                if not any(inside(known, target) for target in self.modules_to_save):
                    tied = next(other for other in _known(edit, name) if other != known)
                    raise PassError(f"lora: {tied} of modules_to_save is tied to {known}, which is not among them",
                                    do="name both modules: what they share is trained as one; or untie them")
        written = promises.written(edit.source)
        for name, slot in edit.slots.items():
            if slot.kind == "buffer" and name in written and any(inside(name, target) for target in self.modules_to_save):
                raise PassError(f"lora: modules_to_save has the buffer {name}, which the model writes into", where=linears.module_of(name)[0],
                                do="leave the module out: all adapters, and the base, share its buffers")
        return found

    def _copy(self, edit: Edit, saved: set[str]) -> None:
        """Let the program read the adapter's own copies of these parameters."""
        for name in sorted(saved):
            slot = edit.slots[name]
            made = Made(self.name, _clone, name, facts=Trained(name, self.adapter))
            copy = Slot(adapters.adapter_slot(name, "whole", self.adapter), slot.shape, slot.dtype, "parameter", True, made)
            edit.slots.setdefault(copy.name, copy)  # also where this kind of call does not read it
            for node in edit.nodes:
                if node.op == "get_attr" and node.target == name:
                    edit.replace(node, edit.state(copy, like=node), rule=rule_here("modules_to_save"))

    # -- targets -------------------------------------------------------------------------------------------------------

    def _choose(self, edit: Edit, found: list[adapters.Site], parameters: set[str]) -> dict[str, str]:
        """The weights that get an adapter, and its kind (see `LowRank`)."""
        sites: dict[str, list[adapters.Site]] = {}
        for site in found:
            sites.setdefault(site.name, []).append(site)
        known = edit.installed.adapters.get(self.adapter)
        if known is not None:
            return self._again(edit, known, sites)
        shared = {name: readers for name, mine in sites.items() if (readers := adapters.others(edit, name, mine))}
        for target in (*self.rank_pattern, *self.alpha_pattern):
            if not any(_names(edit, name, target) for name in sites) and part_of(edit.facts) is None:
                raise _nothing(target, [(name, "") for name in sites], "a pattern names")
        return self._all_linear(edit, sites, shared, parameters) if self.targets == "all-linear" else self._named(edit, sites, shared)

    def _again(self, edit: Edit, known: Mapping[str, str], sites: Mapping[str, list[adapters.Site]]) -> dict[str, str]:
        """Another kind of call of an adapted model: the same adapters."""
        for name, kind in known.items():
            readers = adapters.others(edit, name, sites.get(name, [])) if kind != "whole" else []
            if readers:
                raise PassError(f"lora: this kind of call reads {name} by {readers[0].name}, where its adapter cannot be put in",
                                where=str(meta.provenance(readers[0])), do="call `opt.model`, the original code on the adapted weights, for such calls")
            turned = adapters.both_ways(sites.get(name, [])) if kind != "embedding" else None
            if turned is not None:
                raise PassError(f"lora: {name}, which has an adapter, {_both(sites[name], turned)} in this kind of call",
                                where=str(meta.provenance(turned)), do="call `opt.model`, the original code on the adapted weights, for such calls")
            other = next((site for site in sites.get(name, []) if kind in ("linear", "experts") and site.kind == kind
                          and site.transposed != ((self.adapter, name) in edit.installed.transposed)), None)
            if other is not None:
                raise PassError(f"lora: {other.node.name} reads {name} transposed to how the call that made its adapter read it: its A and B cannot be put in here",
                                where=str(meta.provenance(other.node)), do="call `opt.model`, the original code on the adapted weights, for such calls")
        return {name: known[name] for name in sites if name in known}

    def _all_linear(self, edit: Edit, sites: Mapping[str, list[adapters.Site]], shared: Mapping[str, list[fx.Node]], parameters: set[str]) -> dict[str, str]:
        heads = linears.heads(edit, linears.by_weight(edit.nodes))
        chosen = {}
        for name, mine in sites.items():
            first = next((site.node for site in mine if site.kind == "linear"), None)
            if first is None:
                continue
            other = next((site.node for site in mine if site.kind != "linear"), shared.get(name, [None])[0])
            aliases = edit.slots[name].aliases
            if other is not None:
                edit.missed("lora", first, f"{name} is also read by {meta.placed(other)}")
            elif aliases:
                edit.missed("lora", first, f"{name} is tied to {aliases[0]}")
            elif (turned := adapters.both_ways(mine)) is not None:
                edit.missed("lora", first, f"{name} {_both(mine, turned)}")
            elif name in heads:
                edit.missed("lora", first, f"{name} is the output head, which all-linear leaves out: {heads[name]}")
            else:
                chosen[name] = "linear"
        for name, node, reason in linears.near(edit.nodes, {name for name, slot in edit.slots.items() if slot.kind == "parameter"}):
            edit.missed("lora", node, f"{name} {reason}")
        for name, node, reason in linears.unread(edit.nodes, parameters):
            edit.missed("lora", node, f"{name} {reason}")
        return chosen

    def _named(self, edit: Edit, sites: Mapping[str, list[adapters.Site]], shared: Mapping[str, list[fx.Node]]) -> dict[str, str]:
        chosen = {}
        for target in self.targets:
            hits = [name for name in sites if _names(edit, name, target)]
            if not hits and part_of(edit.facts) is not None:
                continue  # another part has it: `check_targets` has seen that the model does
            if not hits:
                raise _nothing(target, [(name, _reader(edit, name)) for name, slot in edit.slots.items() if slot.kind == "parameter"], "the target", set(sites))
            for name in hits:
                kind = adapters.kind_of(sites[name])
                where = str(meta.provenance(sites[name][0].node))
                if name in shared:
                    raise PassError(f"lora: {name} is also read by {shared[name][0].name}, which an adapter of it would change too",
                                    where=str(meta.provenance(shared[name][0])), do="leave it out of targets, or untie the two")
                if kind is None:
                    raise PassError(f"lora: {name} is read by {' and '.join(sorted({site.node.name for site in sites[name]}))}, which one adapter cannot serve",
                                    where=where, do="leave it out of targets")
                if (turned := adapters.both_ways(sites[name])) is not None:
                    raise PassError(f"lora: {name} {_both(sites[name], turned)}", where=where, do="leave it out of targets, or give each use a weight of its own")
                unnamed = [k for k in _known(edit, name) if not any(matches(k, t) for t in self.targets)]
                if unnamed:
                    raise PassError(f"lora: {name} is tied to {next(k for k in _known(edit, name) if k != name)}: an adapter changes both uses", where=where,
                                    do=f"name {unnamed[0]} in targets too, and both share one adapter; or leave it out, or untie the two")
                chosen[name] = kind
        return chosen


def _both(sites: Sequence[adapters.Site], turned: fx.Node) -> str:
    """Why a weight that is read both ways takes no adapter, in words."""
    return f"is read as W by {sites[0].node.name} and as its transpose by {turned.name}: one A and B cannot be put in both"


def _known(edit: Edit, name: str) -> tuple[str, ...]:
    """Every name of a slot's tensor."""
    return name, *edit.slots[name].aliases


def _names(edit: Edit, name: str, target: str) -> bool:
    return any(matches(known, target) for known in _known(edit, name))


def check_targets(lora: Lora, names: Sequence[str], what: str) -> None:
    """Raise unless everything that a pass names is among these parameters: asked of a whole model that is captured in parts.

    Args:
        what: how the message calls them.
    """
    targets = () if isinstance(lora.targets, str) else lora.targets
    for target in (*targets, *lora.rank_pattern, *lora.alpha_pattern):
        if not any(matches(name, target) for name in names):
            raise _nothing(target, [(name, "") for name in names], f"{what}: the target")
    for target in lora.modules_to_save:
        if not any(inside(name, target) for name in names):
            raise _nothing(target, [(name, "") for name in names], f"{what}: modules_to_save names")


def matches(name: str, target: str) -> bool:
    """Whether a target names a parameter: its full name, its module's path, or the last parts of that path; of a parameter that is
    not called `weight`, also the last parts of its name."""
    path, leaf = linears.module_of(name)
    return target in (name, path) or path.endswith("." + target) or leaf != "weight" and name.endswith("." + target)


def inside(name: str, target: str) -> bool:
    """Whether a parameter lies in a module that a target names."""
    parts = name.split(".")
    return any(matches(".".join([*parts[:i], "weight"]), target) for i in range(1, len(parts))) or name == target


def _clone(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value.detach().clone()


def _reader(edit: Edit, name: str) -> str:
    """What reads a parameter, in words."""
    for _, node, reason in linears.near(edit.nodes, {name}):
        return f"it {reason} ({meta.provenance(node)})"
    readers = [user for node in edit.nodes if node.op == "get_attr" and node.target == name for user in node.users]
    return f"{readers[0].name} reads it" if readers else "nothing reads it"


def _nothing(target: str, names: Sequence[tuple[str, str]], what: str, adaptable: Set[str] | None = None) -> PassError:
    """The error for a target without effect. names: (parameter, what reads it); adaptable: those that can be adapted."""
    for name, reader in names if adaptable is not None else ():
        if matches(name, target):
            return PassError(f"lora: {what} {target!r} is {name}, which takes no adapter: {reader}",
                             do="linears, embeddings, convolutions and stacks of matrices take one; modules_to_save trains a module whole")
    paths = [linears.module_of(name)[0] for name, _ in names if adaptable is None or name in adaptable]
    pool = list(dict.fromkeys([path.rpartition(".")[2] for path in paths] + paths))
    near = difflib.get_close_matches(target, pool, n=4, cutoff=0.3) or pool[:4]
    return PassError(f"lora: {what} {target!r}, which matches nothing that can be adapted",
                     do=f"the nearest names are {', '.join(near)}" if near else "the program has no linears")
