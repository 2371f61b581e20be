"""The moving averages of an optimizer, kept in flat buffers beside parameters that stay where they are.

Parameters are not moved into a flat buffer: as views of one storage they break what reads models. safetensors' `save_model`
refuses such a model, `torch.save` of one parameter writes the storage of all, and `model.to(...)` takes the parameters out of
the buffer without a word. Nor would it pay. 420 adapters of rank 16, 4.9 million elements, fp32, one CPU thread, in ms a step:
torch's for-loop 12.8, foreach 14.9, fused 3.9; ATen's fused step over flat averages and the parameters where they are 2.6;
flat parameters, with gradients gathered by `cat`, 3.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxopt.errors import CheckError
from fxopt.kernels.adamw import OP as ADAMW
from fxopt.kernels.adamw.body import fused_step
from fxopt.kernels.adamw_8bit import OP as ADAMW_8BIT
from fxopt.kernels.adamw_8bit.codes import BLOCK, count, dynamic_maps
from fxopt.kernels.dtypes import wide
from fxopt.torch_private import foreach_copy_, foreach_mul

# Parameters smaller than this keep averages of 32 bits, as in bitsandbytes: the vectors of norms and biases, of which the
# first shares no block with numbers of its own size, and which are no memory worth saving.
SMALLEST_CODED = 4096
WHOLE = "fxopt_elements"
"""The attribute of a parameter that is a process's piece of one: elements of the whole. All processes keep the averages of a parameter alike."""
# Parameters of at least so many elements are stepped where they are, smaller ones gathered, up to so many elements at once.
ALONE, TOGETHER = 1 << 20, 1 << 24


@dataclass(frozen=True)
class Settings:
    """What a step needs beside the tensors; `seed` of the rounding, or None to round to nearest."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    seed: int | None

    @property
    def numbers(self) -> tuple[float, float, float, float, float]:
        """As the ops take them."""
        return self.lr, self.beta1, self.beta2, self.eps, self.weight_decay


class Averages:
    """The averages of parameters of one device and dtype. They step together; each has its own count of steps.

    Args:
        params: they have no averages yet.
    """

    names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.device, self.dtype = params[0].device, params[0].dtype
        self.shapes = [param.shape for param in params]
        self.sizes = [param.numel() for param in params]
        # Each begins a block, so that 8-bit blocks are those of the parameter alone.
        ends = torch.tensor([BLOCK * count(size) for size in self.sizes]).cumsum(0).tolist()
        self.starts = [0, *ends[:-1]]
        self.steps = torch.zeros(len(params))
        self.make(ends[-1])

    def make(self, size: int) -> None:
        """Make the averages of `size` elements, all zero."""
        raise NotImplementedError

    def averages(self, place: int) -> dict[str, Tensor]:
        """The averages of one parameter by name: views."""
        raise NotImplementedError

    def update(self, places: list[int], number: int, settings: Settings, factor: Tensor | None) -> None:
        """Step the parameters at these places, whose step has this number."""
        raise NotImplementedError

    def state(self, place: int) -> dict[str, Tensor]:
        """The state of one parameter, as torch's own AdamW lays it out: views, `step` first."""
        return {"step": self.steps[place], **self.averages(place)}

    def fill(self, place: int, state: Mapping[str, Any]) -> None:
        """Copy a state into one parameter's.

        Raises:
            CheckError: it is laid out differently.
        """
        mine = self.averages(place)
        for name, view in mine.items():
            value = state.get(name)
            if not isinstance(value, Tensor) or value.numel() != view.numel() or (value.dtype != view.dtype and not value.is_floating_point()):
                raise CheckError(
                    f"the saved state of a parameter of {self.sizes[place]} elements has {', '.join(sorted(state))}; {name} does not fit",
                    where=f"averages of {'8' if ADAMW_8BIT in self.ops else '32'} bits",
                    do="load it into an optimizer with the same `bits`, over the same parameters in the same order",
                )
            view.copy_(value.detach().reshape(view.shape))
        self.steps[place] = float(state["step"])

    ops: ClassVar[tuple[Any, ...]] = (ADAMW,)

    def step(self, places: list[int], settings: Settings, factor: Tensor | None) -> None:
        """One step of the parameters at these places, which rise."""
        for place in places:
            self._check(place)
        if len(places) == len(self.params):
            self.steps.add_(1)
        else:
            self.steps[places] += 1
        counts, groups = self.steps.tolist(), {}
        for place in places:
            groups.setdefault(int(counts[place]), []).append(place)
        for number, group in groups.items():
            self.update(group, number, settings, factor)

    def _check(self, place: int) -> None:
        param, grad = self.params[place], self.params[place].grad
        if param.dtype != self.dtype or param.device != self.device or param.shape != self.shapes[place]:
            raise CheckError(
                f"a parameter {list(param.shape)} is {param.dtype} on {param.device}; when it was first stepped it was "
                f"{list(self.shapes[place])}, {self.dtype} on {self.device}",
                where="fxopt.runtime.optim.AdamW",
                do="move or cast the model before the first step, or make a new optimizer",
            )
        if grad.layout != torch.strided:
            raise CheckError("a gradient is sparse", where=f"a parameter {list(param.shape)}", do="use torch.optim.SparseAdam for it")


