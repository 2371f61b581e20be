"""The training loop, all of it. What each line does is in `run.py`."""

from __future__ import annotations

from fxopt.train.run import Run


def train(run: Run) -> None:
    """Trains until the planned steps or epochs are done, or somebody stops the run. Continues where `run.state` stands: between two
    batches of a step, between two steps, or between two epochs."""
    while run.start_epoch():
        for group in run.groups():
            run.start_step(group)
            for index in range(run.state.micro, len(group.batches)):
                run.backward(group, index)
                run.pause()
            run.finish_step(group)
            run.evaluate_if_due()
            run.pause()
        if run.epoch_is_over():
            run.end_epoch()
            run.pause()
