"""Norms, gated units and rotations as people write them: each is one op in fp32, in bf16 and under autocast, and the step is the model's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fxopt.api import optimize

WIDTH = 16
Form = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Written(nn.Module):
    """A linear, and behind it something written in some form with `weight`, `bias` and `norm`."""

    def __init__(self, form: Form, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.form, self.norm = form, norm
        self.linear, self.wide = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.weight, self.bias = nn.Parameter(1 + 0.1 * torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form(self, self.linear(x))


def root_mean_square(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-6) * s.weight


def products(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + 1e-5) * s.weight.float()).to(x.dtype)


def rounded_first(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * s.weight


def rounded_scale(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype) * s.weight


def gate_second(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    up, gate = s.wide(x).chunk(2, -1)
    return F.silu(gate) * up


def split(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate, up = torch.split(s.wide(x), WIDTH, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def angles(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [batch, seq, 2 heads, 8], and the angles of their positions [seq, 4]."""
    q = x.unflatten(-1, (2, 8))
    return q, torch.outer(torch.arange(x.shape[1], device=x.device).float(), 10_000 ** (-torch.arange(0, 8, 2, device=x.device) / 8))


def complex_turns(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    q, angle = angles(x)
    turned = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    return torch.view_as_real(turned).flatten(3).type_as(q)


def halves_cast_back(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    q, angle = angles(x)
    q, angle = q.transpose(1, 2), torch.cat((angle, angle), dim=-1)
    half = q.size(-1) // 2
    return (q * angle.cos() + torch.cat((-q[..., half:], q[..., :half]), dim=-1) * angle.sin()).to(dtype=q.dtype)


def pairs(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    q, angle = angles(x)
    cos, sin = (table.repeat_interleave(2, -1)[None, :, None] for table in (angle.cos(), angle.sin()))
    return q * cos + torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2) * sin


def pairs_widened_late(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    q, angle = angles(x)
    cos, sin = (table.repeat_interleave(2, -1)[None, :, None] for table in (angle.cos(), angle.sin()))
    return (q.float() * cos + torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2).float() * sin).to(q.dtype)


def selected_pairs(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
    q, angle = angles(x)
    cache = torch.stack([angle.cos(), angle.sin()], dim=-1).view(1, x.shape[1], 1, 4, 2)
    pair = q.float().reshape(*q.shape[:-1], -1, 2)
    turned = [pair[..., 0] * cache[..., 0] - pair[..., 1] * cache[..., 1], pair[..., 1] * cache[..., 0] + pair[..., 0] * cache[..., 1]]
    return torch.stack(turned, -1).flatten(3).type_as(q)


FORMS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "nn.RMSNorm": ("rms_norm", lambda: Written(lambda s, x: s.norm(x), nn.RMSNorm(WIDTH, eps=1e-6))),
    "nn.RMSNorm with its own epsilon": ("rms_norm", lambda: Written(lambda s, x: s.norm(x), nn.RMSNorm(WIDTH))),
    "F.rms_norm without a weight": ("rms_norm", lambda: Written(lambda s, x: F.rms_norm(x, (x.size(-1),)))),
    "over the root": ("rms_norm", lambda: Written(root_mean_square)),
    "products": ("rms_norm", lambda: Written(products)),
    "rounded first": ("rms_norm", lambda: Written(rounded_first)),
    "rounded scale": ("rms_norm", lambda: Written(rounded_scale)),
    "nn.LayerNorm without bias": ("layer_norm", lambda: Written(lambda s, x: s.norm(x), nn.LayerNorm(WIDTH, bias=False))),
    "layer norm in fp32": ("layer_norm", lambda: Written(lambda s, x: F.layer_norm(x.float(), (WIDTH,), s.weight.float(), s.bias.float()).type_as(x))),
    "gate second": ("swiglu", lambda: Written(gate_second)),
    "split": ("geglu", lambda: Written(split)),
    "complex turns": ("rope", lambda: Written(complex_turns)),
    "halves, cast back": ("rope", lambda: Written(halves_cast_back)),
    "pairs": ("rope", lambda: Written(pairs)),
    "pairs, widened late": ("rope", lambda: Written(pairs_widened_late)),
    "selected pairs": ("rope", lambda: Written(selected_pairs)),
}


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_one_op(name: str, mode: str) -> None:
    """`optimize` compares a step, output and gradients, with the module's own."""
    wanted, build = FORMS[name]
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    torch.manual_seed(0)
    model, x = build().to(dtype).train(), torch.randn(2, 6, WIDTH, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        program = optimize(model, inputs=(x,)).program
    ops = [str(node.target).split(".")[1] for node in program.nodes if str(node.target).startswith("fxopt.")]
    assert ops == [wanted], [miss.reason for record in program.log for miss in record.misses]


def test_operators_that_refuse_mixed_dtypes_are_no_candidates() -> None:
    """A layer norm takes an input and weights of one dtype on CPU: a candidate before the casts cannot be tried."""
    program = optimize(FORMS["layer norm in fp32"][1]().to(torch.bfloat16), inputs=(torch.randn(2, 6, WIDTH, dtype=torch.bfloat16),)).program
    assert "fxopt.layer_norm.default" in {str(node.target) for node in program.nodes}
