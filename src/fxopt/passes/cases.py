"""Inputs to test a program on: drawn by a seed over the sizes that it declares, and adversarial ones.

What an integer input may hold is read off the graph: rows of the tables that it indexes, classes of the losses that it labels. An
integer input of unknown meaning (a mask, offsets) keeps the example's values, repeated or cut to the size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx

from fxopt.errors import CheckError
from fxopt.ir import meta
from fxopt.ir.capture import guards
from fxopt.ir.edit import random
from fxopt.ir.index import full_arguments
from fxopt.ir.program import Program, ShapeGuards
from fxopt.ir.regions import is_view

aten = torch.ops.aten
State = Mapping[str, torch.Tensor]
_KEEPS = {aten.contiguous.default, aten.clone.default, aten.to.dtype, aten._to_copy.default, aten.constant_pad_nd.default, aten.pad.default, aten.reshape.default,
          aten.detach.default, aten.alias.default}
_LOSSES = {aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default}
SIZES = (2, 3, 5, 4, 7, 6, 9)  # what dynamic sizes are drawn from: small, so that a case costs little
_TRIES = 24
_LARGE = 64.0  # times the example: far beyond where exponentials saturate, and still far from the largest fp16
_LARGER = 3.0  # times the matrices: values reach clamps and caps that the model's own weights do not
_OTHER = 0.3  # of its size a parameter is moved by; 0.1 where it is zero: what is 1 or 0 at first hides that it is not read


@dataclass(frozen=True, eq=False)
class Case:
    """One call.

    Attributes:
        name: "given", "drawn 0", "zeros", ...
        inputs: one tensor per placeholder.
        weights: other weights for this case, from the model's; None: the model's.
    """

    name: str
    inputs: tuple[torch.Tensor, ...]
    weights: Callable[[State], dict[str, torch.Tensor]] | None = None

    @property
    def shapes(self) -> list[list[int]]:
        """Of the inputs."""
        return [list(t.shape) for t in self.inputs]


@dataclass(frozen=True)
class Domain:
    """What an integer input may hold: below `high`, and `ignored` where it is a label that does not count."""

    high: int
    ignored: int | None = None


def domain(placeholder: fx.Node) -> Domain | None:
    """The domain of an integer input, followed through views and copies to what it indexes; None if it indexes nothing."""
    highs: list[int] = []
    ignored: list[int] = []
    waiting, seen = [placeholder], {placeholder}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.op != "call_function":
                continue
            if user.target is aten.embedding.default and user.args[1] is node:
                highs += _size(user.args[0], 0)
            elif user.target in _LOSSES and user.args[1] is node:
                logits = meta.tensor(user.args[0])
                highs += _size(user.args[0], 1 if logits is not None and logits.dim() > 1 else 0)
                ignored += [index] if isinstance(index := full_arguments(user)["ignore_index"], int) else []
            elif (user.target in _KEEPS or is_view(user)) and user.args[0] is node and user not in seen:
                seen.add(user)
                waiting.append(user)
    return Domain(min(highs), ignored[0] if ignored else None) if highs else None


def _size(node: fx.Node, dim: int) -> list[int]:
    found = meta.tensor(node)
    return [int(found.shape[dim])] if found is not None and isinstance(found.shape[dim], int) else []


class Maker:
    """Makes cases for one program.

    Args:
        program: as captured.
        example: one tensor per placeholder: the call that it was captured from, or another of its kind.
        seed: of all random numbers.
    """

    def __init__(self, program: Program, example: Sequence[torch.Tensor], seed: int) -> None:
        if len(example) != len(program.placeholders):
            raise CheckError(f"the program takes {len(program.placeholders)} tensors, got {len(example)}", do="give the values of one call")
        self.example, self.seed = tuple(t.detach().requires_grad_(t.requires_grad) for t in example), seed
        self.guards: ShapeGuards = guards(program)
        self.random = any(map(random, program.nodes))
        self.domains = [domain(node) if not t.is_floating_point() else None for node, t in zip(program.placeholders, example)]
        self.masks = [k for k, t in enumerate(example) if self.is_mask(k, t)]
        self.tables = sorted({str(node.args[0].target) for node in program.nodes if node.op == "call_function" and node.target is aten.embedding.default
                              and node.args[0].op == "get_attr" and node.args[0].target in program.slots})
        self.parameters = {name for name, slot in program.slots.items() if slot.kind == "parameter" and slot.dtype.is_floating_point}
        self.symbols = list(dict.fromkeys(s for shape in self.guards.shapes for size in shape for s in sorted(sympy.sympify(size).free_symbols, key=str)))
        # sizes of several inputs that are equal in the example, at one dimension, are one size (ids, mask and labels of one length)
        self.groups = {symbol: min((dim, int(t.shape[dim])) for shape, t in zip(self.guards.shapes, example) for dim, size in enumerate(shape)
                                   if symbol in sympy.sympify(size).free_symbols) for symbol in self.symbols}
        self.leading = {size for shape in self.guards.shapes for size in shape[:1] if isinstance(size, sympy.Symbol)}

    def drawn(self, i: int) -> Case:
        """Other sizes, other values."""
        generator = self.generator(i)
        tensors = self.resized(self.sizes(generator))
        return self.case(f"drawn {i}", tensors, lambda k, t: self.redrawn(k, t, generator, self.padding(k, tensors)))

    def adversarial(self) -> Iterator[Case]:
        """Values and sizes that wrong rewrites have been hidden by, or shown by."""
        floats = any(t.is_floating_point() for t in self.example)
        yield self.case("zeros", self.example, lambda k, t: torch.zeros_like(t) if t.is_floating_point() else t, None if floats else self.without_tables)
        generator = self.generator(1000)
        yield self.case("ties", self.example, lambda k, t: self.tied(k, t, generator, self.padding(k, self.example)))
        yield self.case("large", self.example, lambda k, t: t * _LARGE if t.is_floating_point() else t, self.larger)
        yield Case("other weights", self.example, self.other)
        if any(d is not None and d.ignored is not None for d in self.domains):
            yield self.case("all labels ignored", self.example, self.ignored)
        if self.masks:
            yield self.case("padded", self.example, lambda k, t: self.padded(k, t, self.masks))
        for name, wanted in (("length 1", [s for s in self.symbols if s not in self.leading]), ("batch 1", [s for s in self.symbols if s in self.leading])):
            shapes = self.shapes({**self.present(), **dict.fromkeys(wanted, 1)}) if wanted else None
            if shapes is not None and self.guards.check(shapes) in ("ok", "edge"):
                yield self.case(name, self.resized(shapes), lambda k, t: t)
        # A dropout's mask follows the order in memory, in eager code too; calls reach a program with contiguous inputs.
        if not self.random and any(t.dim() > 1 and t.numel() > 1 for t in self.example):
            yield self.case("not contiguous", self.example, lambda k, t: _transposed_in_memory(t))

    def given(self) -> Case:
        """The example itself."""
        return Case("given", self.example)

    # -- values --------------------------------------------------------------------------------------------------------

    def generator(self, i: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 7919 + i)

    def case(self, name: str, tensors: Sequence[torch.Tensor], change: Callable[[int, torch.Tensor], torch.Tensor],
             weights: Callable[[State], dict[str, torch.Tensor]] | None = None) -> Case:
        """`change(position, tensor)` gives each tensor's value; it keeps shape, dtype and whether a gradient is wanted."""
        made = tuple(change(k, t.detach()).to(t.device, t.dtype).requires_grad_(self.example[k].requires_grad) for k, t in enumerate(tensors))
        return Case(name, made, weights)

    def redrawn(self, k: int, t: torch.Tensor, generator: torch.Generator, padding: torch.Tensor | None) -> torch.Tensor:
        if t.is_floating_point():
            example = self.example[k].detach().double()
            spread = float(example.std()) if example.numel() > 1 else 0.0
            if not spread > 0:  # a constant: what it means is not known
                return t
            return torch.randn(t.shape, generator=generator, dtype=torch.float64) * spread + float(example.mean())
        found = self.domains[k]
        if found is None:
            return t
        ids = torch.randint(0, found.high, t.shape, generator=generator)
        if found.ignored is not None and t.numel():
            real = torch.ones(t.shape, dtype=torch.bool) if padding is None else ~padding
            keeps = (torch.rand(t.shape, generator=generator) >= 0.3) & real
            keeps.view(-1)[(real.view(-1).nonzero()[-1:, 0])] = True  # a batch without any label has no loss
            ids = torch.where(keeps, ids, found.ignored)
        return ids

    def tied(self, k: int, t: torch.Tensor, generator: torch.Generator, padding: torch.Tensor | None) -> torch.Tensor:
        if t.is_floating_point():
            return torch.randint(-1, 2, t.shape, generator=generator) * 0.5
        found = self.domains[k]
        if found is None:
            return t
        one = torch.full_like(t, int(torch.randint(0, found.high, (), generator=generator)))
        return one if padding is None else one.masked_fill(padding.to(one.device), found.ignored)

    def ignored(self, k: int, t: torch.Tensor) -> torch.Tensor:
        found = self.domains[k]
        return torch.full_like(t, found.ignored) if found is not None and found.ignored is not None else t

    def is_mask(self, k: int, t: torch.Tensor) -> bool:
        """A matrix of zeros and ones that indexes nothing."""
        return t.dim() == 2 and t.shape[1] > 2 and not t.is_floating_point() and self.domains[k] is None and bool(((t == 0) | (t == 1)).all())

    def padding(self, k: int, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Where labels are those of padding, if the example's all are ignored there: programs may rely on it, and refuse others."""
        found = self.domains[k]
        if found is None or found.ignored is None:
            return None
        for mask in self.masks:
            if tensors[mask].shape == tensors[k].shape and bool((self.example[k][self.example[mask] == 0] == found.ignored).all()):
                return tensors[mask].detach().cpu() == 0
        return None

    def padded(self, k: int, t: torch.Tensor, masks: Sequence[int]) -> torch.Tensor:
        """The last third of the first row is padding: masks are 0 there, and labels ignored."""
        found, like = self.domains[k], self.example[masks[0]]
        value = 0 if k in masks else found.ignored if found is not None and t.shape == like.shape else None
        if value is None:
            return t
        t = t.clone()
        t[0, like.shape[1] - max(1, like.shape[1] // 3):] = value
        return t

    # -- weights -------------------------------------------------------------------------------------------------------

    def without_tables(self, state: State) -> dict[str, torch.Tensor]:
        """The tables that ids are looked up in are zero."""
        return {name: torch.zeros_like(value) if name in self.tables else value for name, value in state.items()}

    def larger(self, state: State) -> dict[str, torch.Tensor]:
        """Matrices are larger; fp16 would not hold what comes of it."""
        return {name: value * _LARGER if name in self.parameters and value.dim() > 1 and value.dtype is not torch.float16 else value for name, value in state.items()}

    def other(self, state: State) -> dict[str, torch.Tensor]:
        """Every parameter is moved."""
        generator = self.generator(2000)
        found = dict(state)
        for name in sorted(self.parameters & state.keys()):
            value = state[name]
            size = float(value.double().square().mean().sqrt()) if value.numel() else 0.0
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64) * (_OTHER * size if size > 0 else 0.1)
            found[name] = (value.detach() + noise.to(value.device, value.dtype)).to(value.dtype)
        return found

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def present(self) -> dict[sympy.Symbol, int]:
        """The example's sizes."""
        return self.guards.bind(tuple(tuple(t.shape) for t in self.example))

    def shapes(self, bound: Mapping[sympy.Symbol, int]) -> tuple[tuple[int, ...], ...] | None:
        """The inputs' shapes for some sizes; None if one is no positive whole number."""
        found = []
        for shape in self.guards.shapes:
            sizes = [sympy.sympify(size).subs(bound) for size in shape]
            if not all(size.is_Integer and size >= 0 for size in sizes):
                return None
            found.append(tuple(map(int, sizes)))
        return tuple(found)

    def sizes(self, generator: torch.Generator) -> tuple[tuple[int, ...], ...]:
        """Shapes that the program covers; the example's if none of the tries is covered."""
        present = self.present()
        for _ in range(_TRIES if self.symbols else 0):
            sizes = {group: SIZES[int(torch.randint(0, len(SIZES), (), generator=generator))] for group in dict.fromkeys(self.groups.values())}
            picked = {s: sizes[group] for s, group in self.groups.items()}
            shapes = self.shapes({**present, **picked})
            if shapes is not None and self.guards.check(shapes) == "ok":
                return shapes
        return tuple(tuple(t.shape) for t in self.example)

    def resized(self, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The example's values, repeated or cut to other sizes."""
        found = []
        for t, shape in zip(self.example, shapes):
            new = t.detach()
            for dim, size in enumerate(shape):
                if new.shape[dim] != size and new.shape[dim]:
                    new = new.index_select(dim, torch.arange(size, device=new.device) % new.shape[dim])
            found.append(new)
        return found


def cases(program: Program, example: Sequence[torch.Tensor], runs: int, seed: int) -> list[Case]:
    """The example, `runs` drawn cases, and the adversarial ones."""
    maker = Maker(program, example, seed)
    return [maker.given(), *(maker.drawn(i) for i in range(runs)), *itertools.chain(maker.adversarial())]


def _transposed_in_memory(t: torch.Tensor) -> torch.Tensor:
    """Equal values whose last two dimensions lie the other way round in memory."""
    return t if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2)
