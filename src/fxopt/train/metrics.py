"""Values that are averaged over many batches: of an evaluation, or of an epoch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fxopt.errors import DataError
from fxopt.train.batch import Batch

if TYPE_CHECKING:
    from fxopt.train.strategies import Strategy


@runtime_checkable
class Metric(Protocol):
    """A metric with a memory (as in torchmetrics, which may be given as they are)."""

    def update(self, output: Any, batch: Batch) -> None:
        """Take in what the model returned for a batch."""

    def compute(self) -> Any:
        """The value over everything since `reset`."""

    def reset(self) -> None:
        """Forget everything."""


Values = Callable[[Any, Batch], Tensor]
"""From what the model returned for a batch to one value for each sample; averaged over all of them."""


class Means:
    """Weighted means by name, and metrics with a memory of their own."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        self.objects: dict[str, Any] = {}

    def add(self, name: str, value: Any, weight: float = 1.0) -> None:
        """One more value of a name; or a metric object, which is asked at the end.

        Raises:
            DataError: it is not one number.
        """
        if hasattr(value, "compute") and hasattr(value, "reset"):
            self.objects[name] = value
            return
        if isinstance(value, Tensor) and value.numel() != 1:
            raise DataError(f"{name} has {value.numel()} values; single numbers are averaged.", where="a metric", do="Log its mean, or give it as a metric.")
        total, weights = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = total + float(value.detach() if isinstance(value, Tensor) else value) * weight, weights + weight

    def results(self, strategy: Strategy) -> dict[str, float]:
        """The means over all ranks, equal on them; NaN where the weights are all 0. Forgets everything.

        Raises:
            DataError: a metric with a memory that cannot be added over several ranks.
        """
        if strategy.world > 1:
            self._meet(strategy)
        found = {name: total / weights if weights else math.nan for name, (total, weights) in self.sums.items()}
        for name, metric in self.objects.items():
            found[name] = float(metric.compute())
            metric.reset()
        self.sums, self.objects = {}, {}
        return found

    def _meet(self, strategy: Strategy) -> None:
        """Add the sums of all ranks. fsum is exact, so the result does not depend on the order of ranks."""
        shared = strategy.share([{name: list(pair) for name, pair in self.sums.items()}, list(self.objects)])
        names = dict.fromkeys(name for sums, _ in shared for name in sums)
        self.sums = {name: (math.fsum(sums[name][0] for sums, _ in shared if name in sums), math.fsum(sums[name][1] for sums, _ in shared if name in sums)) for name in names}
        for name in {name: None for _, objects in shared for name in objects}:
            # torchmetrics adds its states over the ranks in `compute`, which all of them must call
            if not hasattr(self.objects.get(name), "dist_reduce_fx") and not hasattr(self.objects.get(name), "_reductions"):
                raise DataError(f"The metric {name} has a memory that cannot be added over {strategy.world} processes.", where=name,
                                do="Give a function (output, batch) to one value for each sample, a metric of torchmetrics that sees a batch on every rank, or evaluate with strategy=\"single\".")

    def state_dict(self) -> dict[str, Any]:
        """The sums so far."""
        return {name: list(pair) for name, pair in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.sums = {name: (pair[0], pair[1]) for name, pair in state.items()}


def feed(metrics: Mapping[str, Metric | Values], means: Means, output: Any, batch: Batch, prefix: str) -> None:
    """Give a batch's output to metrics.

    Raises:
        DataError: a metric function gave no tensor of values.
    """
    for name, metric in metrics.items():
        if isinstance(metric, Metric) and not inspect.isfunction(metric):
            metric.update(output, batch)
            means.objects[f"{prefix}{name}"] = metric
            continue
        values = metric(output, batch)
        if not isinstance(values, Tensor) or not values.numel():
            raise DataError(f"The metric {name} gave {type(values).__name__}; one value for each sample is wanted.", where=name, do="Return a tensor such as `output.argmax(-1) == labels`.")
        means.add(f"{prefix}{name}", values.to(torch.float64).mean(), values.numel())
