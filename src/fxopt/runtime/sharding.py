"""A model whose weights lie in pieces on several processes, and are whole around the code that reads them.

The state of a repeated block, and that of everything outside of the blocks, is a `Unit`. Its parameters, and the codes of stored weights,
lie one after the other in flat vectors, one for each dtype and for what trains and what does not; rank r of n holds the r-th of n equal
pieces of each. (Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054, stage 3.) So

* between steps every parameter is the rank's own elements of it, in one dimension, perhaps none: the same `Parameter` object, for optimizers;
* around a block's forward, and again around its backward, its vectors are gathered. The memory is one storage that is emptied and filled,
  so what autograd has saved of a weight finds it again, and no gathered weight outlives its block;
* after a block's backward its gradients are summed over the ranks, each rank gets its piece of the sum, and the rest is dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxopt.errors import CallError
from fxopt.ir.regions import Schedule
from fxopt.runtime.averages import WHOLE
from fxopt.runtime.binding import locate
from fxopt.runtime.pieces import Flat, Member, Ranks, Unit, drawn, exists, read_outside, units_of
from fxopt.torch_private import in_backward, pytree


class Unsharded:
    """What a dispatcher asks of the weights of a model that has them."""

    def shown(self) -> contextlib.AbstractContextManager[None]:
        """See `Sharding`."""
        return contextlib.nullcontext()

    def stand_ins(self) -> contextlib.AbstractContextManager[None]:
        """See `Sharding`."""
        return contextlib.nullcontext()

    def accept(self, model: nn.Module, schedule: Schedule) -> None:
        """See `Sharding`."""


class Sharding(Unsharded):
    """A model in pieces. Every rank must call the model, and run backwards, as often as every other, and its blocks in the same order.

    Args:
        model: whole, and with the same weights on all ranks. callers: the modules whose call is the model's (an optimized model, and its
            original). schedules: of programs that run in place of a module's code, with that module. ranks: who holds the pieces.
    """

    def __init__(self, model: nn.Module, callers: Sequence[nn.Module], schedules: Sequence[tuple[nn.Module, Schedule]], ranks: Ranks) -> None:
        self.ranks = ranks
        self.units = units_of(model, schedules, ranks)
        self.root = self.units[-1]
        self.flat_of = {id(member.held): (flat, member) for unit in self.units for flat in unit.flats for member in flat.members}
        self.depth, self.inert = 0, 0
        self.current: Unit | None = None  # whose backward is under way
        self.seen: set[Member] = set()
        self.given: set[Member] = set()
        self.handles: list[Any] = []
        around = [(caller, self.before_model, lambda output: self.after_model()) for caller in callers]
        around += [(unit.module, partial(self.before_block, unit), partial(self.after_block, unit)) for unit in self.units[:-1]]
        for module, before, after in around:
            assert module is not None
            self.handles += [module.register_forward_pre_hook(_before(before), prepend=True), module.register_forward_hook(_after(after), always_call=True)]

    # -- who sees what --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, parameters have the shapes of the whole ones, and no values: for what asks which kinds they are."""
        if not self.depth and not self.inert:
            self._show()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth and not self.inert:
                self._hide()

    @contextlib.contextmanager
    def stand_ins(self) -> Iterator[None]:
        """Inside, this rank has a whole model of drawn weights: to capture a call, and to compare the graph with the code, which hold for any
        weights. It is not done with the true ones, since the other ranks, which would have to give theirs, have no such call to capture."""
        if self.inert:
            self.inert += 1
            try:
                yield
            finally:
                self.inert -= 1
            return
        members = [member for unit in self.units for member in unit.members]
        before = [[store[name] for store, name in member.places] for member in members]
        random = torch.Generator(members[0].held.device).manual_seed(0)
        self.inert = 1
        try:
            for member in members:
                member.put(drawn(member, random))
            yield
        finally:
            self.inert = 0
            for member, values in zip(members, before, strict=True):
                for (store, name), value in zip(member.places, values, strict=True):
                    store[name] = value

    def accept(self, model: nn.Module, schedule: Schedule) -> None:
        """Whether a program of this model that is new may run on the pieces.

        Raises:
            CallError: it reads a block's weights outside of the block's call.
        """
        for name in read_outside(schedule):
            if not exists(model, name):  # a constant of the program
                continue
            _, store, leaf = locate(model, name)
            unit = next((unit for unit in self.units[:-1] for member in unit.members if any(place[0] is store and place[1] == leaf for place in member.places)), None)
            if unit is not None:
                raise CallError("a program that was captured after the weights were sharded reads them outside of their block", where=name,
                                do="capture one batch of each kind before training (`opt.prepare(batch)`)")

    def _show(self) -> None:
        for unit in self.units:
            for member in unit.members:
                if isinstance(member.held, nn.Parameter) and member.whole.requires_grad != member.held.requires_grad:
                    member.whole.requires_grad_(member.held.requires_grad)
                    member.absent.requires_grad_(member.held.requires_grad)
                member.put(member.absent)

    def _hide(self) -> None:
        for unit in self.units:
            for member in unit.members:
                member.put(member.held)

    # -- a step ----------------------------------------------------------------------------------------------------------

    def before_model(self) -> None:
        """The model's forward begins."""
        if self.inert:
            return
        if not self.depth:
            self._show()
            self.root.gather()
            for member in self.root.members:
                member.put(member.whole)
        self.depth += 1

    def after_model(self) -> None:
        """The model's forward has ended, perhaps with an error."""
        if self.inert or not self.depth:
            return
        self.depth -= 1
        if not self.depth:
            self._hide()  # what is outside of the blocks stays gathered: the backward begins with it, and outputs may be computed from it later

    def before_block(self, unit: Unit) -> None:
        """A block's forward begins."""
        if self.inert:
            return
        if not unit.gathered:
            unit.gather()
        for member in unit.members:
            member.put(member.whole)

    def after_block(self, unit: Unit, output: Any) -> None:
        """A block's forward has ended."""
        if self.inert:
            return
        for member in unit.members:
            member.put(member.absent if self.depth else member.held)
        if in_backward():  # a checkpointed forward that is run again: its backward comes next
            return
        unit.release()
        if torch.is_grad_enabled():
            for value in pytree.tree_leaves(output):
                if isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(lambda _: self._arrive(unit))

    def _arrive(self, unit: Unit) -> None:
        """The backward of a block is about to begin, and that of the one before is over."""
        if self.current is unit:
            return
        if self.current is not None:
            self._end(self.current)
        self.current = unit
        if not unit.gathered:
            unit.gather()

    def _end(self, unit: Unit) -> None:
        for flat in unit.flats:
            if flat.trains():
                self.seen |= {member for member in flat.members if member.whole.grad is not None}
                for member, grad in flat.reduce():
                    if member.held.grad is None:
                        member.held.grad = grad
                    else:
                        if member not in self.given:  # a gradient of a run that goes on in the middle of a step
                            self.seen.add(member)
                        member.held.grad += grad
                    self.given.add(member)
        unit.release()

    def end_backward(self) -> None:
        """A backward is over. On all ranks."""
        if self.current is not None:
            self._end(self.current)
            self.current = None
        self._end(self.root)
        self.root.end()  # only now: an earlier call's backward may come later, and a block may be called twice

    def synchronize(self) -> None:
        """A step's last backward is over: a gradient is None if it is None on all ranks. On all ranks."""
        trained = [member for unit in self.units for flat in unit.flats if flat.trains() for member in flat.members if member.held.requires_grad]
        if not trained:
            return
        had = torch.tensor([member in self.seen or member not in self.given and member.held.grad is not None for member in trained], dtype=torch.int32, device=trained[0].held.device)
        self.ranks.exchange(lambda: dist.all_reduce(had, async_op=True), had.device)
        for member, number in zip(trained, had.tolist(), strict=True):
            if not number:
                member.held.grad = None
        self.seen, self.given = set(), set()

    # -- whole again ------------------------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Give every rank the whole model back, in its own parameters. On all ranks."""
        self.detach()
        for unit in self.units:
            unit.gather()
            with torch.no_grad():
                for member in unit.members:
                    value = member.whole.detach().clone()
                    if isinstance(member.held, nn.Parameter):
                        member.held.data, member.held.grad = value, None
                        delattr(member.held, WHOLE)
                    else:
                        member.held = value
                    member.put(member.held)
            unit.end()

    def detach(self) -> None:
        """Take the hooks off. Exchanges nothing."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def piece_of(self, tensor: Tensor) -> tuple[Flat, Member] | None:
        """The member that a parameter or buffer of the model is a piece of."""
        found = self.flat_of.get(id(tensor))
        return found if found is not None and found[1].held is tensor else None


# Functions and not methods: a copy of the model does not copy the Sharding with its hooks.


def _before(run: Callable[[], None]) -> Callable[..., None]:
    return lambda module, args: run()


def _after(run: Callable[[Any], None]) -> Callable[..., None]:
    return lambda module, args, output: run(output)
