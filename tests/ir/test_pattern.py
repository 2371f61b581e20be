"""The matcher: what it binds, what it refuses, and what it says about a near-miss."""

from __future__ import annotations

import pytest
import torch
from captured import Captured, data, function, weight

from fxopt.errors import PassError
from fxopt.ir.pattern import Match, Matcher, Near
from fxopt.ir.template import trace


def norm(x, w, *, eps):
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def half(x, *, half):
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


NORM = Matcher(norm, {"x": (3, 5, 22), "w": (22,)}, {"eps": 0.0123})
X, W = data(2, 6, 8), weight(8)


def found(matcher: Matcher, captured: Captured) -> list[Match | Near]:
    """What a matcher finds in a program, match or near-miss."""
    nodes = captured.after("canonicalize").program.nodes
    results = [matcher.at(node) for node in nodes if node.op == "call_function" and node.target is matcher.target]
    return [result for result in results if result is not None]


def match(matcher: Matcher, captured: Captured) -> Match:
    """The one match."""
    (only,) = [result for result in found(matcher, captured) if isinstance(result, Match)]
    return only


def reasons(matcher: Matcher, captured: Captured) -> str:
    """The reasons of all near-misses that fit at least half of the pattern; asserts that nothing matches."""
    results = found(matcher, captured)
    assert all(isinstance(result, Near) for result in results)
    return "\n".join(result.reason for result in results if result.score * 2 >= matcher.sketch.size)


def test_binds_inputs_and_scalars() -> None:
    only = match(NORM, function(lambda x, w: norm(x * 2, w + 1, eps=1e-5).sum(), X, w=W))
    assert only.scalars == {"eps": 1e-5}
    assert {name: str(node.target) for name, node in only.inputs.items()} == {"x": "aten.mul.Tensor", "w": "aten.add.Tensor"}
    assert only.anchor.name in {node.name for node in only.nodes} and len(only.nodes) == NORM.sketch.size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 8), (2, 6, 8), (2, 3, 4, 8), (8,)])
def test_any_dtype_and_rank(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    match(NORM, function(lambda x, w: norm(x, w, eps=1e-6), data(*shape, dtype=dtype), w=weight(8, dtype=dtype)))


def test_mixed_dtypes_are_proven_as_they_are() -> None:
    only = match(NORM, function(lambda x, w: norm(x, w, eps=1e-6), data(2, 6, 8, dtype=torch.bfloat16), w=W))
    assert [node.meta["val"].dtype for node in only.inputs.values()] == [torch.bfloat16, torch.float32]


def test_operands_in_any_order() -> None:
    def swapped(x, w):
        return (torch.rsqrt(1e-6 + x.pow(2).mean(-1, keepdim=True)) * x) * w

    match(NORM, function(swapped, X, w=W))


def test_dimensions_count_from_either_end() -> None:
    match(NORM, function(lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(2, True) + 1e-6)), X, w=W))


def test_a_value_used_twice_by_the_pattern_may_be_computed_twice() -> None:
    def twice(x, w):
        return w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    match(NORM, function(twice, data(2, 6, 8, dtype=torch.bfloat16), w=weight(8, dtype=torch.bfloat16)))


def test_an_input_that_runs_on_in_fp32_is_bound_after_its_cast() -> None:
    def residual(x, w):
        wide = x.float()
        return norm(wide, w, eps=1e-6) + wide

    only = match(NORM, function(residual, data(2, 6, 8, dtype=torch.bfloat16), w=W))
    assert only.inputs["x"].meta["val"].dtype == torch.float32


def test_a_scalar_in_two_places_must_agree() -> None:
    rotate = Matcher(half, {"x": (3, 5, 22)}, {"half": 11})
    assert match(rotate, function(lambda x, w: half(x * w, half=4), X, w=W)).scalars == {"half": 4}
    uneven = function(lambda x, w: torch.cat((-(y := x * w)[..., 4:], y[..., :3]), dim=-1), X, w=W)
    assert "half is 4 in one place and 3 in another" in reasons(rotate, uneven)


NEAR = {
    "exponent": (lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)), "has 3 where the pattern has 2"),
    "dimension": (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)), "`mean` (aten.mean.dim) has -2 where the pattern has -1"),
    "two dimensions": (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-6)), "[-2, -1]"),
    "other operator": (lambda x, w: w * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6)), "calls aten.abs.default, not aten.pow.Tensor_Scalar"),
    "other input": (lambda x, w: w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6)), "the pattern reads x twice"),
    "tensor for a scalar": (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x[..., :1])), "not a number known at compile time"),
    "scaled sum": (lambda x, w: w * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-6, alpha=2))), "has 2 where the pattern has 1"),
    "accumulates in fp64": (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.float64).float() + 1e-6)), "float64"),
}


@pytest.mark.parametrize("name", NEAR)
def test_refuses_near_misses(name: str) -> None:
    fn, reason = NEAR[name]
    assert reason in reasons(NORM, function(fn, X, w=W))


