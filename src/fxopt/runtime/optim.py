"""AdamW with flat averages of 32 or 8 bits."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import CheckError, DataError
from fxopt.runtime.averages import Averages, Own, Settings, kind_of

ROUNDINGS = ("stochastic", "nearest")


class AdamW(torch.optim.Optimizer):
    """AdamW: decoupled weight decay (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101).

    With `bits=32`, states and results are those of `torch.optim.AdamW` up to rounding, and state dicts go both ways. The
    averages of parameters in 16 bits are fp32 (torch's are 16 bits). With `bits=8` the averages take a quarter of the memory
    (Dettmers et al., 2022, https://arxiv.org/abs/2110.02861); parameters of under 4,096 elements keep 32 bits.

    Parameters stay where they are; a parameter without a gradient is left alone, as is its count of steps. A tensor subclass
    (DTensor) has averages of its own kind, one by one; a warning says so.

    Args:
        params: parameters, named parameters, or groups of them with settings of their own, as for any torch optimizer.
        lr, betas, eps, weight_decay: as in torch. Numbers; a tensor is read at each step, which waits for a GPU.
        bits: 32 or 8, of the averages. A setting of a group.
        rounding: of parameters in bf16 or fp16, which are stepped in fp32: "stochastic", so that small updates count on
            average (`fxopt.kernels.stochastic`), or "nearest". A setting of a group.
        seed: of stochastic rounding. A setting of a group.

    Raises:
        DataError: a setting is out of range. CheckError: a parameter, a gradient or a saved state that this optimizer does not
        take; a loaded group asks for what it does not do (amsgrad, maximize, coupled decay, differentiable).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        self._places: dict[Tensor, tuple[Averages, int]] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": bits, "rounding": rounding, "seed": seed}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch. The settings are checked."""
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("differentiable", False)  # torch adds it on loading: a loaded state has the entries of a new one
        _check_settings(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_factor: Tensor | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients.
            grad_factor: 0-dim tensor on the parameters' device that multiplies every gradient on its way in, to clip or
                unscale without a pass of its own; `.grad` is left as it is.

        Returns:
            the closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ready = [param for param in group["params"] if param.grad is not None]
            if new := [param for param in ready if param not in self._places]:
                self._make(new, group["bits"])
            work: dict[Averages, list[int]] = {}
            for param in ready:
                averages, place = self._places[param]
                work.setdefault(averages, []).append(place)
            settings = _settings(group)
            for averages, places in work.items():
                averages.step(sorted(places), settings, grad_factor)
        return loss

    def _make(self, params: Sequence[Tensor], bits: int) -> None:
        """Make averages and states, all zero, for parameters that have none."""
        kinds: dict[tuple[type[Averages], torch.device, torch.dtype], list[Tensor]] = {}
        for param in params:
            kinds.setdefault((kind_of(param, bits), param.device, param.dtype), []).append(param)
        for (kind, _, _), members in kinds.items():
            if kind is Own:
                warnings.warn(
                    f"AdamW: {len(members)} parameters are of type {type(members[0].detach()).__name__}; "
                    "they have averages of their own, not in a flat buffer",
                    stacklevel=3,
                )
            averages = kind(members)
            for place, param in enumerate(members):
                self._places[param] = (averages, place)
                self.state[param] = averages.state(place)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of torch.optim.AdamW for `bits=32`. The averages keep their own dtypes.

        Raises:
            CheckError: see the class. ValueError: other groups.
        """
        # torch casts floating-point states, and codes, to the parameter's dtype. What it cannot see it leaves alone; hooks of
        # the user run before ours.
        handle = self.register_load_state_dict_pre_hook(_sealed)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state that was loaded, copied or unpickled: into flat buffers of our own."""
        super().__setstate__(state)
        saved, self.state, self._places = self.state, defaultdict(dict), {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            _check_settings(group)
            held = [param for param in group["params"] if saved.get(param)]
            self._make(held, group["bits"])
            for param in held:
                averages, place = self._places[param]
                with torch.no_grad():
                    averages.fill(place, {name: _opened(value) for name, value in saved.pop(param).items()})
        for key, value in saved.items():
            self.state[key] = _opened(value)


class _Sealed:
    """A tensor that torch's load_state_dict does not look into."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _sealed(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    def seal(value: Any) -> Any:
        return _Sealed(value) if isinstance(value, Tensor) else value

    state = {
        key: {name: seal(value) for name, value in entry.items()} if isinstance(entry, dict) else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _opened(value: Any) -> Any:
    return value.tensor if isinstance(value, _Sealed) else value


def _settings(group: dict[str, Any]) -> Settings:
    seed = group["seed"] if group["rounding"] == "stochastic" else None
    beta1, beta2 = group["betas"]
    return Settings(float(group["lr"]), float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"]), seed)


def _check_settings(group: dict[str, Any]) -> None:
    wrong = [name for name in ("lr", "eps", "weight_decay") if not float(group[name]) >= 0]
    wrong += [] if len(group["betas"]) == 2 and all(0 <= float(beta) < 1 for beta in group["betas"]) else ["betas"]
    wrong += [] if group["bits"] in (8, 32) else ["bits"]
    wrong += [] if group["rounding"] in ROUNDINGS else ["rounding"]
    wrong += [] if isinstance(group["seed"], int) else ["seed"]
    if wrong:
        raise DataError(
            "AdamW cannot take " + ", ".join(f"{name}={group[name]!r}" for name in wrong),
            where="a parameter group",
            do=f"lr, eps, weight_decay: 0 or more; betas: two numbers from 0 to below 1; bits: 8 or 32; rounding: {' or '.join(ROUNDINGS)}",
        )
    asked = [name for name in ("amsgrad", "maximize", "differentiable") if group.get(name)]
    asked += [] if group.get("decoupled_weight_decay", True) else ["coupled weight decay"]
    if asked:
        raise CheckError(f"the parameter group asks for {', '.join(asked)}", where="fxopt.runtime.optim.AdamW", do="use torch.optim")
