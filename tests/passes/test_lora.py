"""The lora pass: which linears it takes, what it freezes, what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import fxopt
from fxopt.errors import PassError
from fxopt.kernels.tolerance import same
from tests.models import Handwritten, bert, convnet, gpt2, handwritten, images, llama, pairs, tokens


def adapted(opt: fxopt.Optimized) -> set[str]:
    return {n.split(".lora_A")[0] for n, _ in opt.named_parameters() if "lora_A" in n}


def test_all_linear_takes_every_linear_but_the_head() -> None:
    model = llama(2)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    opt = fxopt.optimize(model, "lora(rank=2)", inputs=tokens())
    assert adapted(opt) == linears - {"lm_head"}
    assert {n for n, p in opt.named_parameters() if p.requires_grad} == {n for n, _ in opt.named_parameters() if "lora_" in n}
    assert "lm_head.weight is the output head" in opt.report


def test_conv1d_and_tied_heads() -> None:
    opt = fxopt.optimize(gpt2(), "lora(rank=2)", inputs=tokens())
    assert len(adapted(opt)) == 3 * 4
    assert opt.model.transformer.h[0].attn.c_attn.lora_A["default"].shape == (2, 32)
    assert opt.model.transformer.h[0].attn.c_attn.lora_B["default"].shape == (96, 2)


def test_encoders_and_convnets() -> None:
    assert len(adapted(fxopt.optimize(bert(), "lora(rank=2)", inputs=tokens()))) == 3 * 6 + 1
    assert adapted(fxopt.optimize(convnet(), "lora(rank=2)", inputs=images())) == {"head.3"}


@pytest.mark.parametrize(("target", "count"), [("q_proj", 3), ("self_attn.q_proj", 3), ("model.layers.1.mlp.up_proj", 1),
                                               ("model.layers.0.mlp.up_proj.weight", 1), ("lm_head", 1)])
def test_targets_are_paths_or_their_last_parts(target: str, count: int) -> None:
    opt = fxopt.optimize(llama(), f'lora(rank=2, targets=["{target}"])', inputs=tokens())
    assert len(adapted(opt)) == count


def test_a_target_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(PassError, match="q_prj") as caught:
        fxopt.optimize(llama(), "lora(targets=[q_prj])", inputs=tokens())
    assert "q_proj" in str(caught.value)


def test_tied_and_shared_weights_are_refused_by_name() -> None:
    with pytest.raises(PassError, match="also read by|tied"):
        fxopt.optimize(handwritten(), "lora(targets=[head])", inputs=pairs())


def test_a_parameter_without_a_module_of_its_own() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Parameter(torch.randn(6, 4))
            self.second = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(x @ self.projection.t()))

    model = Raw()
    opt = fxopt.optimize(model, "lora(rank=2, targets=[projection])", inputs=(torch.randn(3, 4),))
    names = {n for n, p in opt.named_parameters() if p.requires_grad}
    assert names == {"projection_lora_A.default", "projection_lora_B.default"}
    with torch.no_grad():
        model.projection_lora_B["default"].fill_(0.3)
    x = torch.randn(5, 4)
    assert same(opt(x), model(x))
    assert type(opt.merge()) is Raw and same(opt.merge()(x), opt(x))


def test_a_module_called_twice_has_one_adapter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x))))).sum()

    model = Twice()
    opt = fxopt.optimize(model, "lora(rank=2, targets=[layer])", inputs=(torch.randn(3, 4),))
    with torch.no_grad():
        model.layer.lora_B["default"].fill_(0.2)
    x = torch.randn(3, 4)
    opt(x).backward()
    mine = model.layer.lora_A["default"].grad.clone()
    model.zero_grad()
    model(x).backward()
    assert same(mine, model.layer.lora_A['default'].grad)


def test_first_values_depend_on_name_and_seed_alone() -> None:
    def factor(passes: str, **options: int) -> torch.Tensor:
        opt = fxopt.optimize(llama(), passes, inputs=tokens())
        return opt.model.model.layers[1].mlp.up_proj.lora_A["default"].detach()

    one, other = factor("lora(rank=2)"), factor("lora(rank=2, targets=[up_proj])")
    assert torch.equal(one, other) and not torch.equal(one, factor("lora(rank=2, seed=1)"))
    assert one.abs().max() <= 1 / 32**0.5 and one.std() > 0.05


def test_bad_arguments() -> None:
    for text in ("lora(rank=0)", "lora(targets=[])"):
        with pytest.raises(PassError):
            fxopt.parse(text)


def test_eval_after_training_sees_the_adapter() -> None:
    opt = fxopt.optimize(Handwritten(), fxopt.presets.finetune(rank=2), inputs=pairs())
    with torch.no_grad():
        for n, p in opt.named_parameters():
            if "lora_B" in n:
                p.fill_(0.05)
    opt.eval()
    with torch.no_grad():
        assert same(opt(**pairs())[1], opt.model(**pairs())[1])
        assert same(opt(**pairs())[1], opt.merge().eval()(**pairs())[1])


def test_a_weight_that_is_its_own_bias_is_left() -> None:
    """The row that is added is read from the adapted weight too: an adapter at the product alone would miss it."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw, self.last = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(torch.addmm(self.raw[0], x, self.raw))).sum()

    with pytest.raises(PassError, match="also read by"):
        fxopt.optimize(Own(), "lora(rank=2, targets=[raw])", inputs=(torch.randn(3, 4),))


