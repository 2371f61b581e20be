"""Optimizers and their rates: by name, with groups, several at once; what a module configures itself."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fxopt.errors import DataError
from fxopt.runtime.optim import AdamW
from fxopt.train.schedule import Plateau, Schedule, plateaus

Optimizer = torch.optim.Optimizer
Spec = str | Optimizer | Callable[[list[dict[str, Any]]], Optimizer] | Sequence[Optimizer]
"""A name, an optimizer, several, or a function from parameter groups to one."""

DEFAULT_LR = 2e-4
_NAMED: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW, "adamw_8bit": lambda groups, **settings: AdamW(groups, bits=8, **settings), "torch_adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD, "momentum": lambda groups, **settings: torch.optim.SGD(groups, momentum=0.9, **settings),
}


@dataclass(frozen=True)
class Group:
    """Parameters with settings of their own.

    Attributes:
        match: patterns of parameter names (`*lora_B*`, `*embed*`); the first group that matches takes a parameter.
        lr: their rate; None: the run's, times `factor`. weight_decay: None: the run's.
    """

    match: str | tuple[str, ...]
    lr: float | None = None
    factor: float = 1.0
    weight_decay: float | None = None

    def takes(self, name: str) -> bool:
        """Whether a parameter belongs to it."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in ((self.match,) if isinstance(self.match, str) else self.match))


def lora_plus(ratio: float = 16.0) -> tuple[Group, ...]:
    """The B factors of LoRA learn `ratio` times faster than the A factors (Hayou et al., 2024, https://arxiv.org/abs/2402.12354)."""
    return (Group("*lora_B*", factor=ratio),)


def no_decay() -> tuple[Group, ...]:
    """Biases, and what is called a norm, without weight decay."""
    return (Group(("*bias", "*norm*"), weight_decay=0.0),)


def make(spec: Spec, module: nn.Module, lr: float | None, weight_decay: float, groups: Sequence[Group]) -> list[Optimizer]:
    """The optimizers of a run, over the parameters of `module` that require a gradient.

    Raises:
        DataError: an unknown name; settings for an optimizer that is given ready; a group that matches nothing; a parameter in two optimizers.
    """
    if isinstance(spec, Optimizer) or isinstance(spec, Sequence) and not isinstance(spec, str):
        asked = [name for name, given in (("lr", lr is not None), ("weight_decay", bool(weight_decay)), ("groups", bool(groups))) if given]
        if asked:
            raise DataError(f"`{asked[0]}` is for an optimizer that is made here.", where="the trainer", do="Set it in your optimizer.")
        ready = [spec] if isinstance(spec, Optimizer) else list(spec)
        trained = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
        if not any(id(parameter) in trained for optimizer in ready for group in optimizer.param_groups for parameter in group["params"]):
            raise DataError("The optimizer holds no parameter that the model trains.", where=", ".join(type(optimizer).__name__ for optimizer in ready) or "the trainer",
                            do="Make it from the parameters of the model that is trained, after `fxopt.optimize`.")
        return distinct([_stepping(optimizer) for optimizer in ready], module)
    rate = DEFAULT_LR if lr is None else lr
    made = _grouped(module, rate, weight_decay, groups)
    if callable(spec):
        return [_stepping(spec(made))]
    if spec not in _NAMED:
        near = difflib.get_close_matches(spec, _NAMED, 1)
        raise DataError(f"There is no optimizer {spec!r}.", do=f"Use {f'{near[0]}: ' if near else ''}one of {', '.join(_NAMED)}, or give one of torch's.")
    return [_NAMED[spec](made, lr=rate, weight_decay=weight_decay)]


