"""The one family of errors. Each says what happened, where, and what to do."""

from __future__ import annotations


class FxoptError(Exception):
    """Base of every error that fxopt raises on purpose.

    Args:
        what: what happened, in one sentence.
        where: the place: a module path, a node, a file, a user's source line.
        do: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None) -> None:
        self.what, self.where, self.do = what, where, do
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if do:
            lines.append(f"  do:    {do}")
        super().__init__("\n".join(lines))


class CaptureError(FxoptError):
    """A module could not be captured as a graph, or the captured graph is not equal to the module."""


class Untraceable(CaptureError):
    """A module's code could not be traced for one kind of call: parts of it may be."""


class CallError(FxoptError):
    """A call that no captured program covers and that may not be captured."""


class PassError(FxoptError):
    """A pass could not be parsed, applied, or broke its promise."""


class CheckError(FxoptError):
    """A graph, or the values it computes, failed a check."""


class UnprovenError(CheckError):
    """A check was asked for and found nothing that it could compare: nothing is wrong, and nothing is shown."""


class LowerError(FxoptError):
    """A program could not be cut into regions and bound to its modules."""


class DifferentiatedTwice(LowerError):
    """Gradients of a program were asked for with `create_graph=True`, outside of `differentiable_twice`."""


class DataError(FxoptError):
    """A file, a configuration or a batch is not what it should be."""


class ProcessError(FxoptError):
    """Processes that train together do not fit together, or one of them failed."""
