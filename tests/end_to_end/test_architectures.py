"""Fused ops on tiny models of many architectures: every place is filled, and no loss or gradient changes.

The same code makes docs/architectures.md.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from bench import architectures, sites
from bench.architectures import MODES, PAGE, examine, wrong
from bench.configurations import ARCHITECTURES

# Models that a graph cannot hold, and why.
REFUSED = {"Mixtral, experts in a loop": "data-dependent"}
FULL = [kind for kind in sites.KINDS if kind != "loss"]

# A few of different build, and how many places of each kind their two layers have: counted by hand.
FEW = {
    "Llama": (5, 0, 2, 4),
    "Gemma 3": (13, 0, 2, 4),
    "Cohere": (0, 3, 2, 4),
    "GPT-NeoX": (0, 5, 0, 4),
    "DeepSeek-V2": (9, 0, 3, 4),
    "T5 1.1": (12, 0, 4, 0),
    "ViT": (0, 5, 0, 0),
}


def filled(name: str, mode: str, values: bool) -> architectures.Result:
    """Examine an architecture; every place must be filled, and the numbers be the model's own."""
    result = examine(name, mode, values)
    assert result.failed is None
    for kind in FULL:
        k, n = result.k_of_n(kind)
        assert k == n, (name, mode, kind, result.reasons)
    assert wrong(name, result) == []
    return result


@pytest.mark.parametrize("name", FEW)
def test_a_few(name: str) -> None:
    result = filled(name, "fp32", values=True)
    assert tuple(result.k_of_n(kind)[1] for kind in FULL) == FEW[name]
    assert result.gradients == len(list(ARCHITECTURES[name].build().parameters())) and result.gradient is not None


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX", "OLMo 2"])
def test_a_few_under_autocast(name: str) -> None:
    filled(name, "autocast", values=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all(name: str, mode: str) -> None:
    if name in REFUSED:
        assert REFUSED[name] in str(examine(name, mode, values=False).failed)
    else:
        filled(name, mode, values=mode == "fp32")


def test_the_page_names_them_all() -> None:
    text = PAGE.read_text()
    assert len(ARCHITECTURES) >= 20
    for name in ARCHITECTURES:
        assert f"\n| {name} | {'no' if name in REFUSED else 'whole'} |" in text


@pytest.mark.parametrize("name", ["Llama", "GPT-OSS"])
def test_the_page_says_what_is_found(name: str) -> None:
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")][2:6]
    result = examine(name, values=False)
    assert cells == ["{}/{}".format(*result.k_of_n(kind)) if result.k_of_n(kind)[1] else "-" for kind in FULL]


# -- the count can fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.LayerNorm(8), "LayerNorm"),
        (nn.LayerNorm(8, elementwise_affine=False), "LayerNorm"),
        (nn.RMSNorm(8), "RMSNorm"),
        (nn.BatchNorm1d(5), None),
        (nn.GroupNorm(1, 5), None),
        (nn.Softmax(-1), None),
        (nn.Dropout(0.0), None),
        (nn.GELU(), None),
    ],
)
def test_norms_are_known_by_what_they_do(module: nn.Module, kind: str | None) -> None:
    assert sites.norm(module, (torch.randn(3, 5, 8),)) == kind


class Unseen(nn.Module):
    """A gated unit whose parts have names that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.a(x)) * self.b(x)


class Bare(nn.Module):
    """A norm of another power, for which there is no op: in effect an RMSNorm to the count."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Quartic(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Quartic(nn.Module):
    """x over the fourth root of the mean of its fourth powers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(torch.sqrt(x.pow(4).mean(-1, keepdim=True)) + 1e-6) * self.weight


def test_an_op_where_no_place_was_counted_is_told() -> None:
    x = torch.randn(2, 3, 8)
    model = Unseen()
    result = architectures.Result(sites.count(model, {"x": x}))
    result.fired = architectures.fired(architectures.fxopt.optimize(model, inputs={"x": x}).program)
    assert result.impossible() == ["gated MLP in the root"]


def test_another_gradient_is_told() -> None:
    result = architectures.Result(sites.count(nn.Linear(2, 2), {"input": torch.randn(3, 2)}), loss=0.0, gradient=(0.5, "weight"))
    assert wrong("x", result) == ["x: the gradient of weight differs by 5.0e-01"]


def test_a_place_that_stays_has_a_reason() -> None:
    model, x = Bare(), torch.randn(2, 3, 8)
    result = architectures.Result(sites.count(model, {"x": x}))
    program = architectures.fxopt.optimize(model, inputs={"x": x}).program
    result.fired = architectures.fired(program)
    (reason,) = architectures.reasons(program, result)["RMSNorm"]
    assert reason.startswith("rms_norm.")
