"""Equal to PEFT: outputs and adapter gradients with the same adapter, dropout mask and batch; files both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from peft import LoraConfig, PeftModel

import fxopt
from fxopt.errors import DataError
from fxopt.kernels.tolerance import LOGITS, same
from tests.models import gpt2, llama, tokens
from tests.parity import compare, copy_masks, in_peft, module_paths, pair, quiet, shake, trained

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]


def small() -> nn.Module:
    return llama(2)


def plain_gpt2() -> nn.Module:
    return gpt2(0.0, 2)


def biased() -> nn.Module:
    return llama(2, attention_bias=True, mlp_bias=True)


@dataclass(frozen=True)
class Case:
    """A model with an adapter: arguments of our pass, and of PEFT's configuration."""

    make: Callable[[], nn.Module]
    ours: str
    theirs: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> LoraConfig:
        return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | self.theirs)

    @property
    def lora(self) -> str:
        return f"rank=4, alpha=8, {self.ours}"


CASES = {
    "plain": Case(small, f"targets=[{', '.join(LLAMA)}]", {"target_modules": LLAMA}),
    "rslora": Case(small, "targets=[q_proj, up_proj], variant=rslora", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "dora": Case(small, f"targets=[{', '.join(LLAMA)}], variant=dora", {"target_modules": LLAMA, "use_dora": True}),
    "bias": Case(biased, f"targets=[{', '.join(LLAMA)}]", {"target_modules": LLAMA}),
    "bias dora": Case(biased, f"targets=[{', '.join(LLAMA)}], variant=dora", {"target_modules": LLAMA, "use_dora": True}),
    "conv1d": Case(plain_gpt2, f"targets=[{', '.join(GPT2)}]", {"target_modules": GPT2}),
    "conv1d rslora": Case(plain_gpt2, f"targets=[{', '.join(GPT2)}], variant=rslora", {"target_modules": GPT2, "use_rslora": True}),
    "conv1d dora": Case(plain_gpt2, f"targets=[{', '.join(GPT2)}], variant=dora", {"target_modules": GPT2, "use_dora": True}),
    "patterns": Case(small, f"targets=[{', '.join(LLAMA)}], rank_pattern={{q_proj: 2, \"layers.1.mlp.up_proj\": 7}}, alpha_pattern={{down_proj: 3, q_proj: 1}}",
                     {"target_modules": LLAMA, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"down_proj": 3, "q_proj": 1}}),
    "head": Case(small, "targets=[lm_head, o_proj]", {"target_modules": ["lm_head", "o_proj"]}),
}
DROPPED = {
    "linear": Case(small, f"targets=[{', '.join(LLAMA)}], dropout=0.4", {"target_modules": LLAMA, "lora_dropout": 0.4}),
    "bias": Case(biased, f"targets=[{', '.join(LLAMA)}], dropout=0.4", {"target_modules": LLAMA, "lora_dropout": 0.4}),
    "conv1d": Case(plain_gpt2, f"targets=[{', '.join(GPT2)}], dropout=0.4", {"target_modules": GPT2, "lora_dropout": 0.4}),
}
DROPPED_DORA = {
    "linear": Case(biased, "targets=[q_proj, down_proj], dropout=0.4, variant=dora",
                   {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.4, "use_dora": True}),
    "conv1d": Case(plain_gpt2, "targets=[c_attn, c_fc], dropout=0.4, variant=dora",
                   {"target_modules": ["c_attn", "c_fc"], "lora_dropout": 0.4, "use_dora": True}),
}
FULL = "siblings | fuse | loss | remat"


def logits(model: nn.Module) -> torch.Tensor:
    batch = tokens()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize(("name", "rest"), [(name, FULL) for name in CASES] + [(name, "") for name in ("plain", "bias dora", "conv1d")])
def test_outputs_and_gradients(name: str, rest: str) -> None:
    case = CASES[name]
    theirs, opt = pair(case.make, case.lora, case.config, tokens(), rest)
    compare(theirs, opt, tokens())
    theirs.eval(), opt.eval()
    assert float((logits(opt) - logits(theirs)).abs().max()) <= LOGITS


@pytest.mark.parametrize(("name", "rest"), [("linear", FULL), ("bias", ""), ("conv1d", FULL)])
def test_dropout_with_the_same_masks(name: str, rest: str) -> None:
    case = DROPPED[name]
    theirs, opt = pair(case.make, case.lora, case.config, tokens(), rest)
    assert copy_masks(theirs, opt, tokens(), seed=5) == len(module_paths(trained(opt)))
    grads = compare(theirs, opt, tokens(), seed=5)
    other = {n: p.grad for n, p in trained(opt).items()}
    torch.manual_seed(6)
    opt.zero_grad()
    opt(**tokens()).loss.backward()
    assert not any(torch.equal(p.grad, grads[n]) for n, p in trained(opt).items() if "lora_B" in n), other.keys()
    theirs.eval(), opt.eval()
    with torch.no_grad():
        assert torch.equal(opt(**tokens()).loss, opt(**tokens()).loss)


@pytest.mark.parametrize(("name", "rest"), [("linear", FULL), ("conv1d", "")])
def test_dropout_with_dora(name: str, rest: str) -> None:
    """Both draw their masks from torch's generator, in the order of the layers."""
    case = DROPPED_DORA[name]
    theirs, opt = pair(case.make, case.lora, case.config, tokens(), rest)
    compare(theirs, opt, tokens(), seed=5)


