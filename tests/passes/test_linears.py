"""Linears: found through casts and transposes where that changes no value, and named where it would; which of them is the output head."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fxopt
from fxopt.errors import PassError
from fxopt.kernels.tolerance import same
from tests.models import llama, tokens

WIDTH = 64
Form = Callable[[nn.Module, torch.Tensor], torch.Tensor]
HALF = torch.bfloat16


class Cast(nn.Module):
    """Two linears, the first written in some form."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.form(self.first, x)).to(self.second.weight.dtype))


def autocast(first: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", HALF):
        return first(x)


def autocast_off(first: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.to(first.weight.dtype), first.weight, first.bias)


def to_half(first: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.to(HALF), first.weight.to(HALF), first.bias.to(HALF))


def product_to_half(first: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.to(HALF) @ first.weight.t().to(HALF) + first.bias


def as_input(first: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.matmul(x, first.weight.type_as(x).transpose(0, 1).to(x.device, x.dtype)) + first.bias.type_as(x)


def twice(first: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.to(HALF), first.weight.double().to(HALF), first.bias.to(HALF)) + F.linear(x.to(HALF), first.weight.to(HALF))


def in_rows(first: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.to(HALF), first.weight.to(HALF).t(), first.bias.to(HALF))  # a weight stored as [in, out]


FORMS = {each.__name__: each for each in (autocast, autocast_off, to_half, product_to_half, as_input, twice, in_rows)}


@pytest.mark.parametrize("around", [False, True], ids=["plain", "under autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_linear_behind_casts_is_adapted_and_quantized(form: str, dtype: torch.dtype, around: bool) -> None:
    """`optimize` compares the graph and the model; here every one of the adapter's gradients besides."""
    torch.manual_seed(0)
    model, x = Cast(FORMS[form]).to(dtype), torch.randn(5, WIDTH, dtype=dtype)
    with torch.autocast("cpu", HALF, enabled=around):
        if form == "autocast_off" and around and dtype == torch.float32:
            with pytest.raises(PassError, match="first.weight, which takes no adapter: it is read in an autocast region inside another"):
                fxopt.optimize(model, "lora(rank=2, targets=[first]) | quantize(nf4)", inputs=(x,))
            return
        opt = fxopt.optimize(model, "lora(rank=2, targets=[first]) | quantize(nf4)", inputs=(x,))
        targets = [str(node.target) for node in opt.program.nodes]
        assert targets.count("fxopt.lora_linear.default") == 1 + (form == "twice") and "first.weight.codes" in targets and "first.weight" not in targets
        nn.init.normal_(model.first.lora_B["default"], std=0.3, generator=torch.Generator().manual_seed(1))
        trained = [p for n, p in opt.named_parameters() if "lora_" in n]
        ours, wanted = (torch.autograd.grad(run(x).float().square().sum(), trained) for run in (opt, opt.model))
    for a, b in zip(ours, wanted, strict=True):
        assert float((a - b).norm()) <= 0.05 * float(b.norm())


def rounded(first: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, first.weight.to(HALF).float(), first.bias)


def test_a_weight_that_is_rounded_on_the_way_is_left_and_named() -> None:
    opt = fxopt.optimize(Cast(rounded).requires_grad_(False), "quantize(nf4, head=true)", inputs=(torch.randn(5, WIDTH),))
    assert "first.weight is rounded on the way to linear (float32 to bfloat16 to float32)" in opt.report
    assert {n for n, _ in opt.named_parameters()} == {"first.weight", "first.bias", "second.bias"}
    with pytest.raises(PassError, match="'first' is first.weight, which takes no adapter: it is rounded on the way to linear") as caught:
        fxopt.optimize(Cast(rounded), "lora(rank=2, targets=[first])", inputs=(torch.randn(5, WIDTH),))
    assert "test_linears.py:" in str(caught.value)
    opt = fxopt.optimize(nn.Sequential(Cast(rounded), nn.Linear(8, 8)), "lora(rank=2)", inputs=(torch.randn(5, WIDTH),))
    assert "0.first.weight is rounded on the way" in opt.report and [n for n, _ in opt.named_parameters() if "lora_A" in n] == ["0.second.lora_A.default"]


def test_a_weight_that_is_widened_takes_an_adapter_and_no_format() -> None:
    """What a format stands for is rounded to the weight's dtype by the model's code, and would not be by the op."""
    def widened(first: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), first.weight.float(), first.bias.float())

    model, x = Cast(widened).to(HALF), torch.randn(5, WIDTH, dtype=HALF)
    opt = fxopt.optimize(model, "lora(rank=2, targets=[first]) | quantize(nf4, head=true)", inputs=(x,))
    assert "first.weight is widened from torch.bfloat16 to torch.float32 where it is read" in opt.report
    assert "second.weight" not in dict(opt.named_parameters()) and model.first.lora_A["default"].shape == (2, WIDTH)


def test_a_product_of_two_weights_is_no_linear() -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.first.weight.to(HALF)
            return self.second(x) + self.second(x) @ (weight @ weight.t()).to(x.dtype)

    opt = fxopt.optimize(Gram().requires_grad_(False), "quantize(nf4)", inputs=(torch.randn(3, 8),))
    assert "first.weight" in dict(opt.named_parameters()) and "second.weight" not in dict(opt.named_parameters())


def test_siblings_read_equal_values() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + self.b(x.to(HALF).float()) + self.a(x.double().float()))

    model, x = Two(), torch.randn(4, 8)
    opt = fxopt.optimize(model, 'lora(rank=2, targets=[a, b]) | siblings', inputs=(x,))  # compared with the model
    assert sorted(len(node.args[2]) for node in opt.program.nodes if str(node.target) == "fxopt.lora_linear.default") == [1, 2]


# -- the output head -------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Two linears without a way around them, and heads of which one or several are used."""

    def __init__(self, use: Callable[[nn.Module, torch.Tensor], object]) -> None:
        super().__init__()
        self.use = use
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head, self.value = nn.Linear(8, 12, bias=False), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> object:
        return self.use(self, self.down(torch.relu(self.up(x))))


def dense(opt: fxopt.Optimized) -> set[str]:
    """The weights that stayed dense."""
    return {n.removesuffix(".weight") for n, _ in opt.named_parameters() if n.endswith(".weight")}


def test_the_head_is_the_last_on_every_way_to_an_output() -> None:
    x = torch.randn(3, 8)

    def heads(use: Callable[[nn.Module, torch.Tensor], object], passes: str = "quantize(nf4)") -> set[str]:
        return dense(fxopt.optimize(Heads(use).requires_grad_(False), passes, inputs=(x,)))

    unused = {"head", "value"}
    assert heads(lambda s, h: (h, s.head(h))) == {"head", "value"}  # a hidden state beside the logits does not matter
    assert heads(lambda s, h: {"logits": s.head(h), "value": s.value(h), "loss": s.head(h).sum() + s.value(h).sum()}) == {"head", "value"}
    assert heads(lambda s, h: s.head(h) + h.sum()) == {"value"}  # there is a way around it
    assert heads(lambda s, h: s.value(torch.tanh(s.head(h)[..., :8]))) == {"value"}  # another linear comes after it
    assert heads(lambda s, h: h) == {"down"} | unused
    assert heads(lambda s, h: s.head(h), "quantize(nf4, head=true)") == {"value"}
    opt = fxopt.optimize(Heads(lambda s, h: {"hidden": h, "logits": s.head(h)}).requires_grad_(False), "quantize(nf4)", inputs=(x,))
    assert "head.weight is the output head: what other linears compute reaches output ['logits'] through it alone" in opt.report
    opt = fxopt.optimize(Heads(lambda s, h: s.head(h) + h.sum()).requires_grad_(False), "quantize(nf4)", inputs=(x,))
    assert "no linear is the output head" in opt.report


@pytest.mark.parametrize("passes", ["lora(rank=2, targets=[up], modules_to_save=[head]) | quantize(nf4)", "lora(rank=2, modules_to_save=[head]) | quantize(nf4)",
                                    "lora(rank=2, targets=[up, head]) | quantize(nf4)", "lora(rank=2, variant=dora, dropout=0.1, targets=[head]) | quantize(nf4)"])
def test_a_head_that_is_trained_or_adapted_is_still_the_head(passes: str) -> None:
    """Without it the linear before would look like the last, and stay dense."""
    model = Heads(lambda s, h: s.head(h))
    opt = fxopt.optimize(model, passes, inputs=(torch.randn(3, 8),))
    assert "down.weight" not in dict(opt.named_parameters()) and "down.weight is the output head" not in opt.report
    assert "head.weight" in dict(opt.named_parameters()) and "head" in opt.report.split(" is the output head")[0].split()[-1]
    trained = [n for n, p in opt.named_parameters() if p.requires_grad and "lora_" not in n]
    assert trained == (["head.modules_to_save.default"] if "modules_to_save" in passes else [])
    if trained:
        assert "head.modules_to_save.default is the output head, and trained" in opt.report


def test_a_weight_that_the_user_trains_is_not_quantized() -> None:
    model = Heads(lambda s, h: s.head(h)).requires_grad_(False)
    model.head.requires_grad_(True)
    model.up.weight.requires_grad_(True)
    for passes in ("quantize(nf4)", "quantize(nf4, head=true)", "quantize(bits=6)"):
        opt = fxopt.optimize(copy.deepcopy(model), passes, inputs=(torch.randn(3, 8),))
        assert dense(opt) == {"up", "head", "value"} and "head.weight is trained" in opt.report and "up.weight is trained" in opt.report


def test_a_loss_beside_routers_still_has_its_head() -> None:
    """An auxiliary loss reaches the loss around the head, but not the logits."""
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.route, self.up, self.head = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 12)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gate = self.route(x).softmax(-1)
            logits = self.head(self.up(x) * gate.amax(-1, keepdim=True))
            return logits.square().mean() + gate.mean(0).square().sum(), logits

    assert dense(fxopt.optimize(Router().requires_grad_(False), "quantize(nf4)", inputs=(torch.randn(3, 8),))) == {"head"}


def test_the_head_of_a_model_whose_head_is_trained() -> None:
    opt = fxopt.optimize(llama(2), "lora(rank=2, modules_to_save=[lm_head]) | quantize(nf4)", inputs=tokens(), check=False)
    assert "lm_head.modules_to_save.default is the output head, and trained" in opt.report
    assert not [n for n in dense(opt) if "_proj" in n]


# -- products in other forms -----------------------------------------------------------------------------------------------


class Between(nn.Module):
    """A weight multiplied in some form, between two linears."""

    def __init__(self, form: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.form, self.first, self.second = form, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.form(self.first(x), self.weight)))


@pytest.mark.parametrize("equation", ["bsi,io->bso", "bsi,oi->bso", "...i,oi->...o", "ka,xyk->xya"])
def test_an_einsum_that_is_a_linear(equation: str) -> None:
    turned = equation.startswith("ka")
    model = Between(lambda x, w: torch.einsum(equation, *((w, x) if turned else (x, w))))
    opt = fxopt.optimize(model, "lora(rank=2) | quantize(int8)", inputs=(torch.randn(2, 3, WIDTH),))
    assert model.lora_A["default"].shape == (2, WIDTH) and "weight is multiplied" not in opt.report
    nn.init.normal_(model.lora_B["default"])
    x = torch.randn(3, 2, WIDTH)
    assert same(opt(x), model(x)) and "weight" not in dict(opt.named_parameters())


@pytest.mark.parametrize("form", [
    lambda x, w: torch.einsum("bsi,ihd->bshd", x, w.view(WIDTH, 8, 8)).flatten(2),
    lambda x, w: torch.einsum("sbi,ib->sb", x.transpose(1, 2) @ x, w)[:, None, :],  # the weight has a letter of the batch
    lambda x, w: torch.tensordot(x, w, dims=([-1], [0])),
    lambda x, w: torch.bmm(x, w.expand(x.shape[0], WIDTH, WIDTH)),
    lambda x, w: F.linear(x, w[:32]).repeat(1, 1, 2),
    lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)),
    lambda x, w: torch.inner(x, w)])
def test_a_product_in_another_form_is_named(form: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    model, x = Between(form), torch.randn(2, 3, WIDTH)
    opt = fxopt.optimize(model, "lora(rank=2) | quantize(int8)", inputs=(x,))
    for name in ("lora", "quantize"):
        assert f"missed {name}: weight is multiplied by" in opt.report
    assert "weight is multiplied" not in fxopt.optimize(Between(form), "lora(rank=2, targets=[first])", inputs=(x,)).report
