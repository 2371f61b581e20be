"""Which models can lie in pieces: gradients as on one process, whatever calls what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxopt
from fxopt.errors import CallError, DataError
from fxopt.kernels.tolerance import same
from fxopt.train.strategies import strategy_of
from tests.train.processes import together
from tests.train.test_fsdp import QLORA, Model, samples


class Checkpointed(Model):
    def blocks(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return hidden


class Branching(Model):
    """Runs in parts."""

    def blocks(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
            if hidden.abs().max() > 1e9:
                hidden = hidden * 2
        return hidden


class Twice(Model):
    """Each block is called twice, so that its weights are saved by two calls."""

    def blocks(self, hidden: Tensor) -> Tensor:
        for layer in [*self.layers, *self.layers]:
            hidden = layer(hidden)
        return hidden


class Unused(Model):
    def __init__(self) -> None:
        super().__init__()
        self.extra, self.layers[1].extra = nn.Linear(3, 3), nn.Linear(5, 5)


class Outside(Model):
    """A block's weights are read outside of its call."""

    def blocks(self, hidden: Tensor) -> Tensor:
        return super().blocks(hidden) * self.layers[1].scale + self.layers[0].norm.weight


class Wide(Model):
    """Whose logits are worth leaving out of a step."""

    def __init__(self) -> None:
        super().__init__(16, 99)


def optimized(model: type[Model], passes: str, prepared: bool = True) -> Callable[[], Any]:
    return lambda: fxopt.optimize(model(), passes, inputs=samples()[0] if prepared else None)


PLAIN = "canonicalize | fuse"
MODELS: dict[str, Callable[[], Any]] = {
    "checkpointed": Checkpointed, "twice": Twice, "unused": Unused, "branching": Branching, "never captured": optimized(Model, PLAIN, False), "parts": optimized(Branching, PLAIN),
}
SLOW: dict[str, Callable[[], Any]] = {
    "outside, captured": optimized(Outside, PLAIN), "twice, captured": optimized(Twice, PLAIN), "parts with adapters": optimized(Branching, "lora(rank=4) | fuse"),
    "parts, never captured": optimized(Branching, PLAIN, False), "unused, captured": optimized(Unused, PLAIN), "twice, quantized": optimized(Twice, QLORA),
}


def gradients(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, np.ndarray | None]:
    """Summed over some batches, on this process."""
    for batch in batches:
        model(**batch)["loss"].backward()
    return {name: None if parameter.grad is None else parameter.grad.numpy() for name, parameter in model.named_parameters()}


def in_pieces(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, list[np.ndarray] | None]:
    """The same over all processes: the pieces of all ranks."""
    strategy = strategy_of("fsdp")
    strategy.setup(model)
    try:
        for batch in batches:
            loss = model(**batch)["loss"]
            assert not whole_bytes(strategy, slice(-1)), "no block is whole after its forward"
            strategy.backward(model, loss, True)
            assert not whole_bytes(strategy, slice(None)), "nothing is whole after the backward"
        strategy.synchronize(model)
        shared = strategy.share({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
        return {name: [each[name].numpy() for each in shared] if parameter.grad is not None else None for name, parameter in model.named_parameters()}
    finally:
        strategy.close(model)


def whole_bytes(strategy: Any, which: slice) -> int:
    """What the gathered weights of some units take: the last is what lies outside of blocks."""
    return sum(flat.full.untyped_storage().nbytes() for unit in strategy.sharding.units[which] for flat in unit.flats)


def all_of(models: dict[str, Callable[[], Any]]) -> None:
    data, made = samples()[1:5], {name: make() for name, make in models.items()}
    found = together(2, lambda rank: {name: in_pieces(model, data[rank::2]) for name, model in made.items()})
    for name, model in made.items():
        for parameter, expected in gradients(model, data).items():
            for each in found:
                pieces = each[name][parameter]
                assert (pieces is None) == (expected is None), (name, parameter)
                if expected is not None:
                    assert same(torch.from_numpy(np.concatenate(pieces).reshape(expected.shape)), torch.from_numpy(expected)), (name, parameter)


def test_gradients_are_those_of_one_process() -> None:
    all_of(MODELS)


@pytest.mark.slow
def test_gradients_of_more_models() -> None:
    all_of(SLOW)


def refused(hoisted: Any, late: Any, lazy: Any) -> list[str]:
    """What is said of three things that cannot be done, and the loss of a fourth."""
    said = []
    strategy = strategy_of("fsdp")
    try:
        strategy.setup(hoisted)
    except DataError as error:
        said.append(error.what)
    for model in (late, lazy):
        strategy.setup(model)
        try:
            out = model(**samples()[1])
            strategy.backward(model, out["loss"], True)
            out["logits"].sum()
        except CallError as error:
            said.append(error.what)
        strategy.close(model)
    strategy.setup(plain := Outside())
    said.append(str(float(plain(**samples()[1])["loss"])))
    strategy.close(plain)
    return said


def test_what_cannot_be_is_said() -> None:
    """A frozen part that would not run; a program that comes late and reads weights where they are not; logits that are read when the weights
    that make them are gone (not a crash). What plain code reads in the wrong place is NaN, and no number that looks like one."""
    hoisted, late, lazy = optimized(Model, 'lora(rank=2, targets=["layers.2.up"]) | hoist')(), optimized(Outside, PLAIN, False)(), optimized(Wide, "canonicalize | loss")()
    for said in together(2, lambda rank: refused(hoisted, late, lazy)):
        assert len(said) == 4 and "hoist" in said[0] and "outside of their block" in said[1] and "has changed since" in said[2] and said[3] == "nan", said
