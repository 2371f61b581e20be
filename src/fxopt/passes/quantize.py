"""Frozen weights stored in few bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx as fx

from fxopt.errors import CheckError, PassError
from fxopt.ir import meta
from fxopt.ir.edit import Edit, rule_here
from fxopt.ir.facts import Stored
from fxopt.ir.program import Made, Slot
from fxopt.kernels.dora_norm import OP as DORA_NORM
from fxopt.kernels.formats import FORMATS, Format, named
from fxopt.kernels.lora_linear import OP as LORA_LINEAR
from fxopt.kernels.lora_linear.grouping import first_parts
from fxopt.kernels.quantized_linear import OP as QUANTIZED_LINEAR
from fxopt.passes import linears, sensitivity
from fxopt.passes.base import Pass, Promise

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The promise's bound over the format's measured error on Gaussian weights: weights with heavier tails lose more.
_MARGIN = 1.3


@dataclass(frozen=True)
class Quantize(Pass):
    """store frozen linear weights in few bits

    Each frozen weight that only linears read is stored in a format of kernels/formats and dequantized inside the op that
    reads it. No dense copy is kept. A weight that the model stores quantized already keeps its format. A trained weight is never taken.

    Attributes:
        format: "nf4" (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314: 4-bit normal-float codes, one fp32 scale per
            64 values, bitsandbytes' layout), "nf4_nested" (scales in 8 bits), "int8" and "fp8" (one scale per row), or another
            name of kernels/formats that can be made from dense weights.
        head: also the output heads (linears that everything else goes through to reach an output, see `linears.heads`). The report
            names what was taken for a head, and why.
        bits: a budget instead of one format: bits per weight on average. Each weight then gets the format that costs least
            loss per byte saved, measured on the example call (see passes/sensitivity.py). The report shows the choice.

    Raises:
        PassError: an unknown format; a budget below the smallest format's; a budget without an example call.
    """

    name: ClassVar[str] = "quantize"
    establishes: ClassVar[frozenset[str]] = frozenset({"quantized"})
    # Gaussian weights in NF4: 9.2% relative error of the stored values (measured on 2048 x 2048); each instance has its own
    promise: ClassVar[Promise] = Promise(values="bounded", bound=0.12, of="weights")
    must_fire: ClassVar[bool] = True

    format: str = "nf4"
    head: bool = False
    bits: float | None = None

    def __post_init__(self) -> None:
        try:
            chosen = named(self.format)
        except CheckError as error:
            raise PassError(f"quantize: {error.what}", do=error.do) from error
        if chosen.quantize is None or chosen.name == "dense":
            makes = [name for name, each in FORMATS.items() if each.quantize is not None and name != "dense"]
            raise PassError(f"quantize: {self.format} weights cannot be made from dense ones", do=f"use {', '.join(makes)}")
        if self.bits is not None and not self.bits > 0:
            raise PassError(f"quantize: bits must be a number above 0, got {self.bits}")
        worst = max(FORMATS[name].error for name in sensitivity.CANDIDATES) if self.bits is not None else chosen.error
        object.__setattr__(self, "promise", Promise(values="bounded", bound=_MARGIN * worst, of="weights"))

    def run(self, edit: Edit) -> None:
        """Rewrite every linear whose weight is frozen."""
        linears.without_asserts(edit)
        reads = _reads(edit)
        heads = {} if self.head or edit.installed.names else linears.heads(edit, reads.products)
        refused: dict[str, str] = {}
        for name, users in reads.uses.items():
            if (reason := self._refuse(edit, name, reads, heads)) is not None:
                refused[name] = reason
                edit.missed("quantize", users[0], f"{name} {reason}")
        for name, node, reason in reads.near:
            edit.missed("quantize", node, f"{name} {reason}")
        if not edit.installed.names:
            self._say_heads(edit, heads)
        plan = self._plan(edit, {name: users for name, users in reads.uses.items() if name not in refused})
        for name, chosen in plan.items():
            for user in reads.uses[name] if not edit.spent else ():
                _rewrite(edit, self.name, name, chosen, user)
        edit.dead()

    def _say_heads(self, edit: Edit, heads: Mapping[str, str]) -> None:
        for name, why in heads.items():
            edit.note(f"{name} is the output head{', and trained' if edit.trainable(name) else ''}: {why}")
        if not self.head and not heads:
            edit.note("no linear is the output head: there is none that everything else reaches an output through")

    def _plan(self, edit: Edit, uses: Mapping[str, list[fx.Node]]) -> Mapping[str, Format]:
        """The format of each weight."""
        formats = edit.installed.formats
        if formats:
            kept = {name: formats[name] for name in uses}
            for line in sensitivity.totals(kept, edit.slots):
                edit.note(f"as the model stores them: {line}")
            return {name: FORMATS[format] for name, format in kept.items()}
        if self.bits is None:
            return {name: FORMATS[self.format] for name in uses}
        if edit.sample is None:
            raise PassError("quantize(bits=...) measures the error of each format on an example call, and there is none",
                            do="give `optimize` the example `inputs`, or name one format")
        # the newest program that reads nothing but the model's own weights
        plain = next(program for program in edit.source.history() if all(slot.made is None for slot in program.slots.values()))
        measured = sensitivity.measure(plain, edit.sample, set(uses))
        for name in uses.keys() - measured.errors.keys():
            edit.missed("quantize", uses[name][0], f"{name} was not seen in the call that errors are measured on: it stays dense")
        slots = {name: edit.slots[name] for name in uses if name in measured.errors}
        chosen = sensitivity.choose(measured.errors, {name: (slot.shape, slot.dtype) for name, slot in slots.items()}, self.bits)
        for line in sensitivity.said(chosen, measured, slots):
            edit.note(line)
        return {name: FORMATS[format] for name, format in chosen.items() if format != "dense"}

    def _refuse(self, edit: Edit, name: str, reads: _Reads, heads: Mapping[str, str]) -> str | None:
        installed, slot = edit.installed, edit.slots[name]
        if name in installed.formats:
            return None
        if installed.formats or installed.adapters:
            return "is dense in a model that is quantized or adapted already: it stays"
        if edit.trainable(name):
            return "is trained: only frozen weights are quantized (put lora before quantize)"
        if slot.aliases:
            return f"is tied to {slot.aliases[0]}"
        if name in heads:
            return "is the output head (quantize(head=true) takes it too)"
        if (other := reads.other(edit, name)) is not None:
            return f"is also read by {meta.placed(other)}, which is not a linear"
        if slot.dtype not in _DTYPES:
            return f"is {slot.dtype}"
        for dtype in reads.dtypes[name]:
            if dtype != slot.dtype and torch.promote_types(dtype, slot.dtype) == dtype:
                return f"is widened from {slot.dtype} to {dtype} where it is read: what a format stands for would not be rounded on the way"
        return None if self.bits is not None else FORMATS[self.format].fits(slot.shape)


@dataclass
class _Reads:
    """What reads the weights that could be quantized.

    Attributes:
        uses: for each weight, the linears, and the ops of this family that have it as a dense base.
        dtypes: for each weight, those that its products are computed in.
        chains: the casts and transposes between weights and products.
        products: for each weight, also those that cannot be quantized, all products with it.
        near: (weight, node, reason) of products that are not read as linears.
    """

    uses: dict[str, list[fx.Node]] = field(default_factory=dict)
    dtypes: dict[str, set[torch.dtype]] = field(default_factory=dict)
    chains: set[fx.Node] = field(default_factory=set)
    products: dict[str, list[fx.Node]] = field(default_factory=dict)
    near: list[tuple[str, fx.Node, str]] = field(default_factory=list)

    def add(self, name: str, node: fx.Node, dtype: torch.dtype, chain: Iterable[fx.Node]) -> None:
        """One more product with a weight."""
        self.uses.setdefault(name, []).append(node)
        self.dtypes.setdefault(name, set()).add(dtype)
        self.chains.update(chain)

    def other(self, edit: Edit, name: str) -> fx.Node | None:
        """A reader of the weight that cannot read a stored one."""
        mine = set(self.uses[name])
        waiting = [node for node in edit.nodes if node.op == "get_attr" and node.target == name]
        while waiting:
            source = waiting.pop()
            for user in source.users:
                if user in self.chains:
                    waiting.append(user)
                elif user not in mine or linears.adds(user, source):
                    return user
        return None


def _reads(edit: Edit) -> _Reads:
    parameters = {name for name, slot in edit.slots.items() if slot.kind == "parameter" and slot.made is None}
    reads = _Reads(products=linears.by_weight(edit.nodes), near=[*linears.near(edit.nodes, parameters), *linears.unread(edit.nodes, parameters)])
    for linear in linears.find(edit.nodes, parameters):
        reads.add(linear.name, linear.node, meta.tensor(linear.node).dtype, linear.chain)
    for node in edit.nodes:
        if node.target is LORA_LINEAR.forward.overload or node.target is DORA_NORM.forward.overload:
            bases = _dense_bases(node)
            for base in bases:
                source = linears.uncast(base)
                reads.add(str(source.target), node, meta.tensor(base).dtype, () if base is source else (base,))
            if node.target is LORA_LINEAR.forward.overload:
                for name in [str(linears.uncast(base).target) for base in bases] or [node.name]:
                    reads.products.setdefault(name, []).append(node)
    return reads


def _dense_bases(node: fx.Node) -> list[fx.Node]:
    """What an op of this family reads as dense bases: weights, or casts of them."""
    if node.target is DORA_NORM.forward.overload:
        bases, formats = node.args[0], [node.args[1]]
    else:
        bases, formats = node.args[1], node.args[2]
    return [bases[place] for place, format in zip(first_parts(formats), formats) if format == "dense"]


def _parts(edit: Edit, by: str, name: str, chosen: Format, like: fx.Node) -> list[fx.Node]:
    """The nodes that read the parts of a stored weight; declares their slots."""
    slot = edit.slots[name]
    return [
        edit.state(Slot(f"{name}.{part.name}", tuple(part.shape(slot.shape)), part.dtype, "buffer", False,
                        Made(by, chosen.quantize, name, item, True, Stored(name, part.name, chosen.name, slot.shape, slot.dtype))), like=like)
        for item, part in enumerate(chosen.parts)
    ]


def _rewrite(edit: Edit, by: str, name: str, chosen: Format, node: fx.Node) -> None:
    parts, shape = _parts(edit, by, name, chosen, node), list(edit.slots[name].shape)
    if node.target is LORA_LINEAR.forward.overload or node.target is DORA_NORM.forward.overload:
        _swap(edit, node, name, parts, chosen)
        return
    user = linears.read(node)  # read again: its input may have been an earlier linear, and be another node now
    x, bias = (linears.cast(edit, n, meta.tensor(node).dtype, node) for n in (user.x, user.bias))
    new = edit.call(QUANTIZED_LINEAR.forward.overload, (x, parts, chosen.name, shape, bias, user.transposed), like=node)
    edit.replace(node, new, rule=rule_here("quantize"))
    edit.erase(node)


def _swap(edit: Edit, node: fx.Node, name: str, parts: list[fx.Node], chosen: Format) -> None:
    """Give an op of this family another base."""
    args: list[Any] = list(node.args)
    at = 0 if node.target is DORA_NORM.forward.overload else 1
    formats = [args[at + 1]] if at == 0 else list(args[at + 1])
    bases: list[fx.Node] = []
    for i, (place, format) in enumerate(zip(first_parts(formats), tuple(formats))):
        mine = list(args[at][place : place + len(named(format).parts)])
        if format == "dense" and str(linears.uncast(mine[0]).target) == name:
            mine, formats[i] = parts, chosen.name
        bases += mine
    args[at], args[at + 1] = bases, formats[0] if at == 0 else formats
    edit.set_args(node, tuple(args))
    edit.rewrote(rule_here("quantize"), node)

