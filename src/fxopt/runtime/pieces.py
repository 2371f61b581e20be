"""State as flat vectors in equal pieces on several processes: which elements are where, gathering them, summing gradients into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fxopt.ir.regions import Schedule, repeated_blocks
from fxopt.runtime.averages import WHOLE
from fxopt.runtime.binding import live_state, locate
from fxopt.runtime.stored import StoredWeight

# torch 2.13 gave them new names, and warns of the old.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# Members begin at multiples of so many elements, which is at least the 16 bytes that vector loads of a GPU want.
ALIGNED = 16


@dataclass(eq=False)
class Member:
    """A parameter, or a part of a stored weight.

    Attributes:
        name: its first one. places: every (dict of a module, name in it) that holds it: more than one if it is tied. held: the `Parameter`
            or buffer that it is outside of the run, and a rank's piece [elements] in the run. start: in its vector, in elements.
        whole: the tensor that code reads where the unit is gathered. absent: stands for it where not: of its shape and kind, all NaN (0 in
            whole numbers), so that a weight that is read in the wrong place is seen.
    """

    name: str
    places: list[tuple[dict[str, Any], str]]
    held: Tensor
    shape: torch.Size
    start: int = 0
    whole: Tensor = field(init=False)
    absent: Tensor = field(init=False)

    @property
    def elements(self) -> int:
        """Of all ranks together."""
        return self.shape.numel()

    def put(self, value: Tensor) -> None:
        """Let the modules have this tensor."""
        for store, name in self.places:
            store[name] = value


@dataclass(frozen=True)
class Ranks:
    """The processes that hold the pieces.

    Attributes:
        rank, world: this process, and how many there are, in the default group. exchange: begins an exchange of tensors on this device, and
            waits for its end (as the device waits: for CUDA, the stream does).
    """

    rank: int
    world: int
    exchange: Callable[[Callable[[], dist.Work], torch.device], None]


class Flat:
    """The vector of some members of one dtype, in pieces.

    Args:
        members: they hold whole tensors. ranks: who holds the pieces.
    """

    def __init__(self, members: Sequence[Member], ranks: Ranks) -> None:
        self.members, self.ranks = list(members), ranks
        rank, world = ranks.rank, ranks.world
        first = members[0].held
        end = 0
        for member in self.members:
            member.start, end = end, end + -(-member.elements // ALIGNED) * ALIGNED
        self.length = -(-end // world)
        """Of a piece."""
        with torch.no_grad():
            whole = torch.zeros(self.length * world, dtype=first.dtype, device=first.device)
            for member in self.members:
                whole[member.start : member.start + member.elements] = member.held.detach().reshape(-1)
            self.piece = whole[rank * self.length : (rank + 1) * self.length].clone()
            self.gathered, self.bytes, self.full = True, whole.nbytes, whole
            for member in self.members:
                self._adopt(member)
        self.release()

    def _adopt(self, member: Member) -> None:
        # `set_` and not a view: a count of versions of its own, so that gathering again does not look like a write to autograd
        view = torch.empty(0, dtype=self.full.dtype, device=self.full.device).set_(self.full.untyped_storage(), member.start, member.shape, _strides(member.shape))
        absent = torch.full((), float("nan") if view.is_floating_point() else 0, dtype=view.dtype, device=view.device).expand(member.shape)
        own = self.own(member)
        if isinstance(member.held, nn.Parameter):
            member.whole, member.absent = nn.Parameter(view, member.held.requires_grad), nn.Parameter(absent, member.held.requires_grad)
            member.held.data = own
            setattr(member.held, WHOLE, member.elements)
        else:
            member.whole, member.absent, member.held = view, absent, own
        member.put(member.held)

    def bounds(self, member: Member, rank: int | None = None) -> tuple[int, int]:
        """Which elements of a member a rank (None: this one) holds: from, to."""
        begin = (self.ranks.rank if rank is None else rank) * self.length
        place = [min(max(at - member.start, 0), member.elements) for at in (begin, begin + self.length)]
        return place[0], place[1]

    def own(self, member: Member, piece: Tensor | None = None) -> Tensor:
        """This rank's elements of a member in a piece of the vector (None: of the weights): a view."""
        first, last = self.bounds(member)
        begin = member.start + first - self.ranks.rank * self.length
        return (self.piece if piece is None else piece)[begin : begin + last - first] if last > first else self.piece.new_empty(0)

    def gather(self) -> None:
        """Make the vector whole. On all ranks."""
        if not self.gathered:
            self.full.untyped_storage().resize_(self.bytes)
            self.gathered = True
        self.ranks.exchange(lambda: all_gather(self.full, self.piece, async_op=True), self.full.device)

    def release(self) -> None:
        """Give the memory back."""
        self.full.untyped_storage().resize_(0)
        self.gathered = False

    def trains(self) -> bool:
        """Whether some member takes a gradient."""
        return any(member.held.requires_grad for member in self.members)

    def reduce(self) -> list[tuple[Member, Tensor]]:
        """Sum the gradients of the whole members over the ranks, and forget them. On all ranks.

        Returns:
            each member that trains with this rank's elements of the sum. Gradients of 16 bits are summed in fp32.
        """
        dtype = torch.promote_types(self.piece.dtype, torch.float32)
        grads = self.piece.new_zeros(self.length * self.ranks.world, dtype=dtype)
        for member in self.members:
            if member.whole.grad is not None:
                grads[member.start : member.start + member.elements] = member.whole.grad.reshape(-1)
                member.whole.grad = None
        if grads.device.type == "cpu":
            # gloo's reduce_scatter is an all_reduce whose wait knows no timeout: a rank that died would be waited for without an end
            self.ranks.exchange(lambda: dist.all_reduce(grads, async_op=True), grads.device)
            summed = grads[self.ranks.rank * self.length :][: self.length].to(self.piece.dtype, copy=True)
        else:
            summed = self.piece.new_empty(self.length, dtype=dtype)
            self.ranks.exchange(lambda: reduce_scatter(summed, grads, async_op=True), grads.device)
            summed = summed.to(self.piece.dtype)
        return [(member, self.own(member, summed)) for member in self.members if member.held.requires_grad]


