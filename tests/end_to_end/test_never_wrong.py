"""What a user changes behind a captured program's back is seen, or refused by name; never a wrong answer."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fxopt
from fxopt.errors import CallError, CaptureError, FxoptError, PassError
from fxopt.kernels.tolerance import SELF_CHECK, same
from tests.models import llama, tokens

QLORA = "lora(rank=4) | quantize(nf4) | fuse | loss | remat"


class Fn(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = [function]
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any) -> Any:
        return self.function[0](self, *args)


def shaken(opt: fxopt.Optimized) -> fxopt.Optimized:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in opt.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return opt


def test_parameters_that_do_not_exist_yet_are_not_handed_out() -> None:
    opt = fxopt.optimize(llama(), "lora(rank=4)")
    for ask in (lambda: list(opt.parameters()), lambda: fxopt.fit(opt, [tokens()], epochs=1, progress=False)):
        with pytest.raises(FxoptError, match="do not exist yet"):
            ask()
    opt(**tokens())
    assert len(fxopt.fit(opt, [tokens()] * 4, epochs=1, lr=0.05, progress=False).losses) == 4


@pytest.mark.parametrize("more", [{"use_cache": True}, {"output_hidden_states": True}])
def test_another_kind_of_call_adds_no_adapters(more: dict[str, Any]) -> None:
    opt = shaken(fxopt.optimize(llama(), QLORA, inputs=tokens()))
    names = list(opt.state_dict())
    ids = tokens()["input_ids"]
    mine, theirs = opt(input_ids=ids, **more), opt.model(input_ids=ids, **more)
    assert same(mine.logits, theirs.logits) and list(opt.state_dict()) == names
    assert same(opt(**tokens()).loss, opt.model(**tokens()).loss)


def test_the_head_is_found_beside_hidden_states_and_caches() -> None:
    opt = fxopt.optimize(llama(use_cache=True), QLORA, inputs={**tokens(), "output_hidden_states": True})
    assert "lm_head.weight" in dict(opt.named_parameters()) and "lm_head.lora_A.default" not in dict(opt.named_parameters())


@pytest.mark.parametrize("passes", ["", "lora(rank=2)"])
@pytest.mark.parametrize("check", [True, False])
def test_code_that_treats_a_size_of_one_in_its_own_way(passes: str, check: bool) -> None:
    for function, big, small in ((lambda s, a: s.l(a) if a.shape[1] == 1 else -s.l(a), (3, 5, 4), (3, 1, 4)),
                                 (lambda s, a: s.l(a) * (2 if a.shape[0] > 1 else 1), (3, 4), (1, 4)),
                                 (lambda s, a: s.l(a) * len(a), (3, 4), (1, 4))):
        for sizes in ((big, small), (small, big)):
            opt = fxopt.optimize(Fn(function, l=nn.Linear(4, 4)), passes, check=check)
            for size in sizes:
                x = torch.randn(size)
                assert same(opt(x), opt.model(x)), sizes


def test_a_replaced_module_of_another_kind() -> None:
    model = Fn(lambda s, x: s.act(s.l(x)), l=nn.Linear(4, 4), act=nn.ReLU())
    opt, x = fxopt.optimize(model), torch.randn(3, 4)
    for new in (nn.Tanh(), nn.Identity()):
        opt(x)
        model.act = new
        assert same(opt(x), model(x))
    model.l = nn.Linear(4, 6)
    assert same(opt(x), model(x))
    adapted = fxopt.optimize(llama(), "lora(rank=2)", inputs=tokens())
    adapted.model.model.norm = nn.Identity()
    with pytest.raises(CallError, match="model.norm was replaced"):
        adapted(**tokens())


def test_plain_attributes() -> None:
    model = Fn(lambda s, x: F.dropout(x, s.d.p, s.training) * s.k, d=nn.Dropout(0.5))
    model.k = 2.0
    opt, x = fxopt.optimize(model), torch.ones(4, 4)
    opt(x)
    opt.d.p = 0.0
    assert torch.equal(opt(x), x * 2)
    opt.k = 5.0
    assert model.k == 5.0 and torch.equal(opt(x), x * 5)


@dataclass
class Settings:
    """As a configuration object of transformers: an attribute of modules, read at every call."""

    scale: float = 2.0
    shift: float | None = None


@pytest.mark.parametrize("made", [Settings, lambda: SimpleNamespace(scale=2.0, shift=None)], ids=["dataclass", "namespace"])
def test_settings_of_a_configuration_object(made: Callable[[], Any]) -> None:
    model = Fn(lambda s, x: s.l(x) * s.config.scale + (s.config.shift or 0.0), l=nn.Linear(4, 4))
    model.config = model.l.config = made()
    opt, x = fxopt.optimize(model), torch.ones(4, 4)
    assert same(opt(x), model.l(x) * 2)
    opt.config.scale = 3.0
    assert same(opt(x), model.l(x) * 3)
    opt.config.shift = 1.0
    assert same(opt(x), model.l(x) * 3 + 1)
    model.config = made()
    assert same(opt(x), model.l(x) * 2) and "config was replaced: the model is captured again" in opt.report


def test_a_configuration_of_transformers_that_changes() -> None:
    opt = fxopt.optimize(llama(), inputs=tokens())
    assert opt(**tokens()).hidden_states is None
    opt.config.output_hidden_states = True
    assert len(opt(**tokens()).hidden_states) == opt.config.num_hidden_layers + 1


def test_hooks_that_come_later_are_named() -> None:
    opt = fxopt.optimize(llama(), inputs=tokens())
    opt.model.model.layers[0].mlp.register_full_backward_hook(lambda *_: None)
    opt(**tokens())
    assert "hooks of model.layers.0.mlp do not run" in opt.report


@pytest.mark.parametrize("passes", ["", str(fxopt.presets.exact())])
def test_no_gradient_is_not_a_gradient_of_zeros(passes: str) -> None:
    model = Fn(lambda s, x: (s.l(x), s.m(x).detach()), l=nn.Linear(4, 4), m=nn.Linear(4, 4))
    opt = fxopt.optimize(model, passes, inputs=(torch.randn(3, 4),))
    opt(torch.randn(3, 4))[0].sum().backward()
    assert model.m.weight.grad is None and model.l.weight.grad is not None
    model = Fn(lambda s, x: (s.l(x).sum(), s.m(x).sum()), l=nn.Linear(4, 4), m=nn.Linear(4, 4))
    opt = fxopt.optimize(model, passes, inputs=(torch.randn(3, 4),))
    opt(torch.randn(3, 4))[0].backward()
    assert model.m.weight.grad is None and model.l.weight.grad is not None


def test_constants_that_compare_equal() -> None:
    opt = fxopt.optimize(Fn(lambda s, x, k: x * math.copysign(1.0, k)))
    assert torch.equal(opt(torch.ones(2), 0.0), torch.ones(2)) and torch.equal(opt(torch.ones(2), -0.0), -torch.ones(2))


def test_logits_read_first_without_gradients() -> None:
    opt = fxopt.optimize(llama(), "loss", inputs=tokens())
    out = opt(**tokens())
    with torch.no_grad():
        out.logits.argmax(-1)
    out.logits.pow(2).mean().backward()
    assert opt.model.lm_head.weight.grad is not None


def test_inputs_that_the_model_writes_into() -> None:
    model = Fn(lambda s, x: x.add_(1) * 2)
    opt, x = fxopt.optimize(model), torch.zeros(3, 4)
    assert torch.equal(opt(x), torch.full((3, 4), 2.0)) and torch.equal(x, torch.ones(3, 4))
    with pytest.raises(CallError, match="writes into its inputs"):
        opt(torch.zeros(4, 3).t())
    both = fxopt.optimize(Fn(lambda s, a, b: a.clamp_(min=0) + b))
    y = -torch.ones(3)
    with pytest.raises((CallError, CaptureError)):
        both(y, y)


@pytest.mark.parametrize("passes", ["lora(rank=4)", QLORA])
def test_autocast_over_adapters(passes: str) -> None:
    opt = shaken(fxopt.optimize(llama(), passes, inputs=tokens()))
    with torch.autocast("cpu", torch.bfloat16):
        mine = opt(**tokens())
    mine.loss.backward()
    assert same(mine.loss.detach().bfloat16(), opt.model(**tokens()).loss.detach().bfloat16())
    assert all(p.grad is not None and p.grad.any() for n, p in opt.named_parameters() if p.requires_grad)


def test_pickle_and_casts_of_an_adapted_model() -> None:
    opt = shaken(fxopt.optimize(llama(), QLORA, inputs=tokens()))
    again = pickle.loads(pickle.dumps(opt))
    assert same(again(**tokens()).loss, opt(**tokens()).loss)
    other = copy.deepcopy(opt).to(torch.bfloat16)
    assert other(**tokens()).logits.dtype == torch.bfloat16
    mine, theirs = other(**tokens()).loss.float(), other.model(**tokens()).loss.float()
    assert abs(mine - theirs) <= SELF_CHECK[torch.bfloat16] * theirs


def test_whole_numbers_made_from_lazy_logits() -> None:
    class Predicts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 4096, bias=False)

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(self.embedding(ids))
            return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "token": logits.argmax(-1), "sure": logits.amax(-1) > 1}

    model, ids = Predicts(), torch.arange(14).view(2, 7)
    expected = model(ids, ids)
    found = fxopt.optimize(model)(ids, ids)
    found["loss"].backward()
    assert torch.equal(found["token"], expected["token"]) and torch.equal(found["sure"], expected["sure"])
    assert not found["token"].requires_grad


@dataclass
class Batch:
    x: torch.Tensor
    scale: float


def test_dataclass_arguments() -> None:
    opt = fxopt.optimize(Fn(lambda s, batch: batch.x * batch.scale))
    for scale in (2.0, 3.0):
        assert torch.equal(opt(Batch(torch.ones(2), scale)), torch.full((2,), scale))


def test_settings_are_not_ignored() -> None:
    for text in ("fuse(ops=[nope])", "loss(chunk=-1)"):
        with pytest.raises(PassError):
            fxopt.parse(text)
    for bad in ({"steps": 1.5}, {"epochs": 1, "accumulate": 1.5}):
        with pytest.raises(FxoptError, match="whole number"):
            fxopt.fit(llama(), [tokens()], progress=False, **bad)
