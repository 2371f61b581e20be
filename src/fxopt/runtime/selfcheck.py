"""One step, original against graph: outputs, every gradient, buffers. State and random state are put back."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from fxopt.errors import CaptureError
from fxopt.ir.program import Program
from fxopt.ir.structure import opened
from fxopt.kernels.tolerance import SELF_CHECK, SELF_CHECK_FLOOR, SELF_CHECK_RESPONSE, SELF_CHECK_ROUNDINGS
from fxopt.runtime.attributes import kept_numbers
from fxopt.runtime.binding import locate
from fxopt.torch_private import TorchDispatchMode, pytree

# All gradients of a step are compared up to this many bytes; beyond, those of some parameters of each kind (see `chosen`).
GRADIENT_BYTES = 128 << 20
_NUMBER = re.compile(r"\d+")


Run = Callable[[Sequence[torch.Tensor]], Any]


@dataclass(frozen=True)
class Step:
    """What one step of a model gave: flat outputs, gradients by name, buffers by name."""

    outputs: list[Any]
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a comparison found: the largest relative error and where, and how much was compared."""

    error: float
    place: str
    gradients: int
    of: int

    def __str__(self) -> str:
        return f"largest relative error {self.error:.1e} at {self.place}; {self.gradients} of {self.of} gradients compared"


@contextlib.contextmanager
def _restored(model: nn.Module, devices: Sequence[int]) -> Iterator[None]:
    places = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]  # a forward may write into a buffer or put another in its place
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng(devices=devices), kept_numbers(model):
        try:
            yield
        finally:
            for module, held in places:
                module._buffers.update(held)
            with torch.no_grad():
                for live, kept in buffers:
                    if live.shape == kept.shape:
                        live.copy_(kept)


def _devices(model: nn.Module, inputs: Sequence[torch.Tensor]) -> list[int]:
    return sorted({t.device.index or 0 for t in (*inputs, *model.parameters()) if t.device.type == "cuda"})


def _copies(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies for one run, which may write into them; what was one tensor stays one, strides are kept."""
    made: dict[int, torch.Tensor] = {}
    return [made.setdefault(id(t), t.detach().clone().requires_grad_(t.requires_grad)) for t in inputs]


def learning(program: Program) -> frozenset[str]:
    """The model's own parameters whose gradients training will use: those that learn, and those that an adapter stands beside."""
    made = [slot.made for slot in program.slots.values() if slot.made is not None]
    beside = {name for m in made for name in (m.source, getattr(m.facts, "target", None)) if name is not None}
    return frozenset(name for name, slot in program.slots.items() if slot.made is None and (program.trainable(name) or name in beside))


def chosen(named: Sequence[tuple[str, torch.Tensor]], limit: int = GRADIENT_BYTES) -> list[tuple[str, torch.Tensor]]:
    """The parameters whose gradients are compared: all, or as many as fit in `limit` bytes, but of each kind at least the first.

    Parameters are of one kind if their names are equal but for the numbers in them: the same weight of repeated layers. Of each
    kind the first, the last, and then those between, in turns.
    """
    kinds: dict[str, list[int]] = {}
    for i, (name, _) in enumerate(named):
        kinds.setdefault(_NUMBER.sub("*", name), []).append(i)
    turns = itertools.zip_longest(*([found[0], *found[:0:-1]] for found in kinds.values()))
    taken: list[int] = []
    for round_, turn in enumerate(turns):
        for i in turn:
            if i is not None and (round_ == 0 or (limit - named[i][1].nbytes) >= 0):
                taken.append(i)
                limit -= named[i][1].nbytes
    return [named[i] for i in sorted(taken)]


def kinds(model: nn.Module) -> frozenset[str]:
    """The first parameter that learns of each kind."""
    return frozenset(name for name, _ in chosen([(name, p) for name, p in model.named_parameters() if p.requires_grad], limit=0))


def step(model: nn.Module, run: Run, inputs: Sequence[torch.Tensor], seed: int, wanted: Container[str] | None = None) -> Step:
    """Run once on copies of the inputs under a seed, take the gradients of the sum of the losses (or of a fixed random projection of the outputs).

    Args:
        wanted: names of parameters; None: all that take a gradient.
    """
    inputs = _copies(inputs)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and (wanted is None or name in wanted)]
    named += [(f"input {i}", t) for i, t in enumerate(inputs) if t.requires_grad]
    chosen_ = chosen(named)
    with _restored(model, _devices(model, inputs)):
        torch.manual_seed(seed)
        outputs = pytree.tree_leaves(opened(run(inputs)))
        gradients: dict[str, torch.Tensor | None] = {name: None for name, _ in chosen_}
        floats = [o for o in outputs if isinstance(o, torch.Tensor) and o.is_floating_point() and o.requires_grad]
        if torch.is_grad_enabled() and floats and chosen_:
            losses = [o for o in floats if o.dim() == 0] or [_projected(o) for o in floats]
            found = _gradients(torch.stack([x.double() for x in losses]).sum(), [p for _, p in chosen_])
            gradients = {name: _dense(g) for name, g in zip(gradients, found)}
        buffers = {name: _dense(b).detach().clone() for name, b in model.named_buffers()}
        plain = [_dense(o).detach().clone() if isinstance(o, torch.Tensor) else o for o in outputs]
    return Step(plain, gradients, buffers)


