"""Runs with roundings put back: what they compute, and that they show what an operation rounds inside."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.nn.functional import scaled_dot_product_attention

from fxopt.ir.capture import Call, capture
from fxopt.ir.program import Program
from fxopt.kernels import tolerance
from fxopt.passes.interpreted import values
from fxopt.passes.verify import Runs


class Attention(nn.Module):
    """Attention under a mask of one kind, four heads of queries and, where it may be, two of keys."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        given = {"none": {}, "causal": {"is_causal": True, "scale": 0.3}, "bool": {"attn_mask": mask > 0, "enable_gqa": True}, "float": {"attn_mask": mask}}[self.kind]
        return scaled_dot_product_attention(query, key, value, **given)


def _made(kind: str, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Program, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    heads = 2 if kind == "bool" else 4
    given = [(scale * torch.randn(2, n, 5, 8, generator=generator)).to(dtype).requires_grad_() for n in (4, heads, heads)]
    mask = torch.randn(2, 1, 5, 5, generator=generator).to(dtype)
    mask[0, :, 1] = -1.0  # nothing to look at, as a bool
    return capture(Attention(kind), Call.of((*given, mask), {}), exact=True), [*given, mask]


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
def test_attention_that_is_rounded_inside_is_attention(kind: str) -> None:
    program, inputs = _made(kind)
    exact = values(program, inputs, {}, double=True)
    moved = values(program, inputs, {}, double=True, noise=1, fine=True)
    assert len(exact) == 4 and exact.keys() == moved.keys()
    for name, value in exact.items():
        assert 0 < (moved[name] - value).norm() <= tolerance.SELF_CHECK[torch.float64] * value.norm()


def test_gradients_of_certain_weights_are_known_to_be_rounding() -> None:
    """bf16, every weight 0 or 1: the gradient of the scores is the difference of two equal numbers, and kernels show what rounding leaves of it."""
    program, inputs = _made("causal", 150.0, torch.bfloat16)
    runs = Runs(program, inputs, {})
    name = f"gradient of input {program.placeholders[0].name}"
    assert runs.truth[name].abs().max() < 1e-6
    next(errors := runs.errors())
    assert next(errors)[name] > 1e-4