def test_refuses_an_inner_value_that_others_read() -> None:
    def shared(x, w):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * (x * scale) + scale.sum()

    line = shared.__code__.co_firstlineno  # of the function that forward calls, not of the call
    assert f"`rsqrt` (test_pattern.py:{line + 1}) is also read by `sum_1` (test_pattern.py:{line + 2})" in reasons(NORM, function(shared, X, w=W))


def test_refuses_an_inner_value_that_is_returned() -> None:
    def returned(x, w):
        variance = x.pow(2).mean(-1, keepdim=True)
        return w * (x * torch.rsqrt(variance + 1e-6)), variance

    assert "is also read by `output`" in reasons(NORM, function(returned, X, w=W))


def test_refuses_a_missing_cast() -> None:
    def rounds_early(x, w):
        return w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype))

    assert "cast" in reasons(NORM, function(rounds_early, data(2, 6, 8, dtype=torch.bfloat16), w=weight(8, dtype=torch.bfloat16)))


def test_refuses_an_early_cast_of_the_input() -> None:
    def rounds_first(x, w):
        return w * (x.float() * torch.rsqrt(x.to(torch.bfloat16).float().pow(2).mean(-1, keepdim=True) + 1e-6))

    assert reasons(NORM, function(rounds_first, X, w=W))


def test_broadcasting_is_the_programs() -> None:
    both = Matcher(lambda x, y: torch.relu(x) + y, {"x": (3, 5), "y": (3, 5)})
    assert match(both, function(lambda x, w: torch.relu(x) + w, data(4, 8), w=weight(8))).inputs["y"].target == "w"


def test_sizes_are_compared_in_the_proof() -> None:
    repeat = Matcher(lambda x, y: torch.relu(x).expand(7, 3, 5) * y, {"x": (3, 5), "y": (1, 3, 5)})

    def times(n):
        return function(lambda x, w, y: torch.relu(w).expand(n, 3, 5) * y + x.sum(), X, w=weight(3, 5), y=weight(1, 3, 5))

    match(repeat, times(7))
    assert "(aten.expand.default) has other sizes than the pattern" in reasons(repeat, times(6))


SPLIT = Matcher(lambda x: torch.relu(x).reshape(*x.shape[:-1], -1, 2).unsqueeze(1) * 3, {"x": (3, 22)})
SAME_SPLIT = {
    "view": lambda x: x.view(3, 4, 2),
    "unflatten": lambda x: x.unflatten(-1, (-1, 2)),
    "flatten": lambda x: x.view(3, 4, 2, 1).flatten(2),
}


@pytest.mark.parametrize("name", SAME_SPLIT)
def test_another_way_to_the_same_shape(name: str) -> None:
    split = SAME_SPLIT[name]
    matches = [result for result in found(SPLIT, function(lambda x, w: split(torch.relu(w)).view(3, 1, 4, 2) * 3 + x.sum(), X, w=weight(3, 8))) if isinstance(result, Match)]
    assert len(matches) == (name != "flatten")  # two steps to the shape are two operators


def test_another_shape_is_refused() -> None:
    for other in (lambda x: x.view(3, 2, 4).unsqueeze(1), lambda x: x.view(3, 4, 2).unsqueeze(0)):
        assert "another shape" in reasons(SPLIT, function(lambda x, w: other(torch.relu(w)) * 3 + x.sum(), X, w=weight(3, 8)))


def test_inputs_that_the_pattern_does_not_take() -> None:
    def times(w, x, y):
        return torch.relu(w).expand(6, 3, 5) * y + x.sum()

    repeat = Matcher(lambda x, y: torch.relu(x).expand(7, 3, 5) * y, {"x": (3, 5), "y": (7, 3, 5)})
    assert "cannot be computed on inputs of these types" in reasons(repeat, function(lambda x, w, y: times(w, x, y), X, w=weight(3, 5), y=weight(6, 3, 5)))


def test_accept_has_the_last_word() -> None:
    captured = function(lambda x, w: norm(x, w, eps=1e-6), X, w=W).after("canonicalize")
    (anchor,) = [node for node in captured.program.nodes if node.target is NORM.target and NORM.at(node).__class__ is Match]
    refused = NORM.at(anchor, lambda inputs, scalars: f"eps is {scalars['eps']}")
    assert isinstance(refused, Near) and refused.reason == "eps is 1e-06"


def test_matching_adds_no_guards() -> None:
    captured = function(lambda x, w: norm(x, w, eps=1e-6), X, w=W)
    guards = len(captured.program.fake_mode.shape_env.guards)
    match(NORM, captured)
    assert len(captured.program.fake_mode.shape_env.guards) == guards


def test_a_pattern_draws_no_random_numbers() -> None:
    with pytest.raises(PassError, match="is no pattern"):
        trace(lambda x: x * torch.rand_like(x), {"x": torch.ones(3)}, {})