def test_several_adapters_and_switching() -> None:
    configs = {"default": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
               "other": LoraConfig(r=3, lora_alpha=9, target_modules=["up_proj", "down_proj"], use_rslora=True, task_type="CAUSAL_LM")}
    theirs = in_peft(small(), configs)
    opt = fxopt.optimize(small(), "canonicalize | lora(rank=4, alpha=8, targets=[q_proj, up_proj]) | siblings | fuse", inputs=tokens())
    opt.add_adapter("other", "lora(rank=3, alpha=9, targets=[up_proj, down_proj], variant=rslora)")
    opt.prepare(tokens())
    losses = {}
    for name in ("other", "default", "other"):
        opt.set_adapter(name), theirs.set_adapter(name)
        if name not in losses:
            shake(opt, seed=len(name))
            with torch.no_grad():
                for (n, a), (m, b) in zip(sorted(trained(opt).items()), sorted(trained(theirs).items()), strict=True):
                    assert n == m
                    b.copy_(a)
        compare(theirs, opt, tokens())
        loss = opt(**tokens()).loss.detach()
        assert name not in losses or torch.equal(losses[name], loss)
        losses[name] = loss
    assert not same(*losses.values())
    with opt.disable_adapter(), theirs.disable_adapter():
        assert same(opt(**tokens()).loss, theirs(**tokens()).loss)


@pytest.mark.parametrize("quantized", [False, True])
def test_disabled_is_the_base_bit_for_bit(quantized: bool) -> None:
    plain = small()
    opt = fxopt.optimize(small(), "canonicalize | lora(rank=4) | siblings | fuse" + (" | quantize(nf4)" if quantized else ""), inputs=tokens())
    if quantized:
        with torch.no_grad():
            for name, module in plain.named_modules():
                if isinstance(module, nn.Linear) and name != "lm_head":
                    module.weight.copy_(opt.model.get_submodule(name)._modules["weight"].dequantize())
    shake(opt)
    with torch.no_grad(), opt.disable_adapter():
        for mine, given in ((opt(**tokens()), plain(**tokens())), (opt.model(**tokens()), plain(**tokens()))):
            assert torch.equal(mine.loss, given.loss) and torch.equal(mine.logits, given.logits)
    assert not same(opt(**tokens()).loss, plain(**tokens()).loss)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if at % 2 else name for at, name in enumerate(CASES)])
def test_merge(name: str) -> None:
    case = CASES[name]
    theirs, opt = pair(case.make, case.lora, case.config, tokens())
    theirs.eval(), opt.eval()
    with quiet():
        merged = theirs.merge_and_unload()
    assert float((logits(opt.merge()) - logits(merged)).abs().max()) <= LOGITS


FILES = CASES | {f"dropout {name}": case for name, case in DROPPED.items()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if at % 2 else name for at, name in enumerate(FILES)])
def test_ours_loads_in_peft(name: str, tmp_path: Path) -> None:
    case = FILES[name]
    opt = fxopt.optimize(case.make(), f"canonicalize | lora({case.lora})", inputs=tokens())
    shake(opt)
    opt.save_adapter(tmp_path)
    with quiet():
        theirs = PeftModel.from_pretrained(case.make().eval(), tmp_path)
    mine = logits(opt.eval())
    assert float((mine - logits(theirs)).abs().max()) <= LOGITS
    assert float((mine - logits(case.make().eval())).abs().max()) > 100 * LOGITS  # the adapter does something
    names = {n for n, _ in theirs.named_parameters()}
    assert module_paths(dict(opt.named_parameters())) == {n.removeprefix("base_model.model.") for n in module_paths(dict.fromkeys(names))}
    config, given = theirs.peft_config["default"], case.config
    assert (config.use_rslora, config.use_dora, config.lora_dropout) == (given.use_rslora, given.use_dora, given.lora_dropout)


@pytest.mark.parametrize("name", [name if at % 2 else pytest.param(name, marks=pytest.mark.slow) for at, name in enumerate(FILES)])
def test_theirs_loads_in_ours(name: str, tmp_path: Path) -> None:
    case = FILES[name]
    theirs = in_peft(case.make().eval(), case.config)
    shake(theirs)
    with quiet():
        theirs.save_pretrained(str(tmp_path))
    opt = fxopt.optimize(case.make().eval(), f"lora({case.lora})", inputs=tokens())
    opt.load_adapter(tmp_path)
    assert float((logits(opt) - logits(theirs.eval())).abs().max()) <= LOGITS
    assert float((logits(opt.merge()) - logits(theirs)).abs().max()) <= LOGITS


def test_loading_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    opt = fxopt.optimize(small(), "lora(rank=4, targets=[q_proj])", inputs=tokens())
    shake(opt)
    opt.save_adapter(tmp_path)
    for passes, message in (("lora(rank=8, targets=[q_proj])", "rank=4"), ("lora(rank=4, targets=[v_proj])", "unknown"),
                            ("lora(rank=4, alpha=3, targets=[q_proj])", "alpha")):
        other = fxopt.optimize(small(), passes, inputs=tokens())
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(DataError, match=message):
            other.load_adapter(tmp_path)
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in before.items())
    with pytest.raises(DataError, match="no adapters"):
        fxopt.optimize(small()).save_adapter(tmp_path)
    with pytest.raises(DataError, match="no adapters"):
        fxopt.optimize(small()).load_adapter(tmp_path)
