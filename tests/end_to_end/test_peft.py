"""Adapters in PEFT's files, both ways, on Linear and Conv1D models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import fxopt
from fxopt.errors import DataError
from fxopt.kernels.tolerance import LOGITS, same
from tests.models import gpt2, llama, tokens

MODELS = {
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt2": (lambda: gpt2(0.0), ["c_attn", "c_proj", "c_fc"]),
}


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model: torch.nn.Module) -> torch.Tensor:
    batch = tokens()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("name", MODELS)
def test_ours_loads_in_peft(name: str, tmp_path: Path) -> None:
    make, _ = MODELS[name]
    opt = fxopt.optimize(make(), "canonicalize | lora(rank=5, alpha=15)", inputs=tokens())
    shake(opt)
    opt.save_adapter(tmp_path)
    theirs = PeftModel.from_pretrained(make().eval(), tmp_path)
    mine = logits(opt.eval())
    assert float((mine - logits(theirs)).abs().max()) <= LOGITS
    assert float((mine - logits(make().eval())).abs().max()) > 100 * LOGITS  # the adapter does something
    assert {n.split(".lora_A")[0] for n, _ in opt.named_parameters() if "lora_A" in n} == {
        n.removeprefix("base_model.model.").split(".lora_A")[0] for n, _ in theirs.named_parameters() if "lora_A" in n}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_theirs_loads_in_ours(name: str, rslora: bool, tmp_path: Path) -> None:
    make, targets = MODELS[name]
    theirs = get_peft_model(make().eval(), LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, task_type="CAUSAL_LM"))
    shake(theirs)
    theirs.save_pretrained(str(tmp_path))
    alpha = 6 * 4**0.5 if rslora else 6
    opt = fxopt.optimize(make().eval(), f"lora(rank=4, alpha={alpha!r}, targets=[{', '.join(targets)}])", inputs=tokens())
    opt.load_adapter(tmp_path)
    assert float((logits(opt) - logits(theirs.eval())).abs().max()) <= LOGITS
    assert float((logits(opt.merge()) - logits(theirs)).abs().max()) <= LOGITS


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_pefts(name: str) -> None:
    make, targets = MODELS[name]
    theirs = get_peft_model(make(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    opt = fxopt.optimize(make(), f"canonicalize | lora(rank=4, alpha=8, targets=[{', '.join(targets)}]) | fuse | loss | remat", inputs=tokens())
    shake(theirs)
    shake(opt)
    mine = {n.replace(".default", "") for n, p in opt.named_parameters() if p.requires_grad}
    a, b = theirs(**tokens()).loss, opt(**tokens()).loss
    assert same(a, b)
    a.backward()
    b.backward()
    expected = {n.removeprefix("base_model.model.").replace(".default.weight", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert mine == expected.keys()
    for n, p in opt.named_parameters():
        if p.requires_grad:
            grad = expected[n.replace(".default", "")]
            assert float(grad.norm()) > 0 and same(p.grad, grad), n


def test_loading_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    opt = fxopt.optimize(llama(), "lora(rank=4, targets=[q_proj])", inputs=tokens())
    shake(opt)
    opt.save_adapter(tmp_path)
    for passes, message in (("lora(rank=8, targets=[q_proj])", "rank=4"), ("lora(rank=4, targets=[v_proj])", "unknown"),
                            ("lora(rank=4, alpha=3, targets=[q_proj])", "alpha")):
        other = fxopt.optimize(llama(), passes, inputs=tokens())
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(DataError, match=message):
            other.load_adapter(tmp_path)
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in before.items())
    with pytest.raises(DataError, match="no adapters"):
        fxopt.optimize(llama()).save_adapter(tmp_path)
    with pytest.raises(DataError, match="no adapters"):
        fxopt.optimize(llama()).load_adapter(tmp_path)
