"""What a model's code keeps on its modules from call to call is not frozen in silence."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn

import fxopt


class Counting(nn.Module):
    """Scales by the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return self.linear(x) * self.calls


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.longest = nn.Linear(4, 4), Counting(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, x.shape[0])  # settles: no reason to stay Python
        return self.inner(self.first(x)).square().mean()


@pytest.mark.parametrize("make", [Counting, Outer])
def test_a_number_that_changes_at_every_call_is_what_it_is_in_eager_code(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    eager = make()
    opt = fxopt.optimize(copy.deepcopy(eager), inputs=(torch.randn(3, 4),))
    assert [part.name for part in opt.parts if part.captured] == (["linear"] if make is Counting else ["first", "inner.linear"])
    assert "calls at every call, which a graph would not" in opt.report
    for rows in (2, 5, 5):  # the longest is another number at the third
        x = torch.randn(rows, 4)
        torch.testing.assert_close(opt(x), eager(x))
    monkeypatch.setattr("fxopt.dispatch.root.RootDispatcher._capture_parts", None)  # a known kind of call is not taken apart again
    for _ in range(2):
        torch.testing.assert_close(opt(x), eager(x))
    monkeypatch.undo()
    torch.testing.assert_close(opt.eval()(x), eager.eval()(x))


class Putting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.width, self.seen = nn.Linear(4, 4), 0, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.width, self.hidden = x.shape[-1], self.linear(x)
        self.seen.append(1)
        return self.hidden * self.width


def test_what_is_put_aside_during_a_call_is_named() -> None:
    opt = fxopt.optimize(Putting(), inputs=(torch.randn(3, 4),), check=False)
    assert not opt.parts and "hidden, seen: set by the model's code, and not when its graph runs" in opt.report