class Listed(Averages):
    """fp32 and fp64: ATen steps the list of tensors, each where it is."""

    def make(self, size: int) -> None:
        first, second = (torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(2))
        self.first, self.second = ([whole[a : a + n].view(shape) for a, n, shape in self._cuts()] for whole in (first, second))

    def _cuts(self) -> Iterator[tuple[int, int, torch.Size]]:
        return zip(self.starts, self.sizes, self.shapes, strict=True)

    def averages(self, place: int) -> dict[str, Tensor]:
        return {"exp_avg": self.first[place], "exp_avg_sq": self.second[place]}

    def update(self, places: list[int], number: int, settings: Settings, factor: Tensor | None) -> None:
        params, first, second = (
            each if len(places) == len(each) else [each[place] for place in places] for each in (self.params, self.first, self.second)
        )
        grads = [_like(param.grad, param) for param in params]
        if factor is not None:
            grads = list(foreach_mul(grads, factor.to(self.dtype)))
        fused_step(params, grads, first, second, *settings.numbers, number)


def _like(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in the parameter's dtype and contiguous."""
    grad = grad if grad.dtype == param.dtype else grad.to(param.dtype)
    return grad if grad.is_contiguous() else grad.contiguous()


class Own(Listed):
    """Tensor subclasses, such as DTensor: averages of their own kind, one by one."""

    def make(self, size: int) -> None:
        self.first, self.second = ([torch.zeros_like(param) for param in self.params] for _ in range(2))


class Flat(Averages):
    """Any dtype and strides: our op over flat buffers. Small parameters and gradients are gathered, large ones are not."""

    def make(self, size: int) -> None:
        self.flat = [torch.zeros(size, dtype=wide(self.dtype), device=self.device) for _ in range(2)]

    def averages(self, place: int) -> dict[str, Tensor]:
        start, size = self.starts[place], self.sizes[place]
        return {name: flat[start : start + size].view(self.shapes[place]) for name, flat in zip(self.names, self.flat, strict=True)}

    def update(self, places: list[int], number: int, settings: Settings, factor: Tensor | None) -> None:
        for run in self._runs(places):
            seed = None if settings.seed is None else settings.seed * 1_000_003 + number * 8191 + run[0]
            params = [self.params[place] for place in run]
            start, stop = self.starts[run[0]], self.starts[run[-1]] + self.sizes[run[-1]]
            if len(run) == 1 and params[0].is_contiguous():
                self.call(params[0].detach(), params[0].grad, start, stop, factor, settings, number, seed)
                continue
            param, grad = self._gathered(params, run), self._gathered([each.grad for each in params], run)
            self.call(param, grad, start, stop, factor, settings, number, seed)
            new = [param[a : a + n].view(shape) for a, n, shape in ((self.starts[i] - start, self.sizes[i], self.shapes[i]) for i in run)]
            foreach_copy_(params, new)

    def _runs(self, places: list[int]) -> Iterator[list[int]]:
        """Neighbours to be gathered, and large parameters alone."""
        run: list[int] = []
        for place in places:
            large = self.sizes[place] >= ALONE
            if run and (large or place != run[-1] + 1 or self.starts[place] + self.sizes[place] - self.starts[run[0]] > TOGETHER):
                yield run
                run = []
            run.append(place)
            if large:
                yield run
                run = []
        if run:
            yield run

    def _gathered(self, tensors: list[Tensor], run: list[int]) -> Tensor:
        """One flat copy, with zeros up to where the next begins."""
        parts = []
        for tensor, place in zip(tensors, run, strict=True):
            gap = -self.sizes[place] % BLOCK
            parts += [tensor.reshape(-1)] + ([tensor.new_zeros(gap)] if gap and place != run[-1] else [])
        return torch.cat(parts)

    def call(
        self, param: Tensor, grad: Tensor, start: int, stop: int, factor: Tensor | None, settings: Settings, number: int, seed: int | None
    ) -> None:
        """One call of the op for the averages from start to stop."""
        averages = [flat[start:stop] for flat in self.flat]
        ADAMW.overload(param, grad, *averages, factor, *settings.numbers, number, seed)


class Coded(Flat):
    """Averages of 8 bits."""

    names = ("exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_codes", "exp_avg_sq_absmax")
    ops = (ADAMW_8BIT,)

    def make(self, size: int) -> None:
        kinds = ((size, torch.uint8), (size // BLOCK, torch.float32)) * 2
        self.flat = [torch.zeros(length, dtype=dtype, device=self.device) for length, dtype in kinds]
        self.maps = dynamic_maps(self.device)

    def averages(self, place: int) -> dict[str, Tensor]:
        start, size = self.starts[place], self.sizes[place]
        first, blocks = start // BLOCK, count(size)
        codes, maxima, codes_sq, maxima_sq = self.flat
        views = []
        for code, absmax in ((codes, maxima), (codes_sq, maxima_sq)):
            views += [code[start : start + size].view(self.shapes[place]), absmax[first : first + blocks]]
        return dict(zip(self.names, views, strict=True))

    def call(
        self, param: Tensor, grad: Tensor, start: int, stop: int, factor: Tensor | None, settings: Settings, number: int, seed: int | None
    ) -> None:
        first, last = start // BLOCK, count(stop)
        codes, maxima, codes_sq, maxima_sq = self.flat
        averages = (codes[start:stop], maxima[first:last], codes_sq[start:stop], maxima_sq[first:last])
        ADAMW_8BIT.overload(param, grad, *averages, self.maps, factor, *settings.numbers, number, seed)


BY_BLOCK = frozenset(Coded.names[1::2])
"""The averages that have an element for each block of a parameter, and not for each of its elements."""


def kind_of(param: Tensor, bits: int) -> type[Averages]:
    """How the averages of a parameter are kept.

    Raises:
        CheckError: they cannot be kept as asked.
    """
    what = f"a parameter {list(param.shape)}, {param.dtype}"
    if not param.is_floating_point():
        raise CheckError("only floating-point parameters can be trained by AdamW", where=what)
    if type(param.detach()) is not Tensor:
        if bits == 8 or param.dtype not in (torch.float32, torch.float64):
            raise CheckError(
                f"a {type(param.detach()).__name__} can have averages of its own kind only, in its own dtype",
                where=what,
                do="use bits=32 and parameters in fp32 (FSDP2: a MixedPrecisionPolicy computes in bf16), or torch.optim.AdamW",
            )
        return Own
    if bits == 8 and getattr(param, WHOLE, param.numel()) >= SMALLEST_CODED:
        if param.dtype == torch.float64:
            raise CheckError("averages of 8 bits are computed in fp32, which is too little for fp64", where=what, do="use bits=32")
        return Coded
    return Listed if param.dtype in (torch.float32, torch.float64) and param.is_contiguous() else Flat
