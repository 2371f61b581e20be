"""fit on an optimized model: the losses of PEFT, and an adapter that PEFT loads."""

import copy
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from fxopt.passes import presets
from fxopt.train.trainer import fit


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def make_batches() -> list[dict[str, torch.Tensor]]:
    """Batches whose lengths and numbers of supervised tokens differ."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length, supervised in ((8, 2), (12, 7), (9, 1), (12, 12), (8, 5)):
        ids = torch.randint(3, 64, (4, length), generator=generator)
        labels = ids.masked_fill(torch.arange(length) < length - supervised, -100)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def test_fit_equals_peft_and_peft_loads_the_adapter(tmp_path: Path) -> None:
    base, batches = llama(), make_batches()
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(copy.deepcopy(base), config)
    peft.save_pretrained(tmp_path / "first")
    theirs = fit(peft, batches, epochs=2, accumulate=2, lr=1e-2, progress=False)

    opt = fxopt.optimize(copy.deepcopy(base), presets.finetune(rank=4, alpha=8), inputs=batches[0])
    opt.load_adapter(tmp_path / "first")
    ours = fit(opt, batches, epochs=2, accumulate=2, lr=1e-2, progress=False, output_dir=tmp_path / "adapter")

    assert len(ours.steps) == 6
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses))
    assert ours.losses[-1] < ours.losses[0]
    back = PeftModel.from_pretrained(copy.deepcopy(base), ours.adapter).eval()
    with torch.no_grad():
        wanted = opt.eval()(**batches[1]).logits
        torch.testing.assert_close(back(**batches[1]).logits, wanted)
        torch.testing.assert_close(opt.merge().eval()(**batches[1]).logits, wanted)
