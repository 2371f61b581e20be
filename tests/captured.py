"""Captured programs for the tests of passes: tiny transformers models of many families, and plain functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import transformers as hf

from fxopt.ir.capture import Call, capture
from fxopt.ir.program import Program
from fxopt.passes import verify
from fxopt.passes.base import Pass
from fxopt.passes.pipeline import apply, build

VOCABULARY = 97
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
           "max_position_embeddings": 64, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BERT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_head": 4, "n_positions": 64, "use_cache": False, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "llama": lambda n: hf.LlamaForCausalLM(hf.LlamaConfig(**_COMMON, num_hidden_layers=n)),
    "gemma": lambda n: hf.GemmaForCausalLM(hf.GemmaConfig(**_COMMON, num_hidden_layers=n, head_dim=8)),
    "gemma2": lambda n: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_COMMON, num_hidden_layers=n, head_dim=8, query_pre_attn_scalar=8, sliding_window=4)),
    "phi3": lambda n: hf.Phi3ForCausalLM(hf.Phi3Config(**_COMMON, num_hidden_layers=n, sliding_window=None)),
    "gptj": lambda n: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT, n_layer=n, rotary_dim=4)),
    "cohere": lambda n: hf.CohereForCausalLM(hf.CohereConfig(**_COMMON, num_hidden_layers=n)),
    "qwen3": lambda n: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_COMMON, num_hidden_layers=n, head_dim=8)),
    "mistral": lambda n: hf.MistralForCausalLM(hf.MistralConfig(**_COMMON, num_hidden_layers=n, sliding_window=4)),
    "granite": lambda n: hf.GraniteForCausalLM(hf.GraniteConfig(**_COMMON, num_hidden_layers=n, logits_scaling=2.0, residual_multiplier=0.5)),
    "gpt2": lambda n: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT, n_layer=n)),
    "neox": lambda n: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_COMMON, num_hidden_layers=n, rotary_pct=0.5)),
    "bert": lambda n: hf.BertForMaskedLM(hf.BertConfig(**_BERT, num_hidden_layers=n, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    "modernbert": lambda n: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**_BERT, num_hidden_layers=n, pad_token_id=0, cls_token_id=1, sep_token_id=2)),
    "t5": lambda n: hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=n, num_heads=4, dropout_rate=0.0,
                                                               use_cache=False, decoder_start_token_id=0)),
}


@dataclass(frozen=True)
class Captured:
    """A program with the tensors to run it on."""

    program: Program
    inputs: tuple[torch.Tensor, ...]
    state: Mapping[str, torch.Tensor]

    def after(self, *passes: Pass | str) -> Captured:
        """The same with passes applied; a string is the name of one."""
        program = self.program
        for each in passes:
            program = apply(build(each) if isinstance(each, str) else each, program)
        return Captured(program, self.inputs, self.state)

    def check(self, pass_: Pass) -> Captured:
        """Apply one pass and compare outputs and all gradients with those before, against fp64."""
        new = self.after(pass_)
        verify.check(pass_, self.program, new.program, self.inputs, self.state)
        return new

    @property
    def rules(self) -> dict[str, int]:
        """How often each rule of the last pass fired, by name without its place."""
        return count(rewrite.rule.partition(" (")[0] for rewrite in self.program.log[-1].rewrites)

    @property
    def misses(self) -> list[str]:
        """Why rules of the last pass did not fire."""
        return [miss.reason for miss in self.program.log[-1].misses]

    def calls(self, name: str) -> list[Any]:
        """The nodes that call `aten.name.*` or `fxopt.name.*`."""
        return [node for node in self.program.nodes if node.op == "call_function" and str(node.target).split(".")[1:2] == [name]]


def count(names: Any) -> dict[str, int]:
    """Occurrences by name."""
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {name: value.detach() for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))}


@functools.cache
def family(name: str, layers: int = 1, mask: bool = True, dtype: torch.dtype = torch.float32, autocast: bool = False) -> Captured:
    """A training step of a tiny model, with weights shaken so that wrong gradients show.

    Args:
        mask: pass an attention mask of ones.
        autocast: capture under autocast to bf16; the program must then run under it.
    """
    torch.manual_seed(0)
    model = FAMILIES[name](layers).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(dtype))
    ids = torch.randint(3, VOCABULARY, (2, 10))
    labels = torch.where(torch.rand(ids.shape) < 0.3, -100, torch.randint(3, VOCABULARY, ids.shape))
    call = Call.of((), {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if mask else {}), "labels": labels})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return Captured(capture(model, call), call.tensors, state_of(model))


class _Function(nn.Module):
    def __init__(self, fn: Callable[..., Any], parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.fn, self.names = fn, tuple(parameters)
        for name, value in parameters.items():
            if value.requires_grad:
                self.register_parameter(name, nn.Parameter(value.detach().clone()))
            else:
                self.register_buffer(name, value.clone())

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.fn(*tensors, **{name: getattr(self, name) for name in self.names})


def function(fn: Callable[..., Any], *tensors: torch.Tensor, **parameters: torch.Tensor) -> Captured:
    """A captured function of inputs, and of parameters (tensors that require grad) and buffers by keyword."""
    return module(_Function(fn, parameters), *tensors)


def module(model: nn.Module, *tensors: torch.Tensor) -> Captured:
    """A captured call of a module in training mode."""
    call = Call.of(tensors, {})
    return Captured(capture(model.train(), call), call.tensors, state_of(model))


def weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A random parameter."""
    return (0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 1.0).to(dtype).requires_grad_()


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1, grad: bool = True) -> torch.Tensor:
    """A random input that takes a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(grad)
