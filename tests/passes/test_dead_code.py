"""dead_code: drops what nobody reads, keeps what can be seen otherwise."""

from __future__ import annotations

import torch
from captured import data, family, function, weight

from fxopt.passes.dead_code import DeadCode


def test_dead_values_go() -> None:
    def fn(x, w):
        torch.exp(x * w).sum()
        return x + 1

    captured = function(fn, data(3, 4), w=weight(4)).check(DeadCode())
    assert not captured.calls("exp") and not captured.calls("mul")
    assert not [node for node in captured.program.nodes if node.op == "get_attr"]
    assert captured.program.log[-1].notes == ("erased 4 nodes that nobody reads",)


def test_random_draws_stay() -> None:
    def fn(x):
        torch.rand_like(x)
        torch.dropout(x, 0.5, True)
        return x * torch.rand_like(x)

    captured = function(fn, data(3, 4)).check(DeadCode())
    assert len(captured.calls("rand_like")) == 2 and captured.calls("dropout")


def test_writes_stay() -> None:
    def fn(x, count):
        count.add_(1)
        return x + 1

    assert function(fn, data(3, 4), count=torch.zeros(())).check(DeadCode()).calls("add_")


def test_a_model_has_none_left_after_one_run() -> None:
    once = family("llama").after("canonicalize").check(DeadCode())
    assert len(once.check(DeadCode()).program.nodes) == len(once.program.nodes)
