"""Transformers + PEFT in a headline row: eager, checkpointed, compiled, or in Lightning Fabric."""

from __future__ import annotations

from collections.abc import Callable
import importlib
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.headlines_process import Job, Prepared
from bench.headlines_workloads import ALPHA, RANK, Batch
from fxopt.runtime.store import WEIGHTS_FILE


def prepare(model: PreTrainedModel, job: Job) -> Prepared:
    """Adds the adapters, and turns on what the system asks for."""
    system = job.system
    if system.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"))
    dynamic = True if job.row.dynamic else None
    if system.compile == "blocks":
        for block in blocks(model):
            block.compile(dynamic=dynamic)
    call = torch.compile(peft, dynamic=dynamic) if system.compile == "whole" else peft

    def load(adapter: Path) -> None:
        found = set_peft_model_state_dict(peft, load_file(adapter / WEIGHTS_FILE))
        if found.unexpected_keys:
            raise SystemExit(f"not among the adapters: {found.unexpected_keys[:3]}")

    named = {name: parameter for name, parameter in peft.named_parameters() if parameter.requires_grad}
    if not system.lightning:
        return Prepared(lambda batch: call(**batch).loss, named, load)
    fabric = importlib.import_module("lightning.fabric").Fabric(accelerator="cpu", devices=1, precision="32-true")

    def start(optimizer: torch.optim.Optimizer) -> tuple[Callable[[Batch], Tensor], Any]:
        wrapped, stepper = fabric.setup(call, optimizer)
        return lambda batch: wrapped(**batch).loss, stepper

    return Prepared(lambda batch: call(**batch).loss, named, load, start, fabric.backward)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of the model's equal blocks."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
