"""What a run did."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxopt.train.callbacks import Step


@dataclass(frozen=True)
class Result:
    """What a run did."""

    steps: tuple[Step, ...]
    """The steps of this process: after a resume, those since."""
    epochs: int
    skipped: int
    """Batches that were left out because they supervise nothing."""
    peak_memory: int
    """Bytes, see `fxopt.runtime.memory.peak_bytes`."""
    adapter: Path | None = None
    """Folder of the saved adapter, when `output_dir` was given and the model has one."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest value of everything that was logged."""
    checkpoint: Path | None = None
    """The last checkpoint."""
    best: Path | None = None
    """The best checkpoint, where best ones are kept."""
    first_step: int = 0
    """Steps that were finished before this process took over."""
    why: str = ""
    """Why the run ended before its planned end; empty if it did not."""
    times: Any = None
    """Where the time went (`fxopt.train.timing.Times`), of a run with `profile=True`."""

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [step.loss for step in self.steps]

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps of real (non-padding) tokens per second, without the first step of several."""
        return statistics.median(step.tokens / step.seconds for step in self.steps[1:] or self.steps)
