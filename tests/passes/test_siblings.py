"""The siblings pass: what it joins, what it leaves, and that nothing changes but the number of products."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import fxopt
from fxopt.kernels.lora_linear import OP as LORA_LINEAR, body
from fxopt.kernels.tolerance import same
from tests.models import llama, tokens

BEFORE = "lora(rank=2) | quantize(nf4)"


def counts(opt: fxopt.Optimized) -> list[int]:
    return sorted(len(node.args[2]) for node in opt.program.nodes if node.target is LORA_LINEAR.forward.overload)


def shaken(passes: str, make=llama, **options) -> fxopt.Optimized:
    opt = fxopt.optimize(make(), passes, inputs=tokens(), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in opt.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return opt


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_projections_of_one_tensor_are_one_op(variant: str) -> None:
    plain, opt = (shaken(f"lora(rank=2, variant={variant}) | quantize(nf4){more}") for more in ("", " | siblings"))
    assert counts(plain) == [1] * 21 and counts(opt) == [1] * 6 + [2] * 3 + [3] * 3
    a, b = plain(**tokens()).loss, opt(**tokens()).loss
    assert same(a, b)
    a.backward()
    b.backward()
    grads = dict(plain.named_parameters())
    for name, parameter in opt.named_parameters():
        if parameter.requires_grad:
            assert float(parameter.grad.norm()) > 0 and same(parameter.grad, grads[name].grad), name


def test_they_may_differ_in_rank_format_and_be_partly_adapted() -> None:
    text = "lora(rank=2, rank_pattern={q_proj: 4}, targets=[q_proj, v_proj, gate_proj, up_proj]) | quantize(bits=5.0) | siblings"
    opt = shaken(text)
    assert counts(opt) == [2] * 6
    assert len({stored for node in opt.program.nodes if node.target is LORA_LINEAR.forward.overload for stored in node.args[2]}) > 1
    assert same(opt(**tokens()).loss, opt.model(**tokens()).loss)


def test_a_tensor_that_many_blocks_read_joins_inside_each_block_only() -> None:
    """As the cross attentions of all decoder blocks read one encoder output."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            return x + self.out(torch.tanh(self.key(memory)) * self.value(memory))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x, memory)
            return self.head(x).sum()

    opt = fxopt.optimize(Decoder(), "lora(rank=2) | siblings", inputs=(torch.randn(4, 8), torch.randn(4, 8)))
    assert counts(opt) == [1, 1, 1, 2, 2, 2]


def test_masks_of_siblings_differ_and_come_from_the_seed() -> None:
    opt = shaken("lora(rank=2, dropout=0.5) | siblings")

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return opt(**tokens()).loss

    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))
    opt.eval()
    assert torch.equal(loss(1), loss(2))


def test_one_product_for_all_low_sides_and_joined_gradients_where_that_moves_less() -> None:
    x, weights = torch.randn(64, 96), [torch.randn(8, 96), torch.randn(8, 96)]
    a, b = [torch.randn(2, 96), torch.randn(2, 96)], [torch.randn(8, 2), torch.randn(8, 2)]
    rest = ["dense"] * 2, [8, 96] * 2, [], a, b
    with FlopCounterMode(display=False) as counter:
        *ys, low = body.forward(x, weights, *rest, [1.0] * 2, False, 0.0, None)
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 2 * 64 * 96 * (8 + 8) + 2 * 64 * 96 * 4
    assert body.joined(64, 96, 16, 2) is (16 * (96 + 64) < 64 * 96)
    plain = sum(y.new_ones(y.shape) @ (w + bi @ ai) for y, w, ai, bi in zip(ys, weights, a, b))
    with FlopCounterMode(display=False) as counter:
        (dx,) = body.backward([torch.ones_like(y) for y in ys], None, weights, *rest, low, [1.0] * 2, False, 0.0, None, [True] + [False] * 6)
    assert same(dx, plain) and not counter.get_flop_counts()["Global"].get(torch.ops.aten.addmm)


def test_without_siblings_it_says_so() -> None:
    opt = fxopt.optimize(llama(1), "lora(rank=2, targets=[o_proj]) | siblings", inputs=tokens())
    assert "changed nothing" in opt.report
