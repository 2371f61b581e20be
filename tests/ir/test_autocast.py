"""Autocast regions: put back into the flat graph with their casts said, or kept where that would change a number."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from captured import data

from fxopt.api import optimize
from fxopt.errors import CaptureError
from fxopt.ir.autocast import Casting, State
from fxopt.ir.capture import Call, capture
from fxopt.ir.program import Program

LOW = torch.bfloat16


class Regions(nn.Module):
    """Two linears and a norm; `inside` says in which autocast state its middle runs."""

    def __init__(self, inside: torch.dtype | None, what: str = "linear") -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8)
        self.register_buffer("turns", torch.linspace(1.0, 0.1, 8))
        self.inside, self.what = inside, what

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "norm":
            return self.norm(x.float())
        if self.what in ("table", "no_grad"):
            source = self.turns if self.what == "table" else self.norm.weight
            with torch.no_grad():
                table = torch.arange(x.shape[1], device=x.device).float()[:, None] @ source[None]
            return x * table.cos()
        if self.what == "twice":
            return self.b(torch.relu(self.b(x)))
        if self.what == "attention":
            q = self.b(x).unsqueeze(1)
            return F.scaled_dot_product_attention(q * q.new_ones((), dtype=torch.float32).expand(1, 1, 1, 8), q.float(), q).squeeze(1)
        return F.softmax(self.b(x.float()), dim=-1) + self.norm(x.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        with torch.autocast("cpu", self.inside, enabled=self.inside is not None):
            x = self.middle(x)
        return self.norm(x.float()).square().mean()


def captured(model: nn.Module, x: torch.Tensor, outer: bool) -> Program:
    with torch.autocast("cpu", LOW, enabled=outer):
        return capture(model, Call.of((x,), {}))


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.nodes if node.op == "call_function"]


CASES = [(LOW, "linear", False), (LOW, "twice", False), (LOW, "attention", False), (LOW, "table", False), (None, "norm", True), (None, "table", True),
         (None, "linear", True), (LOW, "linear", True)]
KEPT = {(None, "linear", True), (None, "table", True)}


@pytest.mark.parametrize(("inside", "what", "outer"), CASES)
def test_the_numbers_are_the_models(inside: torch.dtype | None, what: str, outer: bool) -> None:
    torch.manual_seed(0)
    model, x = Regions(inside, what).train(), data(3, 5, 8)
    program = captured(model, x, outer)
    assert ("wrap_with_autocast" in targets(program)) == ((inside, what, outer) in KEPT)
    eager = copy.deepcopy(model)
    with torch.autocast("cpu", LOW, enabled=outer):
        wanted = eager(x)
        (got,) = program.run([x], {name: value for name, value in (*model.named_parameters(), *model.named_buffers())})
    assert torch.equal(wanted, got)
    wanted.backward()
    got.backward()
    for (name, a), b in zip(eager.named_parameters(), model.parameters()):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad)), name


def test_a_weight_is_cast_once() -> None:
    program = captured(Regions(LOW, "twice"), data(3, 5, 8), False)
    casts = [node for node in program.nodes if str(node.target) == "aten.to.dtype" and node.args[0].op == "get_attr" and node.args[1] == LOW]
    assert len(casts) == 1 and len(casts[0].users) == 2 and casts[0].args[0].target == "b.weight"


def test_a_region_without_gradients_inside_is_lost_by_the_export_and_refused() -> None:
    """torch.export forgets a `no_grad` inside an autocast region: the self-check sees the gradient that comes of it."""
    with pytest.raises(CaptureError, match="norm.weight"):
        optimize(Regions(LOW, "no_grad"), inputs=(data(3, 5, 8),))


def casting(inner: torch.dtype | None, outer: torch.dtype | None, program: Program) -> Casting:
    return Casting(State("cpu", inner), State("cpu", outer), program.fake_mode)


def test_casts_of_one_operator() -> None:
    program = captured(Regions(LOW, "linear"), data(3, 5, 8), False)
    (linear,) = [node for node in program.nodes if str(node.target) == "aten.linear.default" and node.args[1].target == "a.weight"]
    add = next(node for node in program.nodes if str(node.target) == "aten.add.Tensor")
    enter, leave = casting(LOW, None, program), casting(None, LOW, program)
    assert enter.casts(linear) == {source: LOW for source in linear.all_input_nodes}
    assert leave.casts(linear) is None  # autocast around it would cast what the region did not
    assert enter.casts(add) == {} == leave.casts(add)


def test_the_state_of_a_region() -> None:
    program = captured(Regions(None, "linear"), data(3, 5, 8), True)
    (region,) = [node for node in program.nodes if str(node.target) == "wrap_with_autocast"]
    assert State.of(region) == State("cpu", None)
    with torch.autocast("cpu", torch.float16):
        assert State.now("cpu") == State("cpu", torch.float16)
    assert State.now("cpu") == State("cpu", None)
