"""Random states: of Python, numpy and torch, as plain data that a checkpoint can hold."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fxopt.errors import DataError


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def mixed(*numbers: int) -> int:
    """One seed of 63 bits from several numbers: the streams of neighbours are unrelated (numpy's SeedSequence)."""
    low, high = np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(2, np.uint32)
    return (int(high) << 32 | int(low)) & (2**63 - 1)


def states(devices: bool = True) -> dict[str, Any]:
    """The states of all global generators: plain values and tensors. `devices`: of GPUs too."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, numbers, gauss = random.getstate()
    found = {
        "python": {"version": version, "state": torch.tensor(numbers, dtype=torch.int64), "gauss": gauss},
        "numpy": {"kind": kind, "keys": torch.from_numpy(keys.astype(np.int64)), "position": position, "has_gauss": has_gauss, "cached": cached},
        "torch": torch.get_rng_state(),
    }
    if devices and torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def restore(found: Mapping[str, Any]) -> None:
    """Put the states back.

    Raises:
        DataError: they are of other generators, or of another number of GPUs.
    """
    try:
        python, legacy = found["python"], found["numpy"]
        random.setstate((python["version"], tuple(python["state"].tolist()), python["gauss"]))
        np.random.set_state((legacy["kind"], legacy["keys"].numpy().astype(np.uint32), legacy["position"], legacy["has_gauss"], legacy["cached"]))
        torch.set_rng_state(found["torch"])
        if "cuda" in found and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(found["cuda"])
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise DataError(f"The random states do not fit: {error}.", do="Resume on the same release of Python, numpy and torch, and as many GPUs.") from error


_Raw = tuple[Any, Any, torch.Tensor]


def _raw() -> _Raw:
    return random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()


def _set(raw: _Raw) -> None:
    random.setstate(raw[0])
    np.random.set_state(raw[1])
    torch.set_rng_state(raw[2])


@contextlib.contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Inside, the CPU's global generators go their own way (from `seed`, if one is given); after it they are as before."""
    before = _raw()
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
        yield
    finally:
        _set(before)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, if it is wanted, torch uses only algorithms that give equal bits each time."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Stream:
    """A random state of its own for code that draws from the global generators: inside `with stream:` they continue where the
    last block ended. 0.2 ms a block, most of it numpy's."""

    def __init__(self, seed: int) -> None:
        with isolated(seed):
            self.raw = _raw()
        self._outer: _Raw | None = None

    def __enter__(self) -> None:
        self._outer = _raw()
        _set(self.raw)

    def __exit__(self, *error: object) -> None:
        assert self._outer is not None
        self.raw = _raw()
        _set(self._outer)
