"""dead_code: drop what nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.ir.edit import Edit
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class DeadCode(Pass):
    """drop what nobody reads

    Keeps operators that write into something or draw random numbers: leaving one out would shift the random stream.
    """

    name: ClassVar[str] = "dead_code"
    promise: ClassVar[Promise] = Promise(values="exact")

    def run(self, edit: Edit) -> None:
        """Erase dead nodes."""
        count = edit.dead()
        if count:
            edit.note(f"erased {count} nodes that nobody reads")
