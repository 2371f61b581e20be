"""fxopt in its own process: one `optimize` call, one `fit` call, and what the table shows of them.

    python -m demo.ours PLAN OUT [--no-remat] [--passes TEXT]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from demo import assets
from demo.measure import Memory, answers, gradient_norms, held_out_loss, summary, timed
from demo.plan import Plan, load_tokenizer, write_record
import fxopt
from fxopt.passes import presets
from fxopt.train.callbacks import Callback, State
from fxopt.train.progress import Progress


class LastGradients(Callback):
    """Keeps the gradient norms of the last step."""

    def __init__(self) -> None:
        self.norms: dict[str, float] = {}

    def on_backward_end(self, state: State) -> None:
        if state.step == state.steps - 1:
            self.norms = gradient_norms(state.model.named_parameters())


def run(plan: Plan, passes: str) -> dict[str, Any]:
    """Trains as the plan says, saves the adapter and logits for PEFT to check, and returns the record."""
    tokenizer = load_tokenizer()
    batches = plan.training_batches(tokenizer)
    model, load_seconds = timed(
        lambda: AutoModelForCausalLM.from_pretrained(
            assets.model_folder(), dtype=torch.float32, local_files_only=True
        ).train()
    )
    model.config.use_cache = False  # no key-value cache in training, as for the peer
    opt, prepare_seconds = timed(lambda: fxopt.optimize(model, passes, inputs=batches[0]))
    opt.load_adapter(plan.first_adapter)
    held_out = plan.held_out_batches(tokenizer)
    before = held_out_loss(opt, held_out) if held_out else None
    answers_before = sample(opt, tokenizer, plan) if plan.samples else []

    gradients = LastGradients()
    opt.train()
    memory = Memory(opt)
    trainer = fxopt.Trainer(
        steps=plan.steps,
        optimizer=torch.optim.AdamW([p for p in opt.parameters() if p.requires_grad], lr=plan.lr, weight_decay=0.0),
        schedule=plan.factor(),
        clip=plan.clip,
        seed=plan.seed,
        callbacks=[gradients, Progress(name="fxopt")],
        progress=False,
        output_dir=Path(plan.folder) / "run",
        checkpoints=False,
    )
    result = trainer.fit(opt, batches)
    used = memory.read()
    after = held_out_loss(opt, held_out) if held_out else None
    answers_after = sample(opt, tokenizer, plan) if plan.samples else []
    if held_out:
        save_logits(opt, held_out[0], Path(plan.folder) / "logits.safetensors")
    return {
        "system": "fxopt",
        "passes": passes,
        **summary(result.steps, [batch["input_ids"].numel() for batch in batches]),
        "memory": used,
        "smallest_gradient_norm": min(gradients.norms.values()),
        "load_seconds": load_seconds,
        "prepare_seconds": prepare_seconds,
        "held_out_before": before,
        "held_out_after": after,
        "answers_before": answers_before,
        "answers_after": answers_after,
        "adapter": str(result.adapter),
        "versions": {"torch": torch.__version__},
    }


def sample(opt: Any, tokenizer: Any, plan: Plan) -> list[str]:
    """Greedy answers about held-out words."""
    with opt.dense():
        return answers(opt, tokenizer, plan)


@torch.no_grad()
def save_logits(opt: Any, batch: dict[str, torch.Tensor], file: Path) -> None:
    """Writes the logits of one held-out batch, [batch, seq, vocabulary]."""
    opt.eval()
    logits = opt(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    save_file({"logits": logits.contiguous()}, file)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-remat", action="store_true", help="keep what the backward reads: faster, more memory")
    parser.add_argument("--passes", help="the whole pipeline as text, in place of the preset")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plan = Plan.load(options.plan)
    preset = presets.finetune(rank=plan.rank, alpha=plan.alpha, quantize="nf4", remat=not options.no_remat)
    write_record(options.out, run(plan, options.passes or preset.text()))


if __name__ == "__main__":
    main()
