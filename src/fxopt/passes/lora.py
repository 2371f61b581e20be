"""Low-rank adapters on linear-like nodes."""

from __future__ import annotations

import difflib
import functools
import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.ir.facts import LowRank
from fxopt.ir.program import Made, Slot
from fxopt.kernels.lora_linear import OP as LORA_LINEAR
from fxopt.passes import linears
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class Lora(Pass):
    """add low-rank adapters to linears, freeze everything else

    y = x W^T + b becomes y = x W^T + b + (alpha / rank) (x A^T) B^T with A [rank, in] uniform as in the paper's code
    (Kaiming, a = sqrt(5)) and B [out, rank] zero, so that the outputs do not change (Hu et al., 2021,
    https://arxiv.org/abs/2106.09685). The trainable parameters are then exactly the adapters.

    Attributes:
        rank: r.
        alpha: default 2 * rank.
        targets: "all-linear" (every linear-like node but the output head), or names: a module path, its last parts, or a
            parameter's full name. A name that matches nothing is an error.
        seed: of A's first values, which depend on the parameter's name and on nothing else.

    Raises:
        PassError: a target matches nothing, or names a weight that something else than a linear reads.
    """

    name: ClassVar[str] = "lora"
    establishes: ClassVar[frozenset[str]] = frozenset({"adapters"})
    # not "exact": the base product may take another path (mm for bmm) on strided inputs, which is one ulp
    promise: ClassVar[Promise] = Promise(values="tolerance", gradients="declared")
    must_fire: ClassVar[bool] = True

    rank: int = 16
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PassError(f"lora: rank must be at least 1, got {self.rank}")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            object.__setattr__(self, "targets", (self.targets,))
        if not self.targets:
            raise PassError("lora: targets is empty", do='name modules, or write "all-linear"')

    def run(self, edit: Edit) -> None:
        """Rewrite the chosen linears and freeze the model's own parameters."""
        parameters = {name for name, slot in edit.slots.items() if slot.kind == "parameter"}
        found = linears.find(edit.nodes, parameters)
        chosen = self._choose(edit, found)
        alpha = 2.0 * self.rank if self.alpha is None else float(self.alpha)
        for linear in found:
            if linear.name not in chosen:
                continue
            linear = linears.read(linear.node) or linear  # its input may have been an earlier linear, and be another node now
            value = meta.value(linear.weight)
            fan_in, fan_out = linear.features
            dtype = value.dtype if value.dtype == torch.float64 else torch.float32
            a, b = (
                edit.state(Slot(adapter_slot(linear.name, factor), shape, dtype, "parameter", True,
                                Made(self.name, functools.partial(init, linear.name, self.seed, shape, dtype, value.device), linear.name,
                                     facts=LowRank(linear.name, factor, self.rank, alpha, alpha / self.rank, linear.transposed))), like=linear.node)
                for factor, shape, init in (("a", (self.rank, fan_in), kaiming), ("b", (fan_out, self.rank), zeros)))
            x, weight, bias = (linears.cast(edit, n, meta.tensor(linear.node).dtype, linear.node) for n in (linear.x, linear.weight, linear.bias))
            pair = edit.call(LORA_LINEAR.forward.overload, (x, weight, bias, None, [], a, b, alpha / self.rank, linear.transposed), like=linear.node)
            item = edit.item(pair, 0, like=linear.node)
            edit.replace(linear.node, item, rule=rule_here("lora"))
            edit.erase(linear.node)
        edit.dead()
        edit.freeze(name for name, slot in edit.slots.items() if slot.made is None)

    def _choose(self, edit: Edit, found: list[linears.Linear]) -> set[str]:
        names = list(dict.fromkeys(linear.name for linear in found))
        if edit.installed is not None:  # another kind of call of an adapted model: the same adapters
            return {name for name in names if adapter_slot(name, "a") in edit.installed}
        shared = {name: readers for name in names if (readers := linears.others(edit, name, [x for x in found if x.name == name]))}
        tied = {name: edit.slots[name].aliases[0] for name in names if edit.slots[name].aliases and name not in shared}
        if self.targets == "all-linear":
            head = linears.head(edit, found)
            for linear in found:
                if linear.name in shared:
                    edit.missed("lora", linear.node, f"{linear.name} is also read by {shared[linear.name][0].name}")
                elif linear.name in tied:
                    edit.missed("lora", linear.node, f"{linear.name} is tied to {tied[linear.name]}")
                elif linear.name == head:
                    edit.missed("lora", linear.node, f"{linear.name} is the output head, which all-linear leaves out")
            return {name for name in names if name not in shared and name not in tied and name != head}
        chosen: set[str] = set()
        for target in self.targets:
            hits = {name for name in names if any(matches(known, target) for known in (name, *edit.slots[name].aliases))}
            if not hits:
                raise _nothing(target, names)
            for name in hits & shared.keys():
                raise PassError(f"lora: {name} is also read by {shared[name][0].name}, which is not a linear",
                                where=str(meta.provenance(shared[name][0])), do="leave it out of targets: an adapter would change both uses")
            for name in hits & tied.keys():
                raise PassError(f"lora: {name} is tied to {tied[name]}", do="leave it out of targets: an adapter would change both uses")
            chosen |= hits
        return chosen


def matches(name: str, target: str) -> bool:
    """Whether a target names a parameter: its full name, its module's path, or the last parts of that path."""
    path, _ = linears.module_of(name)
    return target in (name, path) or path.endswith("." + target)


def _nothing(target: str, names: list[str]) -> PassError:
    paths = [linears.module_of(name)[0] for name in names]
    pool = list(dict.fromkeys([path.rpartition(".")[2] for path in paths] + paths))
    near = difflib.get_close_matches(target, pool, n=4, cutoff=0.3) or pool[:4]
    return PassError(f"lora: the target {target!r} matches no linear", do=f"the nearest names are {', '.join(near)}" if near else "the program has no linears")


def adapter_slot(weight: str, factor: str) -> str:
    """Where an adapter's factor lives: `<module>.lora_A.default` beside `<module>.weight`."""
    path, leaf = linears.module_of(weight)
    prefix = f"{path}." if path else ""
    return f"{prefix}{'' if leaf == 'weight' else leaf + '_'}lora_{factor.upper()}.default"


def kaiming(name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: torch.Tensor | None) -> torch.Tensor:
    """A's first values, uniform in +-1/sqrt(in), from a generator that depends on the name and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator).to(dtype=dtype, device=device)


def zeros(name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, _: torch.Tensor | None) -> torch.Tensor:
    """B's first values."""
    return torch.zeros(shape, dtype=dtype, device=device)
