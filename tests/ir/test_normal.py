"""The canonical form: what it erases, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from captured import Captured, data, function, module, weight

from fxopt.ir.edit import mutates
from fxopt.passes.canonicalize import Canonicalize


def canonical(fn, *tensors, **parameters) -> Captured:
    """A function in canonical form, compared bit for bit with what was captured."""
    return function(fn, *tensors, **parameters).check(Canonicalize())


def size(captured: Captured) -> int:
    return sum(node.op == "call_function" and "sym_size" not in str(node.target) for node in captured.program.nodes)


X = data(3, 4)

NO_OPS = {
    "cast": lambda x: torch.relu(x.to(torch.float32)) * 2,
    "float": lambda x: torch.relu(x.float()) * 2,
    "type_as": lambda x: torch.relu(x.type_as(x)) * 2,
    "to device": lambda x: torch.relu(x.to("cpu", torch.float32)) * 2,
    "slice": lambda x: torch.relu(x[:, :]) * 2,
    "whole slice": lambda x: torch.relu(x[:, : x.shape[1]]) * 2,
    "view": lambda x: torch.relu(x.view(x.shape)) * 2,
    "reshape": lambda x: torch.relu(x.reshape(x.shape[0], 4)) * 2,
    "expand": lambda x: torch.relu(x.expand(-1, 4)) * 2,
    "mul": lambda x: torch.relu(x * 1.0) * 2,
    "div": lambda x: torch.relu(x / 1) * 2,
    "sub": lambda x: torch.relu(x - 0) * 2,
    "dropout": lambda x: torch.relu(torch.dropout(x, 0.0, True)) * 2,
    "dead": lambda x: (torch.exp(x), torch.relu(x) * 2)[1],
}


@pytest.mark.parametrize("name", NO_OPS)
def test_what_does_nothing_goes(name: str) -> None:
    assert size(canonical(NO_OPS[name], X)) == 2


KEPT = {
    "narrowing cast": lambda x: x.to(torch.bfloat16).to(torch.float32).relu(),
    "copying cast": lambda x: x.to(torch.float32, copy=True).relu(),
    "part of a slice": lambda x: x[1:].relu(),
    "other view": lambda x: x.view(-1).relu(),
    "plus zero": lambda x: (x + 0.0).relu(),  # -0.0 + 0.0 is 0.0
    "times two": lambda x: (x * 2).relu(),
    "dropout": lambda x: torch.dropout(x, 0.5, True).relu(),
    "detach": lambda x: x.detach().relu(),
    "contiguous": lambda x: x.t().contiguous().relu(),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_does_something_stays(name: str) -> None:
    before = function(KEPT[name], X)
    after = before.check(Canonicalize())
    assert [str(node.target) for node in after.program.nodes if node.op == "call_function"] == [
        str(node.target) for node in before.program.nodes if node.op == "call_function" and "_assert_tensor_metadata" not in str(node.target)]


def test_plus_zero_goes_for_integers() -> None:
    assert size(canonical(lambda x: (x + 0).float(), torch.arange(6).view(2, 3))) == 1


def test_sizes_are_compared_without_guards() -> None:
    captured = function(lambda x, y: (x.view(x.shape[0], -1) * x.expand(x.shape)).sum() + y[:, : x.shape[1]].sum(), data(3, 4), data(5, 6))
    guards = len(captured.program.fake_mode.shape_env.guards)
    captured.check(Canonicalize())
    assert len(captured.program.fake_mode.shape_env.guards) == guards


def test_a_returned_view_stays_a_view_of_its_own() -> None:
    captured = canonical(lambda x: (x.view(x.shape), x.relu()), X)
    x = X.detach().clone()
    view, _ = captured.program.run([x], {})
    assert view is not x and view.data_ptr() == x.data_ptr()


def test_a_returned_copy_stays_a_copy() -> None:
    captured = canonical(lambda x: x * 1.0, X)
    x = X.detach().clone()
    (copy,) = captured.program.run([x], {})
    assert copy.data_ptr() != x.data_ptr()


def test_two_returned_equal_values_stay_two() -> None:
    captured = canonical(lambda x: (x == 0, x == 0), X)
    first, second = captured.program.run([X.detach()], {})
    assert first.data_ptr() != second.data_ptr()


def test_equal_values_are_computed_once_where_no_gradient_flows() -> None:
    def positions(x):
        n = torch.arange(x.shape[1])
        return x * (n + 1) + x.exp() * (torch.arange(x.shape[1]) + 1) + x.exp()

    captured = canonical(positions, X)
    assert len(captured.calls("arange")) == 1
    assert len(captured.calls("exp")) == 2, "one backward of a sum is not bitwise the sum of two backwards"


def test_literals_of_other_types_are_not_equal() -> None:
    captured = canonical(lambda x: (x.detach() * 2).sum() + (x.detach() * 2.0).sum() + (x.detach() * True).sum() + x.sum(), torch.arange(6).view(2, 3))
    assert len(captured.calls("mul")) == 3


def test_random_values_are_never_merged() -> None:
    assert len(canonical(lambda x: x * torch.rand_like(x) * torch.rand_like(x), X).calls("rand_like")) == 2


def test_spellings() -> None:
    captured = canonical(lambda x, w: torch.square(x) + torch.divide(torch.multiply(x, x), torch.rsub(x, 3.0)) + w[-2:].sum(), X, w=weight(4))
    names = {str(node.target) for node in captured.program.nodes if node.op == "call_function"}
    assert "aten.pow.Tensor_Scalar" in names and not names & {"aten.square.default", "aten.divide.Tensor", "aten.multiply.Tensor"}
    assert [node.args[1:] for node in captured.calls("slice")] == [(0, 2, 2**63 - 1)]


# -- in-place operators ----------------------------------------------------------------------------------------------


def test_private_writes_become_values() -> None:
    def fn(x):
        y = x + 2
        y.add_(1).mul_(3)
        y.masked_fill_(x > 0, 0.5)
        return y.relu_().sum()

    captured = canonical(fn, X)
    assert not [node for node in captured.program.nodes if str(node.target).split(".")[1:2] and str(node.target).split(".")[1].endswith("_")]
    assert captured.rules["in-place"] == 4


def written_input(x):
    x.mul_(2)
    return x + 1


def live_view(x):
    y = x.exp()
    z = y[0]
    y.add_(1)
    return z.sum() + y.sum()


def written_view_that_is_read(x):
    y = x.exp()
    z = y[0]
    z.add_(1)
    return y.sum() + z.sum()


def written_view_of_a_view(x):
    y = x.exp()
    y[1:][0].add_(1)
    return y.sum()


def saved_first(x):
    y = x + 1
    z = y.t()
    y.mul_(2)
    return (z * 2).sum()


@pytest.mark.parametrize("fn", [written_input, live_view, written_view_that_is_read, written_view_of_a_view, saved_first])
def test_writes_that_others_see_stay(fn) -> None:
    captured = canonical(fn, X.detach())
    assert any(mutates(node) for node in captured.program.nodes)
    assert captured.misses


def test_writes_into_parts_become_values() -> None:
    def shift_right(x, ids):
        moved = ids.new_zeros(ids.shape)
        moved[:, 1:] = ids[:, :-1].clone()
        moved[:, 0] = 7
        moved.masked_fill_(moved == -100, 0)
        y = x * 2
        y[0] = x[1]
        y[:, 1].mul_(3)
        return (y * moved).sum()

    captured = canonical(shift_right, X, torch.tensor([[1, 2, -100, 4]]).repeat(3, 1))
    assert not [node for node in captured.program.nodes if mutates(node)]
    assert captured.rules["in-place part"] == 4


def test_writes_with_a_derivative_have_one_afterwards() -> None:
    def fn(x, index):
        y = x * 2
        y.index_fill_(0, index, 3.0)
        y.index_put_((index,), x[index] * 5)
        y.zero_().add_(x)
        z = x + 1
        z.copy_(x[:1] * 3)
        return (y * x).sum() + z.sum()

    canonical(fn, X, torch.tensor([0, 2]))


def test_writes_into_state_stay() -> None:
    captured = canonical(lambda x, count: count.add_(1) * 0 + x.sum(), X, count=torch.zeros(()))
    assert captured.calls("add_") and "state" in captured.misses[0]


def test_reads_before_and_after_a_write_are_not_merged() -> None:
    def fn(x, total):
        before = total * 2
        total.add_(1)
        return x.sum() + before + total * 2

    assert len(canonical(fn, X, total=torch.ones(())).calls("mul")) == 2


def test_a_write_that_changes_the_dtype_stays() -> None:
    def fn(x):
        n = torch.zeros(x.shape, dtype=torch.float32)
        n.add_(torch.ones(x.shape, dtype=torch.float64))
        return (n * x).sum()

    assert canonical(fn, X).calls("add_")


class Scale(torch.nn.Module):
    def forward(self, x):
        return x * (torch.arange(x.shape[1]) + 1) + (torch.arange(x.shape[1]) + 1)


def test_modules_do_not_read_each_others_values() -> None:
    captured = module(torch.nn.Sequential(Scale(), Scale()), X).check(Canonicalize())
    assert len(captured.calls("arange")) == 2, "one in each module"


def test_the_fixed_point_is_one() -> None:
    once = canonical(lambda x: torch.relu((x.float() * 1.0)[:, :]).to(torch.float32), X)
    again = once.check(Canonicalize())
    assert not again.program.log[-1].rewrites and len(again.program.nodes) == len(once.program.nodes)
