"""Every pattern computes what its op computes, and says so completely."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fxopt.kernels.catalog import CATALOG, rope
from fxopt.kernels.op import Bind
from fxopt.kernels.tolerance import NEARBY, eager_error, excess

PATTERNS = [(op, pattern) for op in CATALOG for pattern in op.patterns]

# In 16 bits a pattern is the same function as its fp32 twin: its gradients are checked there.
FP32 = [(op, p) for op, p in PATTERNS if all(dtype in (torch.float32, torch.complex64) for _, dtype in p.inputs.values())]
TABLES = ("cos", "sin", "turns")  # rotations have no derivative by their tables


def over(patterns):
    """Run a test for each of these patterns."""
    return pytest.mark.parametrize(("op", "pattern"), patterns, ids=[f"{op.name}-{p.name}" for op, p in patterns])


every_pattern = over(PATTERNS)


def op_args(op, pattern, bound):
    by_name = pattern.bind(bound)
    return [by_name[argument.name] for argument in op.overload._schema.arguments]


# The error that is allowed is the reference's own, at its largest over a few draws: the pattern's would allow anything.


@every_pattern
def test_the_op_computes_what_the_pattern_computes(op, pattern):
    torch.manual_seed(0)
    error, results = 0.0, []
    for _ in range(1 + NEARBY):
        examples = pattern.examples()
        plain = pattern.fn(*examples.values(), **pattern.scalars)
        args = op_args(op, pattern, {**examples, **pattern.scalars})
        mine = op(*args)[pattern.output]
        assert mine.dtype == plain.dtype and mine.shape == plain.shape
        wide = {name: value.to(torch.complex128 if value.is_complex() else torch.float64) for name, value in examples.items()}
        truth = op.reference(*op_args(op, pattern, {**wide, **pattern.scalars}))[pattern.output]
        error = max(error, eager_error(op.reference(*args)[pattern.output], truth, plain.dtype))
        results += [(mine, truth), (plain, truth)]
    assert max(excess(*pair, error) for pair in results) <= 0


@over(FP32)
def test_the_gradients_agree_too(op, pattern):
    torch.manual_seed(0)

    def gradients(function, dtype):
        leaves = {name: value.to(dtype.to_complex() if value.is_complex() else dtype, copy=True) for name, value in values.items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in TABLES)
        function(leaves).square().sum().backward()
        return [leaf.grad for name, leaf in leaves.items() if name not in TABLES]

    def written(leaves):
        return pattern.fn(*leaves.values(), **pattern.scalars)

    def called(function):
        return lambda leaves: function(*op_args(op, pattern, {**leaves, **pattern.scalars}))[pattern.output]

    draws = []
    for _ in range(1 + NEARBY):
        values = pattern.examples()
        # The truth is the reference's: the function may say `.to(torch.float32)`.
        forms = (called(op), written, called(op.reference))
        draws.append([*(gradients(form, torch.float32) for form in forms), gradients(forms[-1], torch.float64)])
    for mine, plain, eager, truth in zip(*(zip(*column) for column in zip(*draws))):
        error = max(eager_error(each, true, torch.float32) for each, true in zip(eager, truth))
        assert max(excess(each, true, error) for part in (mine, plain) for each, true in zip(part, truth)) <= 0


@every_pattern
def test_it_names_every_argument_and_accepts_its_own_example(op, pattern):
    assert set(pattern.arguments) == {argument.name for argument in op.overload._schema.arguments}
    assert pattern.check is None or pattern.check({**pattern.examples(), **pattern.scalars}) is None


@every_pattern
def test_its_scalars_are_unmistakable(op, pattern):
    """A scalar's example value is not a size or a constant of the program, but where it means that."""
    sizes = {size for shape, _ in pattern.inputs.values() for size in shape[:-1]}
    for value in pattern.scalars.values():
        assert value not in sizes and value not in (0, 1, 2, 3, 0.5, -0.5)


def test_names_are_unique():
    for op in CATALOG:
        names = [pattern.name for pattern in op.patterns]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("rsqrt_cast_scale", {"weight": torch.ones(3, 1)}, "one value per column"),
        ("native", {"width": 110}, "last dimension"),
        ("silu_up", {"up": torch.ones(22)}, "differ"),
        ("half", {"half": 7}, "middle"),
        ("half", {"cos": torch.ones(3, 1, 5, 22, requires_grad=True)}, "trained"),
        ("scaled_sigmoid_shifted_up", {"factor": 0.0}, "factor is 0"),
        ("half_promoted", {"x": torch.ones(3, 7, 5, 22)}, "nothing is widened"),
        ("complex", {"turns": torch.ones(3, 1, 5, 22, dtype=torch.complex64)}, "wide"),
        ("half_split", {"cos": torch.ones(3, 1, 5, 22), "sin": torch.ones(3, 1, 5, 22)}, "wide"),
    ],
)
def test_a_check_says_why_not(name, change, reason):
    (pattern,) = (pattern for op, pattern in PATTERNS if pattern.name == name and op.name != "layer_norm")
    assert reason in pattern.check({**pattern.examples(), **pattern.scalars, **change})


def test_a_pattern_that_is_another_function_is_seen():
    """The planted fault: pairs taken for halves."""
    (pattern,) = (pattern for _, pattern in PATTERNS if pattern.name == "pairs_to_halves")
    wrong = dataclasses.replace(pattern, arguments={**pattern.arguments, "q": Bind("x")})
    with pytest.raises(AssertionError):
        test_the_op_computes_what_the_pattern_computes(rope, wrong)
    with pytest.raises(AssertionError):
        test_the_gradients_agree_too(rope, wrong)
