"""canonicalize on whole models: bitwise the same step, fewer nodes, no new guards."""

from __future__ import annotations

import pytest
import torch
from captured import FAMILIES, data, family, function, weight

from fxopt.errors import CheckError
from fxopt.ir import normal
from fxopt.passes.canonicalize import Canonicalize


@pytest.mark.parametrize("name", FAMILIES)
def test_models_are_bitwise_the_same(name: str) -> None:
    before = family(name)
    guards = len(before.program.fake_mode.shape_env.guards)
    after = before.check(Canonicalize())
    assert len(after.program.nodes) < len(before.program.nodes)
    assert not after.calls("_assert_tensor_metadata")
    assert len(before.program.fake_mode.shape_env.guards) == guards


def test_low_precision() -> None:
    family("gemma", dtype=torch.bfloat16).check(Canonicalize())


def test_dropout_draws_the_same_numbers() -> None:
    captured = function(lambda x, w: torch.dropout(torch.dropout(x.float(), 0.5, True) * w, 0.25, True) * 1.0 * torch.rand_like(x), data(8, 6), w=weight(6))
    captured.check(Canonicalize())


def test_the_input_program_stays_valid() -> None:
    before = family("llama")
    nodes = [node.format_node() for node in before.program.nodes]
    before.after(Canonicalize())
    assert [node.format_node() for node in before.program.nodes] == nodes


def test_a_wrong_rule_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: every multiplication by a number is taken for one by 1."""
    monkeypatch.setitem(normal._RULES, torch.ops.aten.mul.Tensor, lambda node, x, flow: not isinstance(node.args[1], torch.fx.Node))
    with pytest.raises(CheckError):
        function(lambda x: (x * 1.5).relu(), data(3, 4)).check(Canonicalize())
