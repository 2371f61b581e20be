"""How large values and gradients get on an example call, and what a 16-bit dtype makes of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from fxopt.ir.program import Program, Sample
from fxopt.ir.template import without_autocast
from fxopt.kernels.tolerance import SELF_CHECK_FLOOR
from fxopt.passes.promises import written
from fxopt.passes.verify import SEED


class Refused(Exception):
    """An operator has no kernel for the dtypes that it was given. `node` is where, None on the way back."""

    def __init__(self, node: fx.Node | None, why: str) -> None:
        super().__init__(why)
        self.node, self.why = node, why


@dataclass
class Step:
    """One forward and backward pass of a program.

    Attributes:
        outputs: the flat float outputs, by position.
        gradients: of each trained slot, by name.
        highest: for each float value, by node name, the largest absolute value, NaN among them.
        gradient: for each float value that takes a gradient, the largest absolute element of it.
    """

    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    gradient: dict[str, float] = field(default_factory=dict)


class _Run(fx.Interpreter):
    def __init__(self, program: Program, state: Mapping[str, torch.Tensor], step: Step | None) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=True, graph=program.graph)
        self.constants, self.state, self.step = program.constants, state, step

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = self.state.get(target)
        return found if found is not None else self.constants[target]

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except (RuntimeError, NotImplementedError) as error:
            raise Refused(n, str(error).splitlines()[0]) from error
        if self.step is not None and isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            self.step.highest[n.name] = float(value.detach().abs().max())
            if value.requires_grad and not _view_of_list(value):
                value.register_hook(functools.partial(self._arrived, n.name))
        return value

    def _arrived(self, name: str, gradient: torch.Tensor | None) -> None:
        if self.step is not None and gradient is not None and gradient.numel():
            self.step.gradient[name] = max(self.step.gradient.get(name, 0.0), float(gradient.abs().max()))


def _view_of_list(value: torch.Tensor) -> bool:
    """Items of split and unbind refuse to be written into in place, and hooks of values that are written later are of no use."""
    return value._is_view() and value.grad_fn is not None and "Split" in type(value.grad_fn).__name__


def run(program: Program, sample: Sample, *, observe: bool = False, backward: bool = True, scale: float = 1.0) -> Step:
    """A step of a program on an example call, interpreted; inputs, state and random state stay as they are.

    The gradients are those of the sum of all scalar float outputs; without any, of the sum of all others with random signs, each over the
    root of its size.

    Args:
        observe: also fill `highest` and `gradient` (one reduction for each value, and one for each gradient).
        backward: without it no gradient is formed.
        scale: the loss is multiplied by it, and the gradients are divided by it again.

    Raises:
        Refused: an operator has no kernel for what it reads.
    """
    changed = set(written(program))
    state = {name: _own(value, name in changed, backward and name in program.slots and program.trainable(name))
             for name, value in sample.state.items()}
    inputs = [_own(value, str(node.target) in changed, backward and value.requires_grad)
              for node, value in zip(program.placeholders, sample.inputs)]
    step = Step()
    with torch.random.fork_rng(devices=_devices(sample)), without_autocast(), torch.enable_grad() if backward else torch.no_grad():
        torch.manual_seed(SEED)
        outputs = _Run(program, state, step if observe else None).run(*inputs)
        floats = {i: out for i, out in enumerate(outputs) if isinstance(out, torch.Tensor) and out.is_floating_point()}
        step.outputs = {i: out.detach() for i, out in floats.items()}
        leaves = {name: value for name, value in state.items() if value.requires_grad}
        total = _total([out for out in floats.values() if out.requires_grad])
        if backward and total is not None and leaves:
            try:
                found = torch.autograd.grad(total * scale, list(leaves.values()), allow_unused=True)
            except (RuntimeError, NotImplementedError) as error:
                raise Refused(None, str(error).splitlines()[0]) from error
            step.gradients = {name: grad / scale for name, grad in zip(leaves, found) if grad is not None}
    return step


def _own(value: torch.Tensor, changed: bool, grad: bool) -> torch.Tensor:
    value = value.detach().clone() if changed else value.detach()
    return value.requires_grad_(grad) if value.is_floating_point() else value


def _devices(sample: Sample) -> list[int]:
    return sorted({t.device.index or 0 for t in (*sample.inputs, *sample.state.values()) if t.device.type == "cuda"})


def _total(outputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
    scalars = [out for out in outputs if out.dim() == 0]
    if scalars:
        return torch.stack([out.double() for out in scalars]).sum()
    generator = torch.Generator().manual_seed(SEED)
    signed = [(out * (torch.randint(0, 2, out.shape, generator=generator, dtype=torch.int8).to(out.device) * 2 - 1)).double().sum() / max(out.numel(), 1) ** 0.5
              for out in outputs]
    return torch.stack(signed).sum() if signed else None


# -- what fits ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """The range in which a dtype is used: from its smallest normal number to its largest over `margin`."""

    lowest: float
    largest: float

    @classmethod
    def of(cls, dtype: torch.dtype, margin: float) -> Window:
        return cls(torch.finfo(dtype).tiny, torch.finfo(dtype).max / margin)

    def refuses(self, highest: float) -> str | None:
        """Why a tensor with this largest element does not fit; None if it does, is all zero, or is not finite."""
        if highest > self.largest and math.isfinite(highest):
            return "overflows"
        return "underflows" if 0 < highest < self.lowest else None


def loss_scale(gradients: Sequence[float], window: Window) -> float:
    """The power of two that puts most of the gradients into the window; of several the largest, as a loss scaler would find."""
    exponents = [math.frexp(value)[1] for value in gradients if 0 < value < math.inf]
    if not exponents:
        return 1.0
    first, last = -max(exponents) - 30, -min(exponents) + 30
    powers = range(max(first, -24), min(last, 24) + 1)
    return 2.0 ** max(powers, key=lambda k: (sum(window.refuses(value * 2.0**k) is None for value in gradients), k), default=0)


def outside(step: Step, window: Window, scale: float) -> dict[str, str]:
    """For each value that does not fit, by node name, the reason in words."""
    found: dict[str, str] = {}
    for name, highest in step.highest.items():
        gradient = step.gradient.get(name, 0.0)
        if (why := window.refuses(highest)) is not None:
            found[name] = f"it {why}: its largest element is {highest:.2g}"
        elif (why := window.refuses(gradient * scale)) is not None:
            found[name] = f"its gradient {why}: the largest element is {gradient:.2g}, times the loss scale {gradient * scale:.2g}"
    return found


def difference(exact: Step, found: Step) -> tuple[str, float, str, float]:
    """(output, its relative error, slot, relative error of its gradient) that differ most, in the Frobenius norm. Gradients below a
    thousandth of the largest are measured against that, as in the self-check."""
    outputs = [(f"output {i}", _relative(found.outputs[i], exact.outputs[i], 0.0)) for i in exact.outputs if i in found.outputs]
    floor = SELF_CHECK_FLOOR * max((float(grad.norm()) for grad in exact.gradients.values()), default=0.0)
    gradients = [(name, _relative(found.gradients[name], grad, floor)) for name, grad in exact.gradients.items() if name in found.gradients]
    worst = [max(pairs, key=lambda pair: pair[1], default=("", 0.0)) for pairs in (outputs, gradients)]
    return (*worst[0], *worst[1])


def _relative(value: torch.Tensor, truth: torch.Tensor, floor: float) -> float:
    if truth.numel() == 0:
        return 0.0
    a, b = value.double(), truth.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, torch.zeros_like(a), a - b).norm()
    return float(error / max(float(torch.where(b.isfinite(), b, torch.zeros_like(b)).norm()), floor, torch.finfo(torch.float64).tiny))
