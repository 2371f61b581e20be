"""The peer: Transformers + PEFT, over bitsandbytes NF4 (QLoRA) or over the same weights held dense, in its own process.

    python -m demo.peer PLAN OUT [--base nf4|dense] [--checkpointing] [--compile]
    python -m demo.peer PLAN OUT --verify ADAPTER LOGITS

Arithmetic is fp32 throughout (on most CPUs bf16 is several times slower). The dense form starts from the values that
the NF4 weights stand for, so all forms compute the same losses. The loop is written out: it checks fxopt's too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
import time
from typing import Any

import bitsandbytes as bnb
from bitsandbytes import functional as bnb_functional
from peft import PeftModel
from safetensors.torch import load_file
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from demo import assets
from demo.measure import Memory, gradient_norms, held_out_loss, summary, timed
from demo.plan import Plan, load_tokenizer, write_record
from fxopt.train.callbacks import State, Step
from fxopt.runtime.counting import supervised_items
from fxopt.train.batch import real_tokens
from fxopt.train.progress import Progress

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def load_base(base: str) -> PreTrainedModel:
    """The chat model with NF4 weights, or with dense fp32 weights of the same values."""
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    if base == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(**NF4)
    model = AutoModelForCausalLM.from_pretrained(assets.model_folder(), **options)
    model.config.use_cache = False
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            # On a CPU with bf16 units bitsandbytes 0.50.2 repacks a layer for bf16 inference when it is called in
            # eval mode, and never back: training after it gets no gradient through the base weights, silently.
            layer.support_avx512bf16_for_cpu = False
    if base == "dense":
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and not name.endswith("lm_head"):
                packed, state = bnb_functional.quantize_4bit(layer.weight.data, quant_type="nf4")
                layer.weight.data = bnb_functional.dequantize_4bit(packed, state)
    return model


def run(plan: Plan, *, base: str, checkpointing: bool, compiled: bool) -> dict[str, Any]:
    """Trains as the plan says and returns the record."""
    tokenizer = load_tokenizer()
    started = time.perf_counter()
    model = load_base(base)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    peft = PeftModel.from_pretrained(model, plan.first_adapter, is_trainable=True)
    call = torch.compile(peft, dynamic=True) if compiled else peft
    load_seconds = time.perf_counter() - started
    held_out = plan.held_out_batches(tokenizer)
    before = held_out_loss(peft, held_out) if held_out else None
    batches = plan.training_batches(tokenizer)

    parameters = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=0.0)
    factor = plan.factor()
    state, progress = State(peft, optimizer, plan.steps), Progress(name=f"HF + PEFT {base}")
    padded: list[int] = []
    torch.manual_seed(plan.seed)
    peft.train()
    memory = Memory(peft)
    progress.on_fit_start(state)
    for step, batch in enumerate(batches):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * factor(step)
        optimizer.zero_grad(set_to_none=True)
        loss = call(**batch).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, plan.clip)
        if step == plan.steps - 1:
            norms = gradient_norms(peft.named_parameters())
        optimizer.step()
        value, lr = float(loss.detach()), optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - start
        tokens, items = real_tokens(batch), supervised_items(batch)
        state.history.append(Step(value, lr, float(norm), tokens, items, seconds))
        padded.append(batch["input_ids"].numel())
        progress.on_step_end(state)
    progress.on_fit_end(state)
    optimizer.zero_grad(set_to_none=True)
    return {
        "system": " ".join(
            ["HF + PEFT", "+ bitsandbytes NF4" if base == "nf4" else "dense"]
            + ["+ gradient checkpointing"] * checkpointing
            + ["+ torch.compile"] * compiled
        ),
        **summary(state.history, padded),
        "memory": memory.read(),
        "smallest_gradient_norm": min(norms.values()),
        "load_seconds": load_seconds,
        "prepare_seconds": 0.0,
        "held_out_before": before,
        "held_out_after": held_out_loss(peft, held_out) if held_out else None,
    }


@torch.no_grad()
def verify(plan: Plan, adapter: Path, logits: Path) -> dict[str, Any]:
    """Loads `adapter` in PEFT over bitsandbytes NF4 and compares its logits with those in the file `logits`."""
    model, seconds = timed(lambda: PeftModel.from_pretrained(load_base("nf4"), adapter).eval())
    batch = plan.held_out_batches(load_tokenizer())[0]
    theirs = load_file(logits)["logits"]
    real = batch["attention_mask"].bool()
    mine = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return {
        "largest_difference": float((mine - theirs)[real].abs().max()),
        "largest_logit": float(mine[real].abs().max()),
        "adapted_layers": len(layers),
        "seconds": seconds,
    }


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", choices=("nf4", "dense"), default="nf4")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--verify", nargs=2, type=Path, metavar=("ADAPTER", "LOGITS"))
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plan = Plan.load(options.plan)
    if options.verify:
        record = verify(plan, *options.verify)
    else:
        record = run(plan, base=options.base, checkpointing=options.checkpointing, compiled=options.compile)
    versions = {"torch": torch.__version__, "bitsandbytes": bnb.__version__}
    write_record(options.out, record | {"versions": versions})


if __name__ == "__main__":
    main()
