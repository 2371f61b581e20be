"""The trainer costs what the bare loop costs; `python -m bench.trainer` measures more of it."""

from __future__ import annotations

import pytest
import torch

from bench.trainer import ALLOWED, STEPS, Convolutions, bare, images, measure, trained


def test_the_bare_loop_gives_the_same_losses() -> None:
    assert bare(Convolutions(), images(5, 4)) == trained(Convolutions(), images(5, 4))


@pytest.mark.slow
def test_the_trainer_costs_what_the_bare_loop_costs() -> None:
    """Processor time, the least of some rounds in turn: others may use the machine meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = measure(Convolutions, images(STEPS), 40)
    torch.set_num_threads(threads)
    assert found["ratio"] <= 1 + ALLOWED and found["equal"], found
