"""What a model says while it is trained: samples, kept in the run's folder and shown in its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.errors import DataError
from fxopt.train.callbacks import Callback, State
from fxopt.train.randomness import isolated

FILE = "samples.jsonl"


class Samples(Callback):
    """Asks for texts every so many steps, or with each validation; `samples.jsonl` has a line for each: step, name, text.

    The model is in evaluation mode, without gradients; random states are as before afterwards.

    Args:
        make: from the model to texts by name, such as what it generates for some prompts. every: steps; None: with each validation.

    Raises:
        DataError: `every` is no number of steps; `make` gave no texts by name.
    """

    def __init__(self, make: Callable[[nn.Module], Mapping[str, str]], every: int | None = None) -> None:
        if every is not None and every < 1:
            raise DataError(f"every={every}", where="Samples", do="at least 1")
        self.make, self.every = make, every

    def on_fit_start(self, state: State) -> None:
        if state.folder is not None and not state.rank:  # a resumed run repeats what is behind its checkpoint
            kept = [row for row in samples(state.folder) if row["step"] <= state.step and state.first_step]
            (state.folder / FILE).write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_step_end(self, state: State) -> None:
        if self.every is not None and state.step % self.every == 0:
            self._sample(state)

    def on_validation_end(self, state: State, metrics: Mapping[str, float]) -> None:
        if self.every is None:
            self._sample(state)

    def _sample(self, state: State) -> None:
        if state.folder is None or state.rank:
            return
        modes = [(module, module.training) for module in state.model.modules()]
        state.model.eval()
        try:
            with torch.no_grad(), isolated():
                found: Any = self.make(state.model)
        finally:
            for module, training in modes:
                module.training = training
        if not isinstance(found, Mapping):
            raise DataError(f"`make` gave a {type(found).__name__}.", where="Samples", do="Return texts by name: {\"prompt\": \"what the model said\"}.")
        with (state.folder / FILE).open("a") as file:
            file.writelines(json.dumps({"step": state.step, "name": str(name), "text": str(text)}) + "\n" for name, text in found.items())


def samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of a run, the oldest first; none if none were taken."""
    file = folder / FILE
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []
