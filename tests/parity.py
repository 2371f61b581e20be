"""One model with one adapter, in fxopt and in PEFT: the same values, the same dropout masks; outputs and gradients side by side."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from fxopt.kernels import dropout as dropouts
from fxopt.kernels.lora_linear import OP as LORA_LINEAR
from fxopt.kernels.tolerance import same

PREFIX = "base_model.model."
Batch = Mapping[str, torch.Tensor]


def shake(model: nn.Module, seed: int = 3, scale: float = 0.1) -> None:
    """Move everything that is trained away from its first values (B factors are zero at first)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(trained(model).items()):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, by our names: `p.lora_A.default` is PEFT's `base_model.model.p.lora_A.default.weight`."""
    return {_our_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _our_name(name: str) -> str:
    name = name.removeprefix(PREFIX).replace(".lora_embedding_", ".lora_")
    if ".modules_to_save." in name and name.endswith((".weight", ".bias")):
        name, _, leaf = name.rpartition(".")
        return name if leaf == "weight" else name.replace(".modules_to_save.", ".bias_modules_to_save.")
    return name.removesuffix(".weight") if "lora_" in name else name


def in_peft(model: nn.Module, config: LoraConfig | Mapping[str, LoraConfig]) -> nn.Module:
    """The model in PEFT, with one adapter or several by name; the first is active."""
    configs = {"default": config} if isinstance(config, LoraConfig) else dict(config)
    names = list(configs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, tied weights: PEFT sets the first itself
        made = get_peft_model(model, configs[names[0]], adapter_name=names[0])
        for name in names[1:]:
            made.add_adapter(name, configs[name])
    made.set_adapter(names[0])
    return made


def equal_values(theirs: nn.Module, opt: nn.Module) -> None:
    """Give both the same adapter: every value of the present one, shaken."""
    shake(opt)
    mine, others = trained(opt), trained(theirs)
    assert mine.keys() == others.keys(), sorted(mine.keys() ^ others.keys())
    with torch.no_grad():
        for name, parameter in others.items():
            parameter.copy_(mine[name].view(parameter.shape))


def loss_of(output: Any) -> torch.Tensor:
    return output.loss if hasattr(output, "loss") else output


def compare(theirs: nn.Module, opt: nn.Module, batch: Batch, seed: int | None = None) -> dict[str, torch.Tensor]:
    """Losses, outputs and every adapter gradient equal. Returns our gradients.

    Args:
        seed: of the random numbers, drawn in the same order by both.
    """
    losses, grads, logits = [], [], []
    for model in (theirs, opt):
        model.zero_grad()
        if seed is not None:
            torch.manual_seed(seed)
        output = model(**batch)
        loss = loss_of(output)
        loss.backward()
        losses.append(loss.detach())
        logits.append(torch.as_tensor(output.logits).detach() if hasattr(output, "logits") else loss.detach())
        grads.append({name: parameter.grad for name, parameter in trained(model).items()})
    assert same(*losses), losses
    assert same(logits[0], logits[1].clone())
    assert grads[0].keys() == grads[1].keys() and grads[0], sorted(grads[0].keys() ^ grads[1].keys())
    for name, grad in grads[0].items():
        assert grad is not None and float(grad.norm()) > 0, name
        assert same(grads[1][name], grad.view(grads[1][name].shape)), name
    return grads[1]


class Seen(TorchDispatchMode):
    """The masks that our op draws: for each A factor (by address) what it multiplied its input with."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is LORA_LINEAR.forward.overload:
            x, lora_a, dropout, seeds = args[0], args[5], args[9], args[10]
            for i, a in enumerate(lora_a if dropout else []):
                rows = x.shape[:-1].numel()
                self.masks[a.data_ptr()] = dropouts.mask(seeds[i], rows, x.shape[-1], dropout, x.dtype).view(x.shape)
        return func(*args, **(kwargs or {}))


class Masked(nn.Module):
    """A dropout with a fixed mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask.view(x.shape)  # a Conv1D's input is [tokens, in] in the graph


def copy_masks(theirs: nn.Module, opt: fxopt.Optimized, batch: Batch, seed: int) -> int:
    """Give PEFT's dropouts the masks that our call draws under this seed. Returns how many."""
    torch.manual_seed(seed)
    with Seen() as seen:
        opt(**batch)
    places = {name.removesuffix(".lora_A.default"): p.data_ptr() for name, p in opt.named_parameters() if name.endswith(".lora_A.default")}
    found = 0
    for name, module in theirs.named_modules():
        path = name.removeprefix(PREFIX)
        if path in places and hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Masked(seen.masks[places[path]])
            found += 1
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pair(make: Callable[[], nn.Module], lora: str, config: LoraConfig, batch: Batch, rest: str = "") -> tuple[nn.Module, fxopt.Optimized]:
    """(theirs, ours) with equal values. `lora` are the pass's arguments."""
    theirs = in_peft(make(), config)
    opt = fxopt.optimize(make(), " | ".join(filter(None, ("canonicalize", f"lora({lora})", rest))), inputs=dict(batch))
    equal_values(theirs, opt)
    return theirs, opt


def module_paths(names: Mapping[str, Any]) -> set[str]:
    """Paths of the modules that have an adapter."""
    return {re.sub(r"\.lora_A.*", "", name) for name in names if ".lora_A" in name}
