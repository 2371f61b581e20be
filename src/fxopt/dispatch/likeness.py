"""Parts that are alike are captured once: the program of one, moved to another, is what a capture of that one would give.

What a module's code does depends on its class, its tensors' kinds, its arguments, and on the attributes that it reads. Two parts are
of one group if they agree in all of it but some attributes. Those are put aside while a part is captured, so that their reads are
seen; the program may be moved to a part that shares every attribute that was read. Groups are made when parts are first looked for,
before adapters make adapted parts differ from others.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from fxopt.ir import torch_patches
from fxopt.ir.copies import moved_state
from fxopt.ir.program import Program
from fxopt.ir.twins import Twins, Unlike
from fxopt.runtime.binding import is_bound

Attribute = tuple[str, str]  # path within the part, name


@dataclass(eq=False)
class Donor:
    """A captured program that may be moved, the kind of call that it is of, and the attributes whose reads were looked at, and seen."""

    path: str
    kind: Any
    program: Program
    watched: frozenset[Attribute]
    read: frozenset[Attribute]


@dataclass(eq=False)
class Group:
    """Parts that are alike. `differing`: for each path, the attributes in which the part differs from the first one."""

    first: nn.Module
    differing: dict[str, frozenset[Attribute]] = field(default_factory=dict)
    donors: list[Donor] = field(default_factory=list)

    def admits(self, path: str, module: nn.Module) -> bool:
        """Take a part into the group, if it is alike."""
        if type(module) is not type(self.first):
            return False
        try:
            twins = Twins(self.first, module)
        except Unlike:
            return False
        names = {id(m): name for name, m in self.first.named_modules()}
        self.differing[path] = frozenset((names[id(m)], name) for m, name in twins.differing if name != "forward" or not is_bound(m))
        return True

    def program(self, path: str, kind: Any) -> Iterator[Program]:
        """Programs of other parts for a kind of call, moved to this one."""
        for donor in self.donors:
            apart = self.differing[path] | self.differing[donor.path]
            if donor.kind == kind and apart <= donor.watched and not apart & donor.read:
                yield moved(donor.program, donor.path, path)

    @contextlib.contextmanager
    def seen(self, shell: nn.Module, part: nn.Module) -> Iterator[tuple[frozenset[Attribute], set[tuple[nn.Module, str]]]]:
        """Inside, reads of the attributes in which the parts differ are seen, in calls of the shell. Yields those attributes, and the reads
        so far. (They are put aside in the calls only: a trace has its own way of looking at attributes, which ours must be on top of.)"""
        watched = frozenset(attribute for found in self.differing.values() for attribute in found)
        modules = dict(part.named_modules())
        here = [(modules[path], name) for path, name in watched if path in modules and name in vars(modules[path])]
        read: set[tuple[nn.Module, str]] = set()

        @contextlib.contextmanager
        def aside() -> Iterator[None]:
            with torch_patches.put_aside(here) as now:
                try:
                    yield
                finally:
                    read.update(now)

        before, shell.__dict__["around"] = shell.__dict__["around"], aside
        try:
            yield watched, read
        finally:
            shell.__dict__["around"] = before

    def give(self, path: str, part: nn.Module, kind: Any, program: Program, watched: frozenset[Attribute], read: set[tuple[nn.Module, str]]) -> None:
        """Let others have a program, if everything that it reads is the part's own and named."""
        names = {id(m): name for name, m in part.named_modules()}
        own = all(name.startswith(f"{path}.") for slot in program.slots.values() for name in (slot.name, *slot.aliases))
        if own and not any(isinstance(value, torch.Tensor) for value in program.constants.values()):
            self.donors.append(Donor(path, kind, program, watched, frozenset((names[id(m)], name) for m, name in read if id(m) in names)))


def moved(program: Program, old: str, new: str) -> Program:
    """A captured program of the part at `old` as one of the part at `new`."""
    slots = {new + name[len(old):]: dataclasses.replace(slot, name=new + name[len(old):], aliases=tuple(new + alias[len(old):] for alias in slot.aliases))
             for name, slot in program.slots.items()}
    return program.replace(graph=moved_state(program.graph, old, new), slots=slots)
