"""Templates: what tracing keeps of a function, and putting one into a graph."""

from __future__ import annotations

import pytest
import torch
from captured import data, function

from fxopt.errors import PassError
from fxopt.ir.edit import Edit
from fxopt.ir.template import Sizes, emit, trace


def test_a_template_is_canonical_and_takes_no_memory() -> None:
    template = trace(lambda x, y: (x.float() + 0 * y).square(), {"x": torch.empty(10**9, 7, device="meta"), "y": torch.empty(7, device="meta")}, {})
    assert [str(node.target) for node in template.output.graph.nodes if node.op == "call_function"] == ["aten.mul.Tensor", "aten.add.Tensor", "aten.pow.Tensor_Scalar"]
    assert template.size == 3 and list(template.inputs) == ["x", "y"]


def test_sizes_that_are_equal_get_equal_numbers() -> None:
    nodes = function(lambda x, y: x @ y, data(3, 4, 5), data(3, 5, 4)).program.placeholders
    sizes = Sizes()
    a, b = (sizes.example(node.meta["val"]) for node in nodes)
    assert a.shape[2] == b.shape[1] and len({*a.shape, *b.shape}) == len(sizes.known) and not a.untyped_storage().nbytes() < 0
    assert (a @ b).shape == (a.shape[0], a.shape[1], b.shape[2])


def emitted(fn, *tensors):
    """A program that computes relu of its inputs, and the same with `fn` of them put in."""
    program = function(lambda *given: torch.relu(torch.cat(given, -1)), *tensors).program
    edit = Edit(program, by="test")
    (relu,) = [node for node in edit.nodes if str(node.target) == "aten.relu.default"]
    result, made = emit(edit, fn, edit.nodes[: len(tensors)], relu)
    return edit, result, made, relu


def test_operators_of_a_function_come_before_the_anchor() -> None:
    edit, result, made, relu = emitted(lambda x, y: torch.cat((x[..., ::2], y[..., 1::2]), dim=-1).to(torch.float64), data(2, 8), data(2, 8, seed=2))
    order = edit.nodes.index
    assert [str(node.target).split(".")[1] for node in made] == ["slice", "slice", "cat", "to"] and made[-1] is result
    assert all(order(node) < order(relu) for node in made)
    assert result.meta["val"].dtype == torch.float64 and str(result.meta["val"].shape[0]) == str(edit.nodes[0].meta["val"].shape[0])


def test_a_cast_that_is_none_is_the_input_itself() -> None:
    edit, result, made, _ = emitted(lambda x: x.to(torch.float32), data(2, 8))
    assert result is edit.nodes[0] and not made


def test_numbers_stay_what_they_are() -> None:
    program = function(torch.relu, data(2, 8)).program
    edit = Edit(program, by="test")
    result, _ = emit(edit, lambda x, factor: x * factor, [edit.nodes[0], 1.7], edit.nodes[-1])
    assert result.args == (edit.nodes[0], 1.7)


def test_a_function_that_reads_a_size_is_refused() -> None:
    with pytest.raises(PassError, match="reads a size"):
        emitted(lambda x: x.new_zeros(x.shape[0], 4), data(3, 8))