class TwoWays(nn.Module):
    """A tied autoencoder: one weight, read as W and as its transpose."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder, self.out = nn.Linear(6, width, bias=False), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.out(torch.tanh(self.encoder(x)) @ self.encoder.weight))


@pytest.mark.parametrize("width", [6, 4])
def test_a_weight_that_is_read_both_ways_is_left_or_refused(width: int) -> None:
    """One A and B put in both would be B A in one use and its transpose in the other, no adapted weight (of a square one, silently)."""
    model, x = nn.Sequential(TwoWays(width), nn.Linear(6, 3)), torch.randn(5, 6)
    with pytest.raises(PassError, match=r"0.encoder.weight is read as W by linear and as its transpose by matmul"):
        fxopt.optimize(model, "lora(rank=2, targets=[encoder])", inputs=(x,))
    opt = fxopt.optimize(model, "lora(rank=2)", inputs=(x,))
    assert adapted(opt) == {"0.out"} and "0.encoder.weight is read as W by linear and as its transpose by matmul" in opt.report
    with torch.no_grad():
        model[0].out.lora_B["default"].fill_(0.3)
    assert same(opt(x), model(x)) and same(opt.merge()(x), opt(x))


def test_a_call_that_reads_an_adapted_weight_both_ways_is_refused() -> None:
    class Sometimes(TwoWays):
        def forward(self, x: torch.Tensor, back: bool = False) -> torch.Tensor:
            return super().forward(x) if back else self.out(torch.tanh(self.encoder(x)))

    opt = fxopt.optimize(Sometimes(6), "lora(rank=2, targets=[encoder])", inputs=(torch.randn(5, 6),))
    with pytest.raises(PassError, match="read as W by"):
        opt(torch.randn(5, 6), back=True)


def test_a_call_that_reads_an_adapted_weight_the_other_way_round_is_refused() -> None:
    class OneWay(TwoWays):
        def forward(self, x: torch.Tensor, back: bool = False) -> torch.Tensor:
            return x @ self.encoder.weight if back else self.encoder(x)

    for first in (False, True):
        opt = fxopt.optimize(OneWay(6), "lora(rank=2, targets=[encoder])", inputs={"x": torch.randn(5, 6), "back": first})
        with pytest.raises(PassError, match="reads encoder.weight transposed to how"):
            opt(torch.randn(5, 6), back=not first)
        opt(torch.randn(7, 6), back=first)


def test_a_stack_that_is_read_both_ways_is_refused() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(torch.tanh(torch.bmm(x, self.experts)), self.experts.transpose(1, 2))

    with pytest.raises(PassError, match="experts is read as W by bmm and as its transpose by bmm_1"):
        fxopt.optimize(Stack(), "lora(rank=2, targets=[experts])", inputs=(torch.randn(2, 3, 4),))