@dataclass(eq=False)
class Unit:
    """What is gathered at once. `module`: around whose calls; None for what lies outside of the blocks."""

    module: nn.Module | None
    flats: list[Flat]

    @property
    def members(self) -> Iterator[Member]:
        """Of all its vectors."""
        return (member for flat in self.flats for member in flat.members)

    def gather(self) -> None:
        """See `Flat`."""
        for flat in self.flats:
            flat.gather()

    def release(self) -> None:
        """See `Flat`."""
        for flat in self.flats:
            flat.release()

    def end(self) -> None:
        """Give the memory back, and let autograd, and outputs that are yet to be computed, know that the values are gone."""
        self.release()
        increment_version([member.whole for member in self.members])

    @property
    def gathered(self) -> bool:
        """Whether its vectors are whole."""
        return all(flat.gathered for flat in self.flats)


def units_of(model: nn.Module, schedules: Sequence[tuple[nn.Module, Schedule]], ranks: Ranks) -> list[Unit]:
    """A unit for each repeated block, and one for the rest, last."""
    blocks = {name: model.get_submodule(name) for name in repeated_blocks(model)}
    outside = {id(value) for owner, schedule in schedules for value in live_state(owner, [name for name in read_outside(schedule) if exists(owner, name)]).values()}
    owners: dict[int, set[str | None]] = {}
    members: dict[int, Member] = {}
    for path, module in model.named_modules():
        block = next((name for name in blocks if path == name or path.startswith(f"{name}.")), None)
        for store in (module._parameters, module._buffers if isinstance(module, StoredWeight) else {}):
            for name, value in store.items():
                if value is not None and not value.is_meta:
                    found = members.setdefault(id(value), Member(f"{path}.{name}".strip("."), [], value, value.shape))
                    found.places.append((store, name))
                    owners.setdefault(id(value), set()).add(None if id(value) in outside else block)
    groups: dict[str | None, list[Member]] = {name: [] for name in blocks} | {None: []}
    for key, member in members.items():
        groups[next(iter(owners[key])) if len(owners[key]) == 1 else None].append(member)
    return [Unit(blocks.get(name) if name is not None else None, _flats(group, ranks)) for name, group in groups.items() if group or name is None]


def _flats(members: Sequence[Member], ranks: Ranks) -> list[Flat]:
    kinds: dict[Any, list[Member]] = {}
    for member in members:
        kinds.setdefault((member.held.dtype, member.held.device, member.held.requires_grad), []).append(member)
    return [Flat(group, ranks) for group in kinds.values()]


def exists(model: nn.Module, name: str) -> bool:
    """Whether a model has a parameter or buffer of this name."""
    try:
        locate(model, name)
    except KeyError:
        return False
    return True


def read_outside(schedule: Schedule) -> list[str]:
    """The state that a program reads elsewhere than in its block's call."""
    found = [name for region in schedule.regions for name in region.state if region.path is None or not name.startswith(f"{region.path}.")]
    return found + [str(source.target) for nodes in schedule.lazy.values() for node in nodes for source in node.all_input_nodes if source.op == "get_attr"]


def _strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


def drawn(member: Member, random: torch.Generator) -> Tensor:
    """A whole tensor in place of a member: normal numbers over the root of the last size for matrices, about 1 for vectors, any whole
    numbers for codes, from 0 to 1 for their scales (which lie in buffers)."""
    shape, like = member.shape, member.whole
    if not like.is_floating_point():
        limits = torch.iinfo(like.dtype)
        return torch.randint(limits.min, limits.max, shape, generator=random, dtype=like.dtype, device=like.device)
    if not isinstance(like, nn.Parameter):
        return torch.rand(shape, generator=random, device=like.device).to(like.dtype)
    normal = torch.randn(shape, generator=random, device=like.device)
    value = normal / shape[-1] ** 0.5 if len(shape) > 1 else 1 + normal / 8
    return nn.Parameter(value.to(like.dtype), like.requires_grad)

