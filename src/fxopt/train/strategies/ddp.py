"""The whole model on every process; gradients are summed."""

from __future__ import annotations

from fxopt.errors import ProcessError
from fxopt.train.strategies.environment import place
from fxopt.train.strategies.single import Single


class DDP(Single):
    """Every rank holds the model and trains on its own batches."""

    name = "ddp"

    def __init__(self) -> None:
        found = place()
        if found is None:
            raise ProcessError("No launcher has said which process this is.", where="strategy ddp", do="Start it with `fxopt launch`, torchrun or srun; or use strategy single.")
        self.rank, self.world = found.rank, found.world
