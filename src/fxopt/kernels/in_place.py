"""Ops that write their results into arguments: the steps of optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fxopt.errors import CheckError
from fxopt.kernels.op import FusedOp, _define


@dataclass(frozen=True)
class InPlaceOp(FusedOp):
    """An op whose schema marks what it writes, `Tensor(a!) param`, and returns nothing. It has no derivative.

    In graphs and in use it is `overload`. Called as a FusedOp it works on copies and returns `results` of them, as its
    reference does, so that it is tested like every other op.

    Args:
        results: the arguments after the call, to the tuple of values that the reference returns.
    """

    results: Callable[[Sequence[object]], tuple[torch.Tensor, ...]] = tuple

    def copies(self, args: Sequence[object]) -> list[object]:
        """The arguments, with copies of those that the op writes."""
        written = [argument.alias_info is not None for argument in self.overload._schema.arguments]
        return [arg.detach().clone() if w else arg for arg, w in zip(args, written, strict=True)]

    def __call__(self, *args: object) -> tuple[torch.Tensor, ...]:
        copies = self.copies(args)
        self.overload(*copies)
        return tuple(self.results(copies))


def register_in_place(op: InPlaceOp) -> InPlaceOp:
    """Define the op in the `fxopt` namespace. Returns the op."""
    _define(op.forward)
    return op


def writes(*places: int) -> Callable[[Callable], Callable]:
    """Decorates the body and the launcher of an op that writes the arguments at these places.

    Autograd is told of the writes, as ATen's own in-place ops do. While gradients are recorded, an argument that requires
    one is refused: the graph would not know of the change.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: object) -> None:
            for place, arg in enumerate(args):
                if isinstance(arg, torch.Tensor) and arg.requires_grad and torch.is_grad_enabled():
                    raise CheckError(
                        f"argument {place} requires a gradient, but this op writes in place and has no derivative",
                        where=f"{function.__module__}.{function.__name__}",
                        do="call it under torch.no_grad()",
                    )
            function(*args)
            for place in places:
                if not args[place].is_inference():
                    torch.autograd.graph.increment_version(args[place])

        return run

    return decorate
