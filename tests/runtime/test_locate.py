"""locate: the planted culprit is named, by its node and line; what is not one is not; the replay changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fxopt
from fxopt.runtime.locate import NonFinite, Range

HERE = Path(__file__).read_text().splitlines()


def line(code: str) -> str:
    """`file.py:number` of the only line that holds some code of a planted operation."""
    (number,) = [number for number, text in enumerate(HERE, 1) if text.strip().startswith(code)]
    return f"test_locate.py:{number}"


class Net(nn.Module):
    """Layers, of which the one in the middle does something of its own."""

    def __init__(self, middle: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last, self.middle = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), middle

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.last(self.middle(self.norm(F.dropout(self.first(x), 0.25, self.training))))
        return {"out": out, "loss": out.square().mean()}


def located(middle: Callable[[torch.Tensor], torch.Tensor], passes: str = "canonicalize", scale: float = 1.0) -> NonFinite | None:
    opt = fxopt.optimize(Net(middle), passes, check=False)
    return opt.locate((torch.arange(24.0).view(4, 6) / 10,), scale=scale)


class Logarithm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.relu(x) * 0
        return torch.log(zeros)


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x * 0) + x


class Hidden(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.full((6,), float("-inf"))
        return torch.softmax(x + mask, -1)


class Exponential(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.exp(x.abs() * 100 + 80)
        return y - y


def summed(x: torch.Tensor) -> torch.Tensor:
    return (x - x.detach()) * 3e38 + (x - x.detach()) * 3e38


FORWARD = {"logarithm": (Logarithm, "log", "return torch.log(zeros)", "inf"), "hidden": (Hidden, "softmax", "return torch.softmax(x + mask", "nan"),
           "exponential": (Exponential, "exp", "y = torch.exp(x.abs()", "inf")}


@pytest.mark.parametrize("name", FORWARD)
def test_the_first_value_of_the_forward(name: str) -> None:
    middle, node, code, kind = FORWARD[name]
    found = located(middle())
    assert found is not None and (found.phase, found.node, found.source, found.path) == ("forward", node, line(code), "middle"), found
    assert getattr(found.result, kind) > 0 and found.code and not any(each.nan for each in found.inputs)
    said = str(found)
    assert f"`{node}`" in said and line(code) in said and "made by:  the capture" in said and "reads:" in said and "do:" in said


def test_the_first_gradient() -> None:
    found = located(Root())
    assert found is not None and (found.phase, found.node, found.source) == ("backward", "sqrt", line("return torch.sqrt(x * 0)")), found
    assert found.gradient is not None and not found.gradient.bad and found.result.bad and "away from zero" in found.do


def test_a_scale_that_is_too_large() -> None:
    found = located(lambda x: summed(x) + x, scale=30.0)
    assert found is not None and found.phase == "backward" and found.result.inf and "scale the loss down" in found.do, found
    assert located(lambda x: summed(x) + x, scale=1e-3) is None


def test_a_sum_of_gradients() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.weight * x
            return (h * 3e38).sum() + (h * 2e38).sum()

    found = fxopt.optimize(Twice(), "canonicalize", check=False).locate((torch.ones(2),))
    assert found is not None and (found.phase, found.node) == ("backward", "mul") and len(found.inputs) == 2 and "their sum is not" in found.do, found
    assert not any(each.bad for each in found.inputs) and found.result.inf == 2


def test_masks_and_harmless_overflows_are_not_culprits() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x.masked_fill(x > 1, float("-inf")), -1)

    def divided(x: torch.Tensor) -> torch.Tensor:
        return x + 1 / torch.exp(x.detach().abs() * 100 + 200)

    assert located(masked) is None and located(divided) is None


def test_what_came_so_is_named() -> None:
    opt = fxopt.optimize(Net(torch.relu), "canonicalize", check=False)
    batch = torch.randn(4, 6)
    opt((batch))["loss"].backward()
    assert opt.locate() is None, "the last call"
    bad = batch.clone()
    bad[1, 2] = float("nan")
    found = opt.locate({"x": bad})
    assert found is not None and (found.phase, found.node, found.result.nan) == ("input", "x", 1) and "the input x" in str(found)
    with torch.no_grad():
        opt.model.last.weight[0, 0] = float("nan")
    found = opt.locate((batch,))
    assert found is not None and (found.phase, found.node) == ("state", "last.weight") and "before this step" in str(found)


def test_the_pass_that_made_it() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (F.silu(self.gate(x)) * self.up(x)).mean()

    opt = fxopt.optimize(Gated(), "fuse", check=False)
    found = opt.locate((torch.full((2, 6), 1e25),))
    assert found is not None and found.passes == ("fuse",) and found.call.startswith("fxopt.swiglu") and "made by:  fuse" in str(found), found


def test_nothing_is_changed() -> None:
    opt = fxopt.optimize(Net(torch.relu), "canonicalize", check=False)
    batch = torch.randn(4, 6)
    opt(batch)["loss"].backward()
    grads = {name: p.grad.clone() for name, p in opt.named_parameters()}
    before, random = {name: value.clone() for name, value in opt.state_dict().items()}, torch.get_rng_state()
    assert opt.locate() is None
    assert all(torch.equal(value, before[name]) for name, value in opt.state_dict().items()) and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(p.grad, grads[name]) for name, p in opt.named_parameters())


def test_ranges() -> None:
    found = Range.of("x", (torch.tensor([1.0, float("inf"), -3.0, 0.0, float("nan")]), torch.tensor([7])))
    assert (found.low, found.high, found.nan, found.inf, found.zero, found.size, found.bad) == (-3.0, 1.0, 1, 1, 1, 5, True)
    assert "from -3 to 1, 1 NaN, 1 infinite, 1 zero" in str(found)
    assert not Range.of("ids", torch.tensor([3, 4])).bad and "from 3 to 4" in str(Range.of("ids", torch.tensor([3, 4])))
    assert "nothing finite" in str(Range.of("x", torch.tensor([float("nan")]))) and Range.of("z", torch.tensor([1 + 2j])).high == 2.0
