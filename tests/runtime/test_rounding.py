"""What rounding alone does to a step is not a difference of a graph: also where torch's own sums are off, always the same way."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fxopt.errors import CaptureError
from fxopt.runtime import selfcheck

CLASSES = 400_000  # terms just above half a spacing, on large ones in each lane: every addition in fp32 rounds up


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = torch.zeros(CLASSES, 2)
        weight[:16, 0] = 16.1
        weight[:, 1] = torch.linspace(0.0, 1e-3, CLASSES)
        self.weight = nn.Parameter(weight)


def loss(head: Head, x: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return F.cross_entropy((x @ head.weight.t()).to(dtype), torch.tensor([1])).float() * scale


@pytest.mark.parametrize("scale", [1.0, 1.01])
def test_sums_of_a_softmax_are_rounding(scale: float) -> None:
    head, x = Head(), torch.ones(1, 2)
    expected = selfcheck.step(head, lambda given: loss(head, given[0], torch.float32), [x], 0)
    exact = selfcheck.step(head, lambda given: loss(head, given[0], torch.float64, scale), [x], 0)
    responses = selfcheck.rounded(head, lambda given: loss(head, given[0], torch.float32), [x], 0)
    with pytest.raises(CaptureError):  # moved parameters alone do not show it
        selfcheck.compare(head, expected, exact, "the graph", lambda: responses[:-1])
    if scale == 1.0:
        selfcheck.compare(head, expected, exact, "the graph", lambda: responses)
    else:
        with pytest.raises(CaptureError, match="differs"):
            selfcheck.compare(head, expected, exact, "the graph", lambda: responses)
