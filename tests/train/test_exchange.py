"""Plain data goes over processes as it is."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.train.strategies.group import Processes, join
from tests.train.processes import together


def test_plain_data_of_any_length_is_shared() -> None:
    def ranks(rank: int) -> tuple[list[Any], Any]:
        join(30.0, 30.0)
        processes = Processes(30.0, 30.0)
        value = {"rank": rank, "text": "x" * 3000 * rank, "numbers": [1, math.inf, (None, True)], "tensor": torch.full((rank, 2), 0.5, dtype=torch.bfloat16)}
        shared, gathered = processes.share(value), processes.gather(value)
        assert [each["tensor"].shape[0] for each in shared] == [0, 1] and shared[1]["tensor"].dtype == torch.bfloat16
        processes.monitor.close()
        return [{name: each[name] for name in ("rank", "text", "numbers")} for each in shared], None if gathered is None else [each["text"] for each in gathered]

    first, second = together(2, ranks)
    assert first[0] == second[0] == [{"rank": rank, "text": "x" * 3000 * rank, "numbers": [1, math.inf, (None, True)]} for rank in range(2)]
    assert first[1] == ["", "x" * 3000] and second[1] is None
