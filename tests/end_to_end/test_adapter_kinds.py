"""Adapters of embeddings, tied weights, convolutions, stacks of experts and whole modules: equal to PEFT's, in memory and in files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from transformers import GemmaForCausalLM, MixtralConfig, MixtralForCausalLM

import fxopt
from fxopt.errors import DataError, PassError
from fxopt.ir import meta
from fxopt.kernels.tolerance import LOGITS, same
from fxopt.runtime import peft_keys
from tests.models import VOCABULARY, llama, tokens
from tests.parity import compare, in_peft, pair, quiet, shake, trained
from tests.captured import FAMILIES


def one_block() -> nn.Module:
    return llama(1)


def tied() -> nn.Module:
    return llama(1, tie_word_embeddings=True)


def padded() -> nn.Module:
    return llama(1, pad_token_id=3)


def scaled() -> nn.Module:
    """An embedding whose output is multiplied by a constant."""
    torch.manual_seed(0)
    config = FAMILIES["gemma"](1).config
    config.tie_word_embeddings = False
    return GemmaForCausalLM(config).train()


class Convolutions(nn.Module):
    """Convolutions in one, two and three dimensions, with strides, paddings by number and by name, with and without bias."""

    def __init__(self, groups: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=dilation)
        self.second = nn.Conv2d(8, 8, (1, 3), padding="same", bias=False, groups=groups)
        self.line = nn.Conv1d(8, 6, 3, padding=2)
        self.cube = nn.Conv3d(2, 4, 2)
        self.point = nn.Conv2d(6, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.second(F.gelu(self.first(x))))
        z = self.line(y.flatten(2)).tanh()
        cube = self.cube(y.reshape(y.shape[0], 2, 4, *y.shape[2:]))
        return self.point(z.unsqueeze(-1)).square().mean() + cube.sin().mean()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions()


def pictures() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


CONVOLUTIONS = ["first", "second", "line", "cube", "point"]


@dataclass(frozen=True)
class Case:
    """A model with an adapter: arguments of our pass, and of PEFT's configuration."""

    make: Callable[[], nn.Module]
    ours: str
    theirs: dict[str, Any] = field(default_factory=dict)
    batch: Callable[[], dict[str, torch.Tensor]] = tokens

    @property
    def config(self) -> LoraConfig:
        return LoraConfig(**{"r": 4, "lora_alpha": 8} | ({"task_type": "CAUSAL_LM"} if self.batch is tokens else {}) | self.theirs)

    @property
    def lora(self) -> str:
        return f"rank=4, alpha=8, {self.ours}"


