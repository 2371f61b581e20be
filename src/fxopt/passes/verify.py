"""What a pass promised, checked on values: outputs, all gradients and all buffers of the program before and after.

How much may two runs differ that are equal in exact arithmetic? That depends on the program: the gradient of a bias in
front of a batch norm is zero, and what a run shows of it is rounding alone. So the allowed error is measured. The program
runs in fp64 (the truth), and in fp64 with every operation's result, and every gradient on the way back, moved by a
rounding or two of the operation's own dtype in a random direction. What these runs are off by, and what the program itself is
off by, is what rounding can do here; a pass may be off by a small factor of it. The two programs in fp64 are held to the same
factor of what fp64's roundings do: an epsilon that is lost in the roundings of fp32 shows there. What fp64's roundings do is scaled from
those of the program's dtypes, and where that does not explain a difference, measured by noise of fp64's size: an operation that cancels inside
(the backward of a softmax that is 0 and 1) loses digits that no noise on its result shows, and a low precision, in which it is 0 and 1
exactly, loses none.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fxopt.errors import CheckError
from fxopt.ir import meta
from fxopt.ir.edit import random
from fxopt.ir.program import Program
from fxopt.kernels import tolerance
from fxopt.passes.base import Pass, Promise
from fxopt.passes.interpreted import SEED, Draws, materialize, upcast, values

__all__ = ["SEED", "Draws", "Finding", "Runs", "check", "compare", "excess", "materialize", "values"]
NOISY_RUNS = 8
_SURE, _FAR = 5, 1e4  # after so many runs, what is off by so many times more than rounding explains is not explained by more of them
_NOISY_FIRST, _NEARBY_FIRST = 3, 2  # of both kinds some are among those: what cancels inside one operation shows on nearby inputs alone
_LOW = {torch.float16, torch.bfloat16, torch.float32}
_LOST = 2.0**20  # by how much a value inside a step may exceed the largest that it shows, where it cancels
State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Finding:
    """What a comparison found.

    Attributes:
        compared: how many tensors were compared; 0: none, and `says` tells why.
        worst: the tensor that came nearest to the allowed error.
        ratio: its error as a part of the allowed one.
        says: all of that in words.
        zero: of the tensors, those without a finite value other than zero before the pass; `seen`: the others.
    """

    compared: int
    worst: str
    ratio: float
    says: str
    zero: frozenset[str] = frozenset()
    seen: frozenset[str] = frozenset()


class Runs:
    """The values of one program on one call, each kind computed when first asked for.

    Args:
        inputs: one tensor per placeholder.
        state: a value for every slot of the program, and of one that it is compared with (see `materialize`).
        scalars, derive: see `interpreted.values`.
    """

    def __init__(self, program: Program, inputs: Sequence[torch.Tensor], state: State, *, scalars: bool = False,
                 derive: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None) -> None:
        self.program, self.inputs, self.state, self.scalars, self.derive = program, inputs, state, scalars, derive
        self.draws = Draws()
        self._kept: dict[str, list[dict[str, float]]] = {"own": [], "fp64": []}
        self._more = {"own": self._rounding(), "fp64": self._rounding_of_fp64()}

    def computed(self, found: dict[str, torch.Tensor]) -> Runs:
        """The same runs, but what something else computed in place of `own`."""
        other = Runs(self.program, self.inputs, self.state, scalars=self.scalars, derive=self.derive)
        other.__dict__.update(own=found, truth=self.truth)
        return other

    @functools.cached_property
    def own(self) -> dict[str, torch.Tensor]:
        """In the program's own dtypes."""
        return values(self.program, self.inputs, self.state, draws=self.draws, scalars=self.scalars, derive=self.derive)

    @functools.cached_property
    def truth(self) -> dict[str, torch.Tensor]:
        """In fp64, with the random numbers of `own`."""
        assert self.own is not None
        self.draws.replay = True
        return values(self.program, self.inputs, self.state, double=True, draws=self.draws, scalars=self.scalars, derive=self.derive)

    @functools.cached_property
    def eps(self) -> float:
        """Of the finest dtype up to fp32 that the program computes in."""
        return min((torch.finfo(dtype).eps for dtype in meta.float_dtypes(self.program.nodes) & _LOW), default=torch.finfo(torch.float64).eps)

    def errors(self) -> Iterator[dict[str, float]]:
        """How far from fp64 the program's values are by rounding alone, again and again: its own, those with noise, those on nearby
        inputs and state. What was measured once is kept."""
        return self._again("own")

    def errors_of_fp64(self) -> Iterator[dict[str, float]]:
        """How far fp64 is from itself by its own rounding alone, again and again. What was measured once is kept."""
        return self._again("fp64")

    def _again(self, kind: str) -> Iterator[dict[str, float]]:
        yield from self._kept[kind]
        for found in self._more[kind]:
            self._kept[kind].append(found)
            yield found

    def _rounding_of_fp64(self) -> Iterator[dict[str, float]]:
        truth = self.truth
        # noise also breaks ties, which is no rounding: what it does is bounded by the largest value of the step
        most = _LOST * torch.finfo(torch.float64).eps * max((_error(value, torch.zeros_like(value)) for value in truth.values()), default=0.0)
        for i in range(NOISY_RUNS):
            noisy = values(self.program, self.inputs, self.state, double=True, draws=self.draws, noise=SEED + i, fine=True, scalars=self.scalars, derive=self.derive)
            yield {name: min(_error(noisy[name], truth[name]), most) for name in noisy.keys() & truth.keys()}

    def _rounding(self) -> Iterator[dict[str, float]]:
        own, truth = self.own, self.truth
        yield {name: _error(own[name], truth[name]) for name in own.keys() & truth.keys()}
        noisy, nearby = self._noisy(own, truth), self._nearby()
        yield from itertools.chain(itertools.islice(noisy, _NOISY_FIRST), itertools.islice(nearby, _NEARBY_FIRST), noisy, nearby)

    def _noisy(self, own: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> Iterator[dict[str, float]]:
        for i in range(NOISY_RUNS):
            noisy = values(self.program, self.inputs, self.state, double=True, draws=self.draws, noise=SEED + i, scalars=self.scalars, derive=self.derive)
            yield {name: _error(noisy[name], truth[name]) for name in own.keys() & truth.keys()}

    def _nearby(self) -> Iterator[dict[str, float]]:
        generator = torch.Generator().manual_seed(SEED)

        def near(value: torch.Tensor) -> torch.Tensor:
            if value.dtype not in _LOW:
                return value
            return tolerance.nearby(value.detach().cpu(), generator).to(value.device).requires_grad_(value.requires_grad)

        for _ in range(tolerance.NEARBY):
            moved, held = [near(value) for value in self.inputs], {name: near(value) for name, value in self.state.items()}
            eager = values(self.program, moved, held, scalars=self.scalars, derive=self.derive)
            exact = values(self.program, moved, held, double=True, draws=self.draws, scalars=self.scalars, derive=self.derive)
            yield {name: _error(eager[name], exact[name]) for name in eager.keys() & exact.keys()}


def drawn(program: Program) -> list[str]:
    """What the program's random operations draw, in order."""
    return [f"{node.target} {meta.describe(meta.value(node))}" for node in program.nodes if node.op == "call_function" and random(node)]


def check(pass_: Pass, before: Program, after: Program, inputs: Sequence[torch.Tensor], state: State) -> str:
    """Compare a step of `before` and of `after`; return a note on what was found.

    Args:
        inputs: one tensor per placeholder.
        state: a value for every slot of `before` and of `after` (see `materialize`).

    Raises:
        CheckError: naming the tensor that differs most, and by how much.
    """
    if pass_.promise.values == "bounded":
        return "values not compared: the pass promises an approximation"
    scalars = pass_.promise.outputs == "declared"
    return compare(pass_, Runs(before, inputs, state, scalars=scalars), Runs(after, inputs, state, scalars=scalars)).says


def compare(pass_: Pass, old: Runs, new: Runs, *, promise: Promise | None = None, coarser: bool = False) -> Finding:
    """Compare the runs of two programs on one call, as the pass between them promises.

    Args:
        promise: to hold the pass to, if it is another than its own.
        coarser: the pass chose dtypes: the allowed error is what the new program's own roundings do.

    Raises:
        CheckError: naming the tensor that differs most, and by how much.
    """
    promise = promise or pass_.promise
    unmet = _unmet(old.program, new)
    if unmet is not None:
        return Finding(0, "", 0.0, f"values not compared: {unmet}")
    if promise.random == "declared" and drawn(old.program) != drawn(new.program):
        return Finding(0, "", 0.0, "values not compared: the pass draws random numbers of its own, and the others come out differently")
    shared = _same_names(pass_, promise, old, new)
    zero = frozenset(name for name in shared if _says_little(old.own[name]))
    told = {"zero": zero, "seen": frozenset(shared) - zero}
    if promise.values in ("exact", "same"):
        for name in shared:
            if not _equal(old.own[name], new.own[name]) and not _both_nan(old.own[name], new.own[name]):
                raise CheckError(f"{name} is not bitwise equal: {_difference(old.own[name], new.own[name])}", where=f"after {pass_}",
                                 do=f"this is a bug of {pass_.name}: it promises exactly equal values")
        return Finding(len(shared), "", 0.0, f"values compared: {len(shared)} tensors bitwise equal", **told)
    worst, ratio = _within(old, new, shared, coarser)
    if worst and not ratio <= 1.0:
        raise CheckError(f"{worst} differs: {_difference(*_seen(worst, old, new))}, {ratio:.3g} times what rounding explains",
                         where=f"after {pass_}", do=f"this is a bug of {pass_.name}, or its promise should be 'bounded'")
    return Finding(len(shared), worst, ratio, f"values compared: {len(shared)} tensors" + (f", worst {worst} at {ratio:.2g} of the allowed error" if worst else ""), **told)


def _unmet(before: Program, new: Runs) -> str | None:
    names = [node.name for node in new.program.placeholders]
    for assumption in new.program.assumptions:
        if assumption not in before.assumptions and assumption.leaf in names and not assumption.holds(new.inputs[names.index(assumption.leaf)]):
            return f"the given {assumption.leaf} does not meet the pass's assumption"
    return None


def _same_names(pass_: Pass, promise: Promise, old: Runs, new: Runs) -> list[str]:
    """The tensors that both show. None may be lost (where the pass declares its gradients: but those of what it froze), and none of the
    model's own may come to take a gradient."""
    slots = new.program.slots
    frozen = {f"gradient of {name}" for name in slots if not new.program.trainable(name)} if promise.gradients == "declared" else set()
    lost = [name for name in old.own if name not in new.own and name not in frozen]
    if lost:
        raise CheckError(f"{lost[0]} is gone", where=f"after {pass_}")
    known = {f"gradient of {name}" for name in old.program.slots} | {f"gradient of input {node.name}" for node in old.program.placeholders}
    more = [name for name in new.own if name in known and name not in old.own and bool(new.own[name].any())]
    if more:
        raise CheckError(f"{more[0]} is taken, and was not", where=f"after {pass_}", do="a value that was detached is no more")
    return [name for name in old.own if name in new.own]


def _says_little(value: torch.Tensor) -> bool:
    """Whether a tensor is empty, or its elements are all zero or not finite: a wrong rewrite upstream would often not show in it."""
    value = upcast(value)
    return not bool((value.isfinite() & (value != 0)).any())


_FP64 = " in fp64"


def _seen(name: str, old: Runs, new: Runs) -> tuple[torch.Tensor, torch.Tensor]:
    plain = name.removesuffix(_FP64)
    return (old.truth[plain], new.truth[plain]) if name != plain else (old.own[name], new.own[name])


def _within(old: Runs, new: Runs, shared: Sequence[str], coarser: bool) -> tuple[str, float]:
    """The tensor with the largest error, as a multiple of the allowed one.

    One run is now and then exact by luck: before a pass is blamed, see what rounding can do, by ever more runs.
    """
    # a gradient through drawn numbers that fp64 cannot draw again has no truth: it is held to what two orders of the same sums differ by
    for name in [name for name in shared if name not in old.truth or name not in new.truth]:
        if not tolerance.same(old.own[name], new.own[name]):
            return name, float("inf")
    shared = [name for name in shared if name in old.truth and name in new.truth]
    rounding = new if coarser else old
    finer = torch.finfo(torch.float64).eps / rounding.eps
    # state that the pass made was rounded to its dtype when it was made: in fp64 the programs differ by that
    exact = old.derive is not None or not new.program.slots.keys() - old.program.slots.keys()
    spread: dict[str, float] = {}
    of_fp64: dict[str, float] = {}  # measured, where what is scaled from `spread` does not explain a difference
    ratios: dict[str, float] = {}
    seen: list[dict[str, float]] = []
    for errors in rounding.errors():
        seen.append(errors)
        _raise(spread, errors)
        # where dtypes were chosen, whole numbers that are read off floats (an argmax) may be others
        ratios = {name: excess(new.own[name], old.own[name], old.truth[name], spread.get(name, 0.0)) for name in shared
                  if not coarser or old.own[name].is_floating_point()}
        for runs, found in enumerate(itertools.chain([{}], old.errors_of_fp64())) if exact else ():
            _raise(of_fp64, found)
            fine = {name: excess(new.truth[name], old.truth[name], old.truth[name], tolerance.BOTH * max(finer * spread.get(name, 0.0), of_fp64.get(name, 0.0)))
                    for name in shared if old.truth[name].is_floating_point() or old.truth[name].is_complex()}
            ratios |= {name + _FP64: ratio for name, ratio in fine.items()}
            if all(ratio <= 1.0 for ratio in fine.values()) or runs >= _NOISY_FIRST and any(ratio > _FAR for ratio in fine.values()):
                break
        if all(ratio <= 1.0 for ratio in ratios.values()) or any(ratio == float("inf") or len(seen) > _SURE and ratio > _FAR for ratio in ratios.values()):
            break
    worst = max(ratios, key=lambda name: (ratios[name] != ratios[name], ratios[name]), default="")
    return worst, ratios.get(worst, 0.0)


def _raise(highest: dict[str, float], found: Mapping[str, float]) -> None:
    """The larger of two numbers, by name."""
    for name, error in found.items():
        highest[name] = max(highest.get(name, 0.0), error)


def _error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest finite difference; 0 for tensors that hold no floats."""
    if value.shape != truth.shape or not (value.is_floating_point() or value.is_complex()):
        return 0.0
    error = (upcast(value) - upcast(truth)).abs()
    error = error[error.isfinite()]
    return float(error.max()) if error.numel() else 0.0


def excess(got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, spread: float) -> float:
    """The largest error of `got` against `truth`, as a multiple of the allowed one (`kernels.tolerance`, `spread` for eager's error).

    Integers must be equal to eager's, and elements that are not finite must be where eager's are.
    """
    if got.shape != eager.shape or got.dtype != eager.dtype:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    if not (got.is_floating_point() or got.is_complex()):
        return 0.0 if torch.equal(got, eager) else float("inf")
    finite = eager.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return float("inf")
    exact = upcast(truth)[finite]
    if exact.numel() == 0:
        return 0.0
    unit = torch.finfo(got.dtype)
    ulps = tolerance.ULPS_OF_BOTH if got.dtype in (torch.float64, torch.complex128) else tolerance.ULPS
    allowed = tolerance.EAGER * spread + ulps * unit.eps * exact.abs() + unit.tiny
    return float(((upcast(got)[finite] - exact).abs() / allowed).max())


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise; complex numbers of 16 bits, which a CPU cannot compare, as wider ones."""
    if a.dtype is torch.complex32 and b.dtype is torch.complex32:
        a, b = a.to(torch.complex64), b.to(torch.complex64)
    return torch.equal(a, b)


def _both_nan(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """How much two tensors differ, in words."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}"
    gap = (a.double() - b.double()).abs() if not a.is_complex() else (a - b).abs()
    at = int(gap.flatten().nan_to_num(float("inf")).argmax())
    return f"{a.flatten()[at].item():.6g} became {b.flatten()[at].item():.6g} at element {at} of {a.numel()}"