def distinct(found: list[Optimizer], module: nn.Module) -> list[Optimizer]:
    """The same optimizers.

    Raises:
        DataError: two of them hold one parameter, which each step would then move twice.
    """
    held: set[int] = set()
    for optimizer in found:
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        twice = [name for name, parameter in module.named_parameters() if id(parameter) in mine & held]
        if twice:
            raise DataError(f"Parameters are held by two optimizers, and would be moved twice in a step: {len(twice)}.", where=", ".join(twice[:3]),
                            do="Give each parameter to one optimizer, or step them yourself (manual optimization).")
        held |= mine
    return found


def _stepping(optimizer: Optimizer) -> Optimizer:
    """One whose step needs no closure: LBFGS evaluates the model again within a step, which accumulated batches cannot."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise DataError("LBFGS evaluates the model within its step, which the trainer does not do.", where="optimizer", do="Take another optimizer, or a module with manual optimization.")
    return optimizer


def _grouped(module: nn.Module, lr: float, weight_decay: float, groups: Sequence[Group]) -> list[dict[str, Any]]:
    members: list[list[nn.Parameter]] = [[] for _ in (*groups, None)]
    names = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            names.append(name)
            members[next((i for i, group in enumerate(groups) if group.takes(name)), len(groups))].append(parameter)
    made = []
    for group, parameters in zip((*groups, Group("*")), members, strict=True):
        if not parameters and group.match != "*":
            raise DataError(f"No trained parameter is matched by {group.match!r} (or a group before it takes them).", where="groups", do=f"They are called {', '.join(names[:4])}, ...")
        if parameters:
            made.append({"params": parameters, "lr": lr * group.factor if group.lr is None else group.lr,
                         "weight_decay": weight_decay if group.weight_decay is None else group.weight_decay})
    return made


class Rates(Protocol):
    """Who sets the learning rates."""

    def before_step(self, step: int) -> None:
        """Before the step with this number, from 0."""

    def after_step(self) -> None:
        """After each step."""

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        """After each epoch."""

    def see(self, row: Mapping[str, float]) -> None:
        """A row was logged."""

    def restore(self) -> None:
        """Put the rates back as they were before the run."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