def _dense(value: Any) -> Any:
    """The same numbers in a tensor that can be compared."""
    return value.to_dense() if isinstance(value, torch.Tensor) and value.layout is not torch.strided else value


def _gradients(total: torch.Tensor, wanted: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Gradients without touching `.grad`; a reentrant checkpoint allows only `backward`, so there `.grad` is put aside."""
    try:
        return list(torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=True))
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
    kept = [t.grad for t in wanted]
    try:
        for t in wanted:
            t.grad = None
        total.backward()
        return [t.grad for t in wanted]
    finally:
        for t, grad in zip(wanted, kept):
            t.grad = grad


def _projected(output: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    direction = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    return (output * direction).sum() / max(output.numel(), 1) ** 0.5


def rounded(model: nn.Module, run: Run, inputs: Sequence[torch.Tensor], seed: int, wanted: Container[str] | None = None) -> list[Step]:
    """Steps of the original with every parameter and buffer (scales of quantized weights) moved by one rounding of its dtype, and one with
    softmaxes in fp64: how much rounding alone can do."""
    kept = [(p, p.detach().clone()) for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
    found = []
    try:
        for trial in range(3):
            generator = torch.Generator().manual_seed(trial)
            with torch.no_grad():
                for p, value in kept:
                    signs = torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8).to(p.device) * 2 - 1
                    p.copy_((value.double() * (1 + torch.finfo(p.dtype).eps * signs)).to(p.dtype))
            found.append(step(model, run, inputs, seed, wanted))
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)
    with _WideSoftmax():
        found.append(step(model, run, inputs, seed, wanted))
    return found


class _WideSoftmax(TorchDispatchMode):
    """Softmaxes in fp64. torch sums one class after the other in each lane: over 49,152 classes of a trained model the loss is off by 1e-5
    (relative) and gradients before its last attention by 1e-4, each time the same way, which no moved parameter shows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SOFTMAXES and args[0].dtype == torch.float32:
            wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
            wide = [torch.float64 if a is torch.float32 else a for a in wide]
            return func(*wide, **(kwargs or {})).float()
        return func(*args, **(kwargs or {}))


_SOFTMAXES = {torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default, torch.ops.aten._softmax_backward_data.default,
              torch.ops.aten._log_softmax_backward_data.default}


def compare(model: nn.Module, expected: Step, found: Step, what: str, rounding: Callable[[], list[Step]] | None = None,
            computed: Iterable[torch.dtype] = ()) -> Outcome:
    """Raise unless two steps agree.

    Args:
        rounding: asked only if they do not at first: see `rounded`. A tensor may then differ by what rounding does to it.
        computed: the floating point dtypes of what lies between inputs and outputs, where it is known.

    Raises:
        CaptureError: naming the first output, gradient or buffer that differs, with both norms.
    """
    if len(expected.outputs) != len(found.outputs):
        raise CaptureError(f"{what} returns {len(found.outputs)} values, the model {len(expected.outputs)}")
    worst, place = 0.0, "nothing"
    # a gradient is no better than the coarsest dtype that it may have passed through
    dtypes = {t.dtype for t in (*model.parameters(), *model.buffers(), *_tensors(expected.outputs)) if t.is_floating_point()} or {torch.float32}
    dtypes |= set(computed) & SELF_CHECK.keys()
    devices = {t.device.type for t in (*model.parameters(), *_tensors(expected.outputs))}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    coarsest = max(SELF_CHECK.get(dtype, 0.0) for dtype in dtypes)
    floor = max(SELF_CHECK_FLOOR, SELF_CHECK_ROUNDINGS * max(torch.finfo(dtype).eps for dtype in dtypes))
    total = max([_length(g) for g in expected.gradients.values() if g is not None] or [0.0])
    pairs = [(f"output {i}", a, b, 0.0) for i, (a, b) in enumerate(zip(expected.outputs, found.outputs))]
    pairs += [(f"the gradient of {name}", grad, found.gradients.get(name), total * floor) for name, grad in expected.gradients.items()]
    pairs += [(f"buffer {name}", b, found.buffers.get(name), 0.0) for name, b in expected.buffers.items()]
    others: list[list[Any]] | None = None
    for index, (name, a, b, scale) in enumerate(pairs):
        error = _relative(a, b, scale)
        if error > _allowed(a, coarsest) and error < float("inf") and rounding is not None:
            if others is None:
                others = [[*s.outputs, *(s.gradients.get(n) for n in expected.gradients), *(s.buffers.get(n) for n in expected.buffers)] for s in rounding()]
            if error <= SELF_CHECK_RESPONSE * max(_relative(a, other[index], scale) for other in others):
                continue
        if error > _allowed(a, coarsest):
            raise CaptureError(f"{what} is not equal to the model: {name} differs by {error:.1e} (relative), {_norm(a)} against {_norm(b)}",
                               where=_owner(model, name), do="the graph is refused; run the model as it is, or exclude the module named here")
        if error > worst:
            worst, place = error, name
    return Outcome(worst, place, len(expected.gradients), sum(1 for p in model.parameters() if p.requires_grad))


def compare_gradients(expected: Step, found: Step, allowed: float) -> Outcome:
    """The largest difference that an approximation of the backward makes to a gradient; outputs may not differ.

    Args:
        allowed: relative, in the Frobenius norm of each gradient; one far below the largest is measured against that.

    Raises:
        CaptureError: a gradient differs by more, is missing, or is not finite where the exact one is; or an output differs.
    """
    for index, (a, b) in enumerate(zip(expected.outputs, found.outputs, strict=True)):
        if isinstance(a, torch.Tensor) and not torch.equal(a, b) and not torch.equal(a.isnan(), b.isnan()):
            raise CaptureError(f"values kept in 8 bits change output {index}", do="this is a defect: report it, and leave `compress` out")
    floor = SELF_CHECK_FLOOR * max([_length(g) for g in expected.gradients.values() if g is not None] or [0.0])
    worst, place = 0.0, "nothing"
    for name, grad in expected.gradients.items():
        error = _relative(grad, found.gradients.get(name), floor)
        if not error <= allowed:
            raise CaptureError(f"with values kept in 8 bits the gradient of {name} differs by {error:.1e} (relative); allowed are {allowed:.1e}",
                               do="leave `compress` out: memory(...) is exact without it")
        if error > worst:
            worst, place = error, f"the gradient of {name}"
    return Outcome(worst, place, len(expected.gradients), len(found.gradients))


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    return [v for v in values if isinstance(v, torch.Tensor)]


def _allowed(value: Any, coarsest: float) -> float:
    if isinstance(value, torch.Tensor) and value.dtype in SELF_CHECK:
        return max(SELF_CHECK[value.dtype], coarsest)
    return 0.0


def _relative(a: Any, b: Any, scale: float) -> float:
    """Relative error in the Frobenius norm; gradients far below the largest one are measured against that."""
    if a is None and b is None:
        return 0.0
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        zero = a if b is None else b
        if isinstance(zero, torch.Tensor) and (a is None or b is None) and not zero.any():
            return 0.0  # a gradient of zeros and no gradient
        return 0.0 if type(a) is type(b) and a == b else float("inf")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.dtype is torch.complex32:
        a, b = a.to(torch.complex64), b.to(torch.complex64)  # a CPU cannot compare it
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    if a.element_size() >= 4:  # in memory traffic, a fifth of what follows; not finite where anything is not
        error = _length(a - b) / max(_length(a), scale, 1e-30)
        if error < float("inf"):
            return error
    x, y = (t.to(torch.complex128) if t.is_complex() else t.double() for t in (a, b))
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return 0.0
    difference = torch.where(same, torch.zeros_like(x), x - y)
    finite = torch.where(x.isfinite(), x, torch.zeros_like(x))
    return float(difference.abs().pow(2).sum().sqrt() / max(float(finite.abs().pow(2).sum().sqrt()), scale, 1e-30))


def _length(tensor: torch.Tensor) -> float:
    """The Frobenius norm in double precision, without a copy in it."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.complex128 if tensor.is_complex() else torch.float64))


def _norm(value: Any) -> str:
    return f"norm {float(value.double().norm()):.4g}" if isinstance(value, torch.Tensor) and value.is_floating_point() else repr(value)[:60]


def _owner(model: nn.Module, name: str) -> str | None:
    known = name.removeprefix("the gradient of ").removeprefix("buffer ")
    try:
        owner, _, _ = locate(model, known)
    except (KeyError, AttributeError):
        return name
    return f"{known} of {type(owner).__name__}"
