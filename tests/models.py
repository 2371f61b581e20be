"""Small models that the tests optimize: transformers configurations and hand-written modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 97
Made = tuple[nn.Module, dict[str, Any]]


def tokens(batch: int = 2, length: int = 12, seed: int = 0, ignored: float = 0.3) -> dict[str, torch.Tensor]:
    """A batch of token ids [batch, length] with a full mask and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    labels = ids.clone()
    labels[torch.rand(batch, length, generator=generator) < ignored] = -100
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _shaken(model: nn.Module) -> nn.Module:
    """Norm weights and biases away from ones and zeros, so that wrong gradients show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.train()


def llama(layers: int = 3, **changes: Any) -> nn.Module:
    """A tiny Llama."""
    torch.manual_seed(0)
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
              "num_key_value_heads": 2, "use_cache": False, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2} | changes
    return _shaken(LlamaForCausalLM(LlamaConfig(**config)))


def gpt2(dropout: float = 0.1, layers: int = 3) -> nn.Module:
    """A tiny GPT-2 (Conv1D projections, tied head), with dropout."""
    torch.manual_seed(0)
    return _shaken(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=64, use_cache=False, embd_pdrop=dropout,
                                              attn_pdrop=dropout, resid_pdrop=dropout, bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM")))


def bert(dropout: float = 0.1) -> nn.Module:
    """A tiny BERT with a masked-language-model head, with dropout."""
    torch.manual_seed(0)
    return _shaken(BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                                              max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)))


class Block(nn.Module):
    """A pre-norm transformer block written by hand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.gate, self.down = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width))
        y = self.norm2(x)
        return x + self.down(F.gelu(self.gate(y)) * self.up(y))


class Handwritten(nn.Module):
    """A causal transformer with tied embeddings that returns (logits, loss)."""

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.randn(64, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


def handwritten() -> nn.Module:
    """The hand-written transformer."""
    torch.manual_seed(0)
    return _shaken(Handwritten())


class Residual(nn.Module):
    """Two convolutions with batch norm around a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True))))


class ConvNet(nn.Module):
    """A small residual network with batch norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.body = nn.Sequential(*(Residual(width) for _ in range(3)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.body(self.stem(images)))
        return {"loss": F.cross_entropy(logits, target), "logits": logits}


def convnet() -> nn.Module:
    """The residual network."""
    torch.manual_seed(0)
    return _shaken(ConvNet())


def images(batch: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random images [batch, 3, 8, 8] with targets."""
    generator = torch.Generator().manual_seed(seed)
    return {"images": torch.randn(batch, 3, 8, 8, generator=generator), "target": torch.randint(0, 5, (batch,), generator=generator)}


def pairs(batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and labels for the hand-written transformer."""
    made = tokens(batch, length, seed)
    return {"ids": made["input_ids"], "labels": made["labels"]}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, torch.Tensor]]]] = {
    "llama": (llama, tokens), "gpt2": (gpt2, tokens), "bert": (bert, tokens), "handwritten": (handwritten, pairs), "convnet": (convnet, images),
}


def loss_of(output: Any) -> torch.Tensor:
    """The loss in whatever these models return."""
    if isinstance(output, tuple) and not hasattr(output, "loss"):
        return output[1]
    return output["loss"]
