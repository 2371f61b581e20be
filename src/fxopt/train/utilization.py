"""How much of a machine a step uses: of its rate of products where a program says how many there are, else of its memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import FxoptError
from fxopt.runtime.machine import present
from fxopt.runtime.memory import peak_bytes
from fxopt.train.batch import Batch
from fxopt.torch_private import pytree

CARDS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "T4": 65e12, "V100": 125e12}
"""Dense products of 16-bit numbers a second, as the makers say them, by a part of the device's name."""


@dataclass(frozen=True)
class Work:
    """What one step does for each element of its inputs.

    Attributes:
        flops: of matrix products, attention and convolutions, forward and backward, for an element of the batch's first tensor (a token, a
            pixel); what a plan runs again is counted again. None where no program says it. peak: of the machine, FLOPs a second.
        moved: bytes of a step that are weights (read by forward and backward), gradients and optimizer states (read and written): what it
            moves at least.
        predicted: bytes at the peak of a step, by the plan.
    """

    flops: float | None
    peak: float
    moved: int
    predicted: int | None

    def says(self, elements: float, steps: float, seconds: float) -> str:
        """For a progress line: "MFU 41%", or "3.2 GB/s"."""
        if self.flops is not None:
            return f"MFU {self.flops * elements / seconds / self.peak:.1%}"
        return f"{self.moved * steps / seconds / 1e9:.3g} GB/s"


def elements(batch: Batch) -> int:
    """Elements of a batch's first tensor."""
    first = next((leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    return 0 if first is None else first.numel()


def work(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], batch: Batch) -> Work:
    """Asks the plan of an optimized model for its last call, which `batch` is."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    states = sum(t.nbytes for optimizer in optimizers for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    moved = 2 * weights + 2 * sum(parameter.nbytes for parameter in trained) + 2 * states
    plan = _plan(model)
    device = trained[0].device
    flops = None if plan is None else sum(sum(run.work.flops.values()) for level in plan.levels for run in (level.forward, level.backward) if run is not None) / max(1, elements(batch))
    return Work(flops or None, _peak(device, trained[0].dtype) if flops else 0.0, moved, None if plan is None else plan.peak.total)


def _plan(model: Any) -> Any:
    if not callable(getattr(type(model), "plan", None)) or not callable(getattr(type(model), "prepare", None)):
        return None
    try:
        return model.plan()
    except FxoptError:
        return None  # it runs in parts: nobody knows the whole step


def _peak(device: torch.device, dtype: torch.dtype) -> float:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((rate for part, rate in CARDS.items() if part in name), None)
        if known is not None:
            return known
    return present(device.type).flops[str(dtype).removeprefix("torch.") if dtype in (torch.bfloat16, torch.float16) else "float32"]


def measured_bytes(device: torch.device, resident: int | None, weights: int) -> int | None:
    """Peak bytes of a run that began with so many resident ones, counted as a plan does; None where the system does not tell."""
    if device.type == "cuda":
        return peak_bytes(device)
    return None if resident is None else peak_bytes(device) - resident + weights