CASES = {
    "embedding": Case(one_block, "targets=[embed_tokens, q_proj]", {"target_modules": ["embed_tokens", "q_proj"]}),
    "padded embedding": Case(padded, "targets=[embed_tokens], variant=rslora", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "embedding dora": Case(one_block, "targets=[embed_tokens, lm_head], variant=dora", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "scaled embedding": Case(scaled, "targets=[embed_tokens]", {"target_modules": ["embed_tokens"]}),
    "tied": Case(tied, "targets=[embed_tokens, lm_head, up_proj]", {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "ensure_weight_tying": True}),
    "conv": Case(convolutions, f"targets=[{', '.join(CONVOLUTIONS)}]", {"target_modules": CONVOLUTIONS}, pictures),
    "conv dora": Case(convolutions, f"targets=[{', '.join(CONVOLUTIONS)}], variant=dora", {"target_modules": CONVOLUTIONS, "use_dora": True}, pictures),
    "whole": Case(one_block, "targets=[q_proj], modules_to_save=[lm_head, \"model.norm\", \"layers.0.input_layernorm\"]",
                  {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm", "layers.0.input_layernorm"]}),
    "whole tied": Case(tied, "targets=[q_proj], modules_to_save=[lm_head, embed_tokens]",
                       {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}),
}
# PEFT's two parameters of a tied weight have no single gradient, and it makes a copy of a tied module that trains on its own
SEPARATE = ("tied", "whole tied")


def value(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**{name: each for name, each in batch.items() if name != "labels"})
    return out.logits if hasattr(out, "logits") else out


@pytest.mark.parametrize("name", [name for name in CASES if name not in SEPARATE])
def test_outputs_and_gradients(name: str) -> None:
    case = CASES[name]
    theirs, opt = pair(case.make, case.lora, case.config, case.batch(), "siblings | fuse | loss | remat")
    compare(theirs, opt, case.batch())


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_dropout_of_convolutions(variant: str) -> None:
    """Both draw their masks from torch's generator, in the order of the layers."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=CONVOLUTIONS, lora_dropout=0.4, use_dora=variant == "dora")
    lora = f"rank=4, alpha=8, targets=[{', '.join(CONVOLUTIONS)}], dropout=0.4, variant={variant}"
    theirs, opt = pair(convolutions, lora, config, pictures(), "remat")
    compare(theirs, opt, pictures(), seed=5)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if at % 2 else name for at, name in enumerate(CASES)])
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    opt = fxopt.optimize(case.make(), f"lora({case.lora})", inputs=case.batch())
    shake(opt)
    opt.save_adapter(tmp_path / "ours")
    with quiet():
        theirs = PeftModel.from_pretrained(case.make().eval(), tmp_path / "ours")
    mine = value(opt.eval(), case.batch())
    assert float((mine - value(theirs, case.batch())).abs().max()) <= LOGITS
    assert float((mine - value(case.make().eval(), case.batch())).abs().max()) > 100 * LOGITS
    with quiet():
        theirs.save_pretrained(str(tmp_path / "theirs"))
    fresh = fxopt.optimize(case.make().eval(), f"lora({case.lora})", inputs=case.batch())
    fresh.load_adapter(tmp_path / "theirs")
    assert float((value(fresh, case.batch()) - mine).abs().max()) <= LOGITS
    merged = opt.merge()
    assert type(merged) is type(case.make()) and float((value(merged, case.batch()) - mine).abs().max()) <= LOGITS
    with opt.disable_adapter():
        assert torch.equal(value(opt, case.batch()), value(case.make().eval(), case.batch()))


# -- tied weights ----------------------------------------------------------------------------------------------------------


def test_a_tied_weight_has_one_adapter() -> None:
    opt = fxopt.optimize(tied(), "canonicalize | lora(rank=4, targets=[embed_tokens, lm_head]) | loss", inputs=tokens())
    assert set(trained(opt)) == {"model.embed_tokens.lora_A.default", "model.embed_tokens.lora_B.default"}
    shake(opt)
    assert {"lm_head.lora_A.default", "lm_head.weight"} <= opt.state_dict().keys()
    opt(**tokens()).loss.backward()
    mine = {name: parameter.grad.clone() for name, parameter in trained(opt).items()}
    opt.zero_grad()
    opt.model(**tokens()).loss.backward()  # the original code reads the weight at both places
    assert all(same(mine[name], parameter.grad) for name, parameter in trained(opt).items())
    merged = opt.merge()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_naming_one_of_two_tied_weights_is_an_error() -> None:
    for targets, missing in (("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")):
        with pytest.raises(PassError, match=f"name {missing}"):
            fxopt.optimize(tied(), f"lora(targets=[{targets}])", inputs=tokens())
    with pytest.raises(PassError, match="tied to model.embed_tokens.weight, which is not among them"):
        fxopt.optimize(tied(), "lora(targets=[q_proj], modules_to_save=[lm_head])", inputs=tokens())
    with pytest.raises(PassError, match="DoRA would scale"):
        fxopt.optimize(tied(), "lora(targets=[embed_tokens, lm_head], variant=dora)", inputs=tokens())


def test_two_adapters_for_a_tied_weight_are_refused(tmp_path: Path) -> None:
    theirs = in_peft(tied(), LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"))
    shake(theirs)
    with quiet():
        theirs.save_pretrained(str(tmp_path))
    opt = fxopt.optimize(tied(), "lora(rank=4, alpha=8, targets=[embed_tokens, lm_head])", inputs=tokens())
    with pytest.raises(DataError, match="two adapters for it that differ"):
        opt.load_adapter(tmp_path)


# -- convolutions ------------------------------------------------------------------------------------------------------------


def test_what_a_convolution_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(PassError, match="second.weight is a convolution with 2 groups"):
        fxopt.optimize(Convolutions(groups=2), "lora(targets=[second])", inputs=pictures())
    opt = fxopt.optimize(Convolutions(dilation=2), "lora(rank=2, targets=[first])", inputs=pictures())
    shake(opt)
    x = pictures()
    assert same(opt(**x), opt.model(**x)) and same(opt.merge()(**x), opt(**x))
    with pytest.raises(DataError, match="first: PEFT's adapters of convolutions have no dilation"):
        opt.save_adapter(tmp_path)


# -- stacks of experts -------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Stacks of matrices in both orders, read in every way that a program writes: by batch, by index, one by one, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"right": (3, 6, 5), "left": (3, 5, 6), "chosen": (3, 5, 4), "single": (3, 4, 5)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        stack = x.expand(3, -1, -1)
        one = torch.bmm(stack, self.right).sin()  # [3, rows, 5]
        two = torch.matmul(self.left, stack.transpose(1, 2)).sin()  # [3, 5, rows]
        rows = (one + two.transpose(1, 2)).sum(0)
        picked = torch.bmm(rows.unsqueeze(1), self.chosen[ids]).squeeze(1)  # [rows, 4]
        left = torch.bmm(self.chosen[ids].transpose(1, 2), rows.unsqueeze(-1)).squeeze(-1)
        last = sum(F.linear(rows, self.single[i], self.bias) + torch.addmm(self.bias, rows, self.single[i].t()) for i in range(3))
        return (picked * left + last.cos()).square().mean()


class Stacked(nn.Module):
    """Stacks of matrices in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Experts()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(x, ids)


def stack() -> nn.Module:
    torch.manual_seed(0)
    return Stacked()


def choices() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(7, 6, generator=torch.Generator().manual_seed(2)), "ids": torch.tensor([0, 2, 1, 1, 0, 2, 2])}


def moe(form: str) -> Callable[[], nn.Module]:
    """A mixture of experts whose products are grouped, or in a batch by index."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                                                 num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, use_cache=False, pad_token_id=0))
        model.set_experts_implementation(form)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        return model.train()

    return make


STACKS = {
    "one by one": (stack, ["inner.right", "inner.left", "inner.chosen", "inner.single"], choices),
    "grouped": (moe("grouped_mm"), ["experts.gate_up_proj", "experts.down_proj"], tokens),
    "by index": (moe("batched_mm"), ["experts.gate_up_proj", "experts.down_proj"], tokens),
}


def compare_stacks(theirs: nn.Module, opt: fxopt.Optimized, batch: dict[str, torch.Tensor]) -> None:
    """Losses and gradients, where PEFT keeps the factors of all experts in two matrices, by the depth of its wrappers."""
    losses = []
    for model in (theirs, opt):
        model.zero_grad()
        out = model(**batch)
        losses.append(out.loss if hasattr(out, "loss") else out)
        losses[-1].backward()
    assert same(*losses)
    gradients = {name.removeprefix(peft_keys.PREFIX).replace(".default", ""): p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    mine = trained(opt)
    checked = 0
    for path in sorted({name.rpartition(".")[0].rpartition(".")[0] for name in mine}):
        leaves = [leaf for leaf in opt.model.get_submodule(path)._parameters if f"{path}.{leaf}_lora_A.default" in mine]
        for depth, leaf in enumerate(reversed(leaves)):
            place = path + ".base_layer" * depth
            a, b = (mine[f"{path}.{leaf}_lora_{letter}.default"].grad for letter in "AB")
            expected = peft_keys.unstacked(gradients[f"{place}.lora_A.weight"], gradients[f"{place}.lora_B.weight"], a.shape[0], path)
            if expected[0].shape != a.shape or not same(expected[0].contiguous(), a):
                expected = expected[1].mT, expected[0].mT  # the module does not say that it is [experts, in, out]
            assert float(a.norm()) > 0 and same(expected[0].contiguous(), a) and same(expected[1].contiguous(), b), (path, leaf)
            checked += 1
    assert checked and 2 * checked == len(mine)


def formed(opt: fxopt.Optimized) -> list[str]:
    """Nodes of the pass whose value is as large as a whole matrix of a stack: B A, or W + B A."""
    whole = {frozenset(map(str, slot.shape[-2:])) for slot in opt.program.slots.values() if len(slot.shape) == 3 and slot.made is None}
    return [node.name for node in opt.program.nodes if "lora" in meta.provenance(node).passes and isinstance(value := node.meta.get("val"), torch.Tensor)
            and frozenset(map(str, value.shape[-2:])) in whole]


@pytest.mark.parametrize("name", STACKS)
def test_stacks_of_experts(name: str, tmp_path: Path) -> None:
    make, targets, batch = STACKS[name]
    lora = f"lora(rank=3, alpha=6, targets=[{', '.join(targets)}])"
    opt = fxopt.optimize(make(), f"canonicalize | {lora} | fuse | remat", inputs=batch())
    shake(opt)
    opt.save_adapter(tmp_path / "ours")
    with quiet():
        theirs = PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True)
    compare_stacks(theirs, opt, batch())
    assert not formed(opt)
    with quiet():
        theirs.save_pretrained(str(tmp_path / "theirs"))
    fresh = fxopt.optimize(make(), lora, inputs=batch())
    fresh.load_adapter(tmp_path / "theirs")
    assert all(torch.equal(parameter, dict(opt.named_parameters())[key]) for key, parameter in fresh.named_parameters())
    with torch.no_grad():
        mine, merged = (model(**batch()) for model in (opt.eval(), opt.merge().eval()))
        assert same(*(out if isinstance(out, torch.Tensor) else out.logits for out in (mine, merged)))
    with opt.disable_adapter(), torch.no_grad():
        base = make().eval()
        assert all(torch.equal(a, b) for a, b in zip(*(([out] if isinstance(out, torch.Tensor) else [out.loss, out.logits])
                                                       for out in (opt(**batch()), base(**batch()))), strict=True))


def test_what_experts_cannot_have() -> None:
    for option, word in (("variant=dora", "DoRA"), ("dropout=0.1", "dropout")):
        with pytest.raises(PassError, match=f"inner.right is a stack of experts, whose adapters take no {word}"):
            fxopt.optimize(stack(), f"lora(targets=[inner.right], {option})", inputs=choices())


def test_a_target_that_something_else_reads_is_named() -> None:
    with pytest.raises(PassError, match=r"'inner.bias' is inner.bias, which takes no adapter: linear\w* reads it"):
        fxopt.optimize(stack(), "lora(targets=[inner.bias])", inputs=choices())
