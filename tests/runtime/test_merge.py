"""Merging: which function, the arithmetic, the certificate, and every way in which a merge is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn

import fxopt
from fxopt.errors import CheckError, DataError, FxoptError
from fxopt.kernels.tolerance import same
from fxopt.runtime import adapted, merge
from fxopt.runtime.difference import Outputs, difference, outputs
from tests.models import gpt2, llama, tokens

QLORA = "lora(rank=2) | quantize(nf4) | siblings | fuse | loss | remat"
UP = "model.layers.0.mlp.up_proj"


def trained(passes: str = QLORA, size: float = 0.05, make: Any = lambda: llama(1), dtype: torch.dtype = torch.float32) -> fxopt.Optimized:
    opt = fxopt.optimize(make().to(dtype), passes, inputs=tokens(), check=False)
    fill(opt, size)
    return opt


@pytest.fixture(scope="module")
def shared() -> fxopt.Optimized:
    """A quantized model; `quantized` gives its adapter the same values for each test."""
    return trained()


@pytest.fixture
def quantized(shared: fxopt.Optimized) -> fxopt.Optimized:
    fill(shared, 0.05)
    return shared


def fill(opt: fxopt.Optimized, size: float, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in opt.model.named_parameters():
            if name.endswith(f"_B.{adapter}") or name.endswith(f"_A.{adapter}") and not parameter.any():  # an embedding's A is zero
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def added(opt: fxopt.Optimized, path: str = UP, adapter: str = "default") -> torch.Tensor:
    layer = opt.model.get_submodule(path)
    return 2.0 * layer.lora_B[adapter].double() @ layer.lora_A[adapter].double()


def test_stored_is_what_was_trained(quantized: fxopt.Optimized) -> None:
    opt = quantized
    stored = opt.model.get_submodule(UP)._modules["weight"].dequantize()
    plain = opt.merge("stored")
    assert same(plain.get_submodule(UP).weight, (stored.double() + added(opt)).float()) and not hasattr(plain.get_submodule(UP), "lora_A")
    report = opt.merge_report
    assert report.base == "stored" and report.weights == 7 and not report.unchanged and report.inputs == "random" and report.merged.positions == 24
    assert report.merged.relative <= report.allowed < report.adapter_effect.relative and report.merged.kl < report.adapter_effect.kl / 1000
    assert report.merged.top1 == 1.0 and "merged against adapted" in str(report)
    assert type(plain.get_submodule(UP)) is nn.Linear and plain.training and opt.training  # the modes are as they were


def test_original_is_the_given_weights_and_the_adapter(quantized: fxopt.Optimized) -> None:
    opt, before = quantized, llama(1)
    name = f"{UP}.weight"
    for original in (before, before.state_dict()):
        plain = opt.merge("original", original=original)
        assert same(plain.get_submodule(UP).weight, (before.state_dict()[name].double() + added(opt)).float())
    report = opt.merge_report
    assert report.base == "original" and report.allowed is None
    dense = trained("lora(rank=2)")  # the same adapter on the weights before quantization
    assert same(dense.merge().eval()(**tokens()).logits, plain.eval()(**tokens()).logits)
    assert report.merged.relative > opt_difference(opt, "stored")
    fill(opt, 1e-4)
    opt.merge("original", original=before)
    assert "trained on another base" in str(opt.merge_report)


def opt_difference(opt: fxopt.Optimized, base: str) -> float:
    opt.merge(base)
    return opt.merge_report.merged.relative


def test_frozen_weights_without_adapters_come_from_the_original_too() -> None:
    before = llama(1)
    model = copy.deepcopy(before)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
        model.lm_head.weight.mul_(1.01)
    opt = fxopt.optimize(model, "lora(rank=2, modules_to_save=[lm_head]) | quantize", inputs=tokens(), check=False)
    fill(opt, 0.05)
    plain = opt.merge("original", original=before)
    assert opt.merge_report.replaced == ("model.norm.weight",) and torch.equal(plain.model.norm.weight, before.model.norm.weight)
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)  # it is trained


def test_the_choice_must_be_made_and_must_make_sense(quantized: fxopt.Optimized) -> None:
    opt, dense = quantized, trained("lora(rank=2)")
    for call, said in ((lambda: opt.merge(), "7 weights are quantized: which function"), (lambda: opt.merge("nf4"), "no base 'nf4'"),
                       (lambda: opt.merge("original"), "needs the weights"), (lambda: opt.merge(original=llama(2)), 'say base="original"'),
                       (lambda: opt.merge("stored", original=llama(2)), "reads no `original`"), (lambda: opt.merge("stored", adapter="other"), "no adapter 'other'")):
        with pytest.raises(FxoptError, match=said):
            call()
    with pytest.raises(FxoptError, match="nothing was merged"):
        dense.merge_report
    dense.merge()
    dense.merge("stored")
    assert dense.merge_report.base == "dense"


def test_another_models_weights_are_seen(quantized: fxopt.Optimized) -> None:
    opt, state = quantized, llama(1).state_dict()
    name = f"{UP}.weight"
    rows = state[name].roll(1, 0)
    for wrong, said in (({**state, name: rows}, "not what the base was quantized from"), ({**state, name: state[name][:5]}, "the model's is"),
                        ({k: v for k, v in state.items() if k != name}, "lacks 1 of 7"), (opt.state_dict(), "torch.uint8")):
        with pytest.raises(DataError, match=said):
            opt.merge("original", original=wrong)


def test_a_sum_is_rounded_once() -> None:
    opt = trained("lora(rank=2)", dtype=torch.bfloat16)
    plain = opt.merge()
    base = opt.model.get_submodule(UP)._parameters["weight"]
    exact = base.double() + added(opt)
    assert torch.equal(plain.get_submodule(UP).weight, exact.to(torch.bfloat16))
    twice = base + added(opt).to(torch.bfloat16)
    assert not torch.equal(plain.get_submodule(UP).weight, twice)  # rounding the change first is another result
    assert 0 < opt.merge_report.lost < 0.1


def test_merges_that_change_nothing_are_errors(quantized: fxopt.Optimized) -> None:
    fill(quantized, 0.0)
    with pytest.raises(CheckError, match="adds exactly zero to all of its 7 weights"):
        quantized.merge("stored")
    opt = trained("lora(rank=2)", dtype=torch.bfloat16, size=1e-6)
    with torch.no_grad():
        for module, leaf, _ in adapted.weights_of(opt.model):
            module._parameters[leaf].add_(1.0)  # far from zero, where numbers are dense
    with pytest.raises(CheckError, match="torch.bfloat16 cannot hold that") as found:
        opt.merge()
    assert "model.layers.0.self_attn.q_proj.weight" in str(found.value) and "dtype=torch.float32" in str(found.value)
    wide = opt.merge(dtype=torch.float32)
    assert wide.get_submodule(UP).weight.dtype == torch.float32 and same(wide.get_submodule(UP).weight, (opt.model.get_submodule(UP)._parameters["weight"].double() + added(opt)).float())
    assert "the certificate cannot see it" in str(opt.merge_report)
    fill(opt, 3e-3)
    with pytest.raises(CheckError, match=r"loses it: rounding to torch.bfloat16 takes 9\d% of"):
        opt.merge()
    fill(opt, 2e-2)
    opt.merge()
    assert 0.1 < opt.merge_report.lost < 0.9 and "dtype=torch.float32 keeps it" in str(opt.merge_report)
    with quantized.disable_adapter(), pytest.raises(FxoptError, match="no adapter is active"):
        quantized.merge("stored")
    frozen = llama(1).requires_grad_(False)
    with pytest.raises(FxoptError, match="no adapter to merge"):
        fxopt.optimize(frozen, "quantize(nf4)", inputs=tokens()).merge("stored")
    with pytest.raises(FxoptError, match="no adapter is active, or it has not been made"):
        fxopt.optimize(llama(1), "lora(rank=2)").merge()


def test_merges_that_change_too_much_are_errors() -> None:
    opt = trained("lora(rank=2)")
    with torch.no_grad():
        opt.model.get_submodule(UP).lora_B["default"][0, 0] = torch.nan
    with pytest.raises(CheckError, match=f"{UP}.weight is not finite in torch.float32") as found:
        opt.merge()
    assert "train again" in str(found.value)
    half = trained("lora(rank=2)", dtype=torch.float16)
    with torch.no_grad():
        half.model.get_submodule(UP).lora_B["default"][0] = 1e5
        half.model.get_submodule(UP).lora_A["default"].fill_(1.0)
    with pytest.raises(CheckError, match="not finite in torch.float16") as found:
        half.merge()
    assert "merge with dtype=torch.float32" in str(found.value)


def test_the_certificate_sees_a_wrong_merge(quantized: fxopt.Optimized, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, right = quantized, adapted.with_adapter

    def wrong(base: torch.Tensor, *where: Any) -> torch.Tensor:
        return base + (right(base, *where) - base) * 1.001

    monkeypatch.setattr(merge.adapted, "with_adapter", lambda base, *where: wrong(base, *where) if base.dtype == torch.float64 else right(base, *where))
    with pytest.raises(CheckError, match="not the adapted model") as found:
        opt.merge("stored")
    assert "merged against adapted" in str(found.value)  # the numbers are there
    assert opt.merge("stored", certify=False) is not None and "not certified" in str(opt.merge_report)


def test_named_adapters() -> None:
    opt = trained("lora(rank=2, targets=[up_proj]) | quantize(nf4)")
    opt.add_adapter("second", "lora(rank=3, alpha=6, targets=[down_proj])")
    opt(**tokens())
    fill(opt, 0.05, "second")
    held = opt.model.get_submodule("model.layers.0.mlp.down_proj").lora_B["second"]
    held.grad = torch.ones_like(held)
    first, second = opt.merge("stored", adapter="default"), opt.merge("stored")
    assert held.grad is not None and opt.active_adapter == "second" and opt.merge_report.adapter == "second"
    assert same(second(**tokens()).loss, opt(**tokens()).loss)
    opt.set_adapter("default")
    assert same(first(**tokens()).loss, opt(**tokens()).loss) and not same(first(**tokens()).logits, second(**tokens()).logits)
    assert not torch.equal(first.get_submodule(UP).weight, second.get_submodule(UP).weight)


@pytest.mark.parametrize("passes", ["lora(rank=2, variant=dora)", "lora(rank=2, variant=dora, dropout=0.5) | quantize(int8)", "lora(rank=2, variant=rslora) | siblings"])
def test_variants(passes: str) -> None:
    for make in (lambda: llama(1), lambda: gpt2(0.0)):
        opt = trained(passes, make=make)
        plain = opt.merge("stored").eval()
        opt.eval()
        assert same(plain(**tokens()).logits, opt(**tokens()).logits) and opt.merge_report.allowed is not None


def test_a_model_without_ids_uses_the_last_call_and_a_tied_head_stays_tied() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    opt = fxopt.optimize(net, "lora(rank=2)", inputs=(torch.randn(5, 8),))
    fill(opt, 0.1)
    opt.merge()
    assert opt.merge_report.inputs == "the last call" and opt.merge_report.merged.positions == 2
    opt.merge(inputs=(torch.randn(7, 8),))
    assert opt.merge_report.inputs == "given" and opt.merge_report.merged.positions == 7
    tied = trained(make=lambda: llama(1, tie_word_embeddings=True))
    plain = tied.merge("stored")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and plain.lm_head.weight is not tied.model.lm_head.weight
    both = trained("lora(rank=2, targets=[embed_tokens, lm_head])", make=lambda: llama(1, tie_word_embeddings=True))
    plain = both.merge()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and both.merge_report.weights == 1
    assert same(plain.eval()(**tokens()).logits, both.eval()(**tokens()).logits)


def test_the_adapted_model_is_as_it_was(quantized: fxopt.Optimized) -> None:
    opt = quantized
    state, flags = copy.deepcopy(opt.state_dict()), [p.requires_grad for p in opt.parameters()]
    loss = opt(**tokens()).loss
    opt.merge("stored", dtype=torch.bfloat16)
    assert all(torch.equal(v, opt.state_dict()[k]) and v.dtype == opt.state_dict()[k].dtype for k, v in state.items())
    assert torch.equal(opt(**tokens()).loss, loss) and [p.requires_grad for p in opt.parameters()] == flags


def test_difference() -> None:
    a = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 3.0, 1.0]])
    b = torch.tensor([[2.0, 1.0, -torch.inf], [0.0, 3.0, 1.0]])
    found = difference(outputs({"logits": a}), outputs({"logits": b}))
    p, q = torch.softmax(a, -1)[0, :2].double(), torch.softmax(b, -1)[0, :2].double()
    assert found.largest == 1.0 and found.top1 == 0.5 and same(torch.tensor(found.kl), (p * (p / q).log()).sum().float() / 2)
    assert difference(outputs(a), outputs(a)).relative == 0.0 and outputs((torch.tensor(1.0),)).logits is None
    assert difference(outputs(torch.tensor(1.0)), outputs(torch.tensor(2.0))).positions == 0
    with pytest.raises(CheckError, match="do not return the same outputs"):
        difference(outputs(a), Outputs((), None))