class Scheduled:
    """Base rates of the groups, times schedules.

    Args:
        optimizers: of the run. schedules: multiply.
    """

    def __init__(self, optimizers: Sequence[Optimizer], schedules: Sequence[Schedule]) -> None:
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.optimizers, self.schedules = optimizers, schedules
        self.base = [group["lr"] for group in self.groups]
        self.plateaus: list[Plateau] = plateaus(schedules)

    def before_step(self, step: int) -> None:
        """See `Rates`."""
        factor = 1.0
        for schedule in self.schedules:
            factor *= schedule(step)
        for group, base in zip(self._now(), self.base, strict=True):
            group["lr"] = base * factor

    def _now(self) -> list[dict[str, Any]]:
        # looked up each time: loading a state replaces the groups
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def after_step(self) -> None:
        """Nothing."""

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def see(self, row: Mapping[str, float]) -> None:
        """See `Rates`."""
        for plateau in self.plateaus:
            plateau.see(row)

    def restore(self) -> None:
        """See `Rates`."""
        for group, base in zip(self._now(), self.base, strict=True):
            group["lr"] = base

    def state_dict(self) -> dict[str, Any]:
        """See `Rates`."""
        return {"base": list(self.base), "plateaus": [plateau.state_dict() for plateau in self.plateaus]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Rates`."""
        if len(state["base"]) != len(self.base) or len(state["plateaus"]) != len(self.plateaus):
            raise DataError(f"The saved run has {len(state['base'])} parameter groups and {len(state['plateaus'])} plateau schedules, this one {len(self.base)} and {len(self.plateaus)}.",
                            where="learning rates", do="Resume with the same optimizer and schedules.")
        self.base = list(state["base"])
        for plateau, saved in zip(self.plateaus, state["plateaus"], strict=True):
            plateau.load_state_dict(saved)


class TorchSchedules:
    """Schedulers of torch that a module configured: stepped as it says. A `frequency` of steps counts anew in each epoch, as in Lightning.

    Args:
        entries: the schedulers with their settings. step: from a scheduler and the value that it follows (None) to its step; None: its own.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]], step: Callable[[Any, Any], object] | None = None) -> None:
        self.entries, self.step = entries, step or _step
        self.calls = [0] * len(entries)

    def before_step(self, step: int) -> None:
        """Nothing: torch's schedulers set the rates when they are stepped."""

    def after_step(self) -> None:
        """Those by step."""
        self._advance("step", {})

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        """Those by epoch."""
        self._advance("epoch", metrics)
        self.calls = [0 if entry.get("interval", "epoch") == "step" else calls for entry, calls in zip(self.entries, self.calls)]

    def _advance(self, interval: str, metrics: Mapping[str, float]) -> None:
        for i, entry in enumerate(self.entries):
            if entry.get("interval", "epoch") != interval:
                continue
            self.calls[i] += 1
            if self.calls[i] % entry.get("frequency", 1):
                continue
            scheduler, value = entry["scheduler"], None
            if entry.get("reduce_on_plateau", isinstance(scheduler, ReduceLROnPlateau)):
                monitor = entry.get("monitor", "val_loss")
                if monitor not in metrics:
                    if not entry.get("strict", True):
                        continue
                    raise DataError(f"A scheduler follows {monitor!r}, which was not logged.", where=type(scheduler).__name__, do=f"Logged are {', '.join(metrics) or 'no values'}.")
                value = metrics[monitor]
            self.step(scheduler, value)

    def see(self, row: Mapping[str, float]) -> None:
        """Nothing."""

    def restore(self) -> None:
        """Nothing: the rates are the schedulers' own."""

    def state_dict(self) -> dict[str, Any]:
        """See `Rates`."""
        return {"calls": list(self.calls), "schedulers": [entry["scheduler"].state_dict() for entry in self.entries]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Rates`."""
        if len(state.get("schedulers", ())) != len(self.entries):
            raise DataError("The saved run has other schedulers than this one.", where="configure_optimizers", do="Resume with the same schedulers.")
        self.calls = list(state["calls"])
        for entry, saved in zip(self.entries, state["schedulers"], strict=True):
            entry["scheduler"].load_state_dict(saved)


def _step(scheduler: Any, value: float | None) -> None:
    scheduler.step() if value is None else scheduler.step(value)


def configured(returned: Any) -> tuple[list[Optimizer], list[dict[str, Any]]]:
    """Optimizers and schedulers from what `configure_optimizers` returned, in any of the shapes that Lightning takes.

    Raises:
        DataError: another shape.
    """
    optimizers: list[Optimizer] = []
    schedulers: list[Any] = []
    parts = returned if isinstance(returned, (list, tuple)) else [returned]
    if len(parts) == 2 and all(isinstance(part, (list, tuple)) for part in parts):
        optimizers, schedulers = list(parts[0]), list(parts[1])
    else:
        for part in parts:
            if isinstance(part, Mapping) and "optimizer" in part:
                optimizers.append(part["optimizer"])
                schedulers += [part["lr_scheduler"]] if "lr_scheduler" in part else []
            elif part is not None:
                optimizers.append(part)
    entries = [dict(entry) if isinstance(entry, Mapping) else {"scheduler": entry} for entry in schedulers]
    if not all(isinstance(optimizer, Optimizer) for optimizer in optimizers) or not all(hasattr(entry.get("scheduler"), "state_dict") for entry in entries):
        raise DataError(f"configure_optimizers returned {type(returned).__name__}, which holds no optimizers and schedulers of torch.", where="configure_optimizers",
                        do="Return an optimizer, several, {'optimizer': ..., 'lr_scheduler': ...}, or two lists.")
    for entry in entries:
        if entry.get("interval", "epoch") not in ("step", "epoch"):
            raise DataError(f"A scheduler's interval is {entry['interval']!r}.", where="configure_optimizers", do="Write step or epoch.")
    return optimizers, entries
