"""Tiny models of many architectures, from configurations alone, and a training step's inputs for each.

Two layers, a width of 64, a vocabulary of 256, no dropout: all that a graph of the real model has, in a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import transformers as hf

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 256, 64, 2, 4, 12

# Names that configurations share; one that a class does not know is stored by it and read by nobody.
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
         "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_dropout": 0.0, "use_cache": False}
_GROUPED = _TEXT | {"num_key_value_heads": 2, "head_dim": 16}
_MOE = _GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_GPT = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False}
_BERT = _TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_VISION = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": 32, "patch_size": 8,
           "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0}
_TOWER = {key: value for key, value in _TEXT.items() if key not in ("bos_token_id", "eos_token_id", "pad_token_id")}
_SPEECH = {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
           "decoder_attention_heads": HEADS, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 16, "max_source_positions": 24,
           "max_target_positions": 64, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
           "suppress_tokens": None, "begin_suppress_tokens": None, "use_cache": False}
_WAVE = _TEXT | {"conv_dim": (32, 32), "conv_kernel": (4, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
                 "num_conv_pos_embedding_groups": 4, "hidden_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0,
                 "final_dropout": 0.0, "mask_time_prob": 0.0, "apply_spec_augment": False}

Batch = dict[str, Any]
"""Keyword arguments of a call."""


@dataclass(frozen=True)
class Architecture:
    """A model in its smallest form.

    Attributes:
        model: a class of transformers with a head that computes a loss.
        config: its configuration's class.
        settings: arguments of the configuration.
        batch: makes the inputs of one training step.
    """

    model: type[nn.Module]
    config: type[Any]
    settings: dict[str, Any]
    batch: Callable[[torch.Generator], Batch]

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in training mode, its weights shaken so that the gradient of each of them shows."""
        torch.manual_seed(0)
        model = self.model(self.config(**self.settings)).to(dtype).train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(dtype))
        return model

    def inputs(self, dtype: torch.dtype = torch.float32) -> Batch:
        """The inputs of one training step; floating-point ones in `dtype`."""
        made = self.batch(torch.Generator().manual_seed(2))
        return {name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for name, value in made.items()}


def _ids(generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=generator)


def tokens(generator: torch.Generator) -> Batch:
    """Token ids, a full attention mask, labels of which a third are ignored."""
    ids = _ids(generator)
    ignored = torch.rand(ids.shape, generator=generator) < 0.3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(ignored, -100, _ids(generator))}


def images(generator: torch.Generator) -> Batch:
    """Two images and their classes."""
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "labels": torch.tensor([0, 1])}


def captions(generator: torch.Generator) -> Batch:
    """Two images with a caption each, for a contrastive loss."""
    ids = _ids(generator)
    ids[:, -1] = VOCABULARY - 1  # the end of the text, where its embedding is read
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
            "return_loss": True}


def spectrograms(generator: torch.Generator) -> Batch:
    """Two log-mel spectrograms with their text."""
    return {"input_features": torch.randn(2, 16, 48, generator=generator), "labels": _ids(generator)}


def waves(generator: torch.Generator) -> Batch:
    """Two pieces of sound and their classes."""
    return {"input_values": torch.randn(2, 400, generator=generator), "labels": torch.tensor([0, 1])}


def _causal(name: str, settings: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(getattr(hf, f"{name}ForCausalLM"), getattr(hf, f"{name}Config"), settings | more, tokens)


def _masked(name: str, settings: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(getattr(hf, f"{name}ForMaskedLM"), getattr(hf, f"{name}Config"), settings | more, tokens)


def _classifier(name: str, kind: str, settings: dict[str, Any], batch: Callable[[torch.Generator], Batch], **more: Any) -> Architecture:
    return Architecture(getattr(hf, f"{name}For{kind}Classification"), getattr(hf, f"{name}Config"), settings | more, batch)


def _towers(name: str, **more: Any) -> Architecture:
    return Architecture(getattr(hf, f"{name}Model"), getattr(hf, f"{name}Config"),
                        {"text_config": _TOWER | {"eos_token_id": VOCABULARY - 1, "pad_token_id": 0, "projection_dim": 32, "projection_size": WIDTH},
                         "vision_config": _VISION | {"projection_dim": 32}, "projection_dim": 32} | more, captions)


def _t5(feed_forward: str) -> Architecture:
    settings = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 96, "num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": HEADS,
                "dropout_rate": 0.0, "feed_forward_proj": feed_forward, "use_cache": False, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    return Architecture(hf.T5ForConditionalGeneration, hf.T5Config, settings, tokens)


_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": HEADS,
           "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}

ARCHITECTURES: dict[str, Architecture] = {
    "Llama": _causal("Llama", _GROUPED),
    "Mistral": _causal("Mistral", _GROUPED, sliding_window=8),
    "Qwen2": _causal("Qwen2", _GROUPED),
    "Qwen3": _causal("Qwen3", _GROUPED),
    "Gemma": _causal("Gemma", _GROUPED),
    "Gemma 2": _causal("Gemma2", _GROUPED, query_pre_attn_scalar=16, sliding_window=8),
    "Gemma 3": Architecture(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig,
                            _GROUPED | {"query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, tokens),
    "Phi": _causal("Phi", _TEXT, partial_rotary_factor=0.5, resid_pdrop=0.0, embd_pdrop=0.0),
    "Phi-3": _causal("Phi3", _GROUPED, sliding_window=None, resid_pdrop=0.0, embd_pdrop=0.0),
    "Cohere": _causal("Cohere", _GROUPED),
    "Cohere 2": _causal("Cohere2", _GROUPED, sliding_window=8),
    "Granite": _causal("Granite", _GROUPED, logits_scaling=2.0, residual_multiplier=0.5),
    "OLMo": _causal("Olmo", _GROUPED),
    "OLMo 2": _causal("Olmo2", _GROUPED),
    "GLM": _causal("Glm", _GROUPED, partial_rotary_factor=0.5),
    "GLM 4": _causal("Glm4", _GROUPED, partial_rotary_factor=0.5),
    "SmolLM3": _causal("SmolLM3", _GROUPED, no_rope_layers=[1, 0]),
    "StableLM": _causal("StableLm", _GROUPED, partial_rotary_factor=0.25, hidden_dropout=0.0),
    "ERNIE 4.5": _causal("Ernie4_5", _GROUPED),
    "EXAONE 4": _causal("Exaone4", _GROUPED, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "Helium": _causal("Helium", _GROUPED),
    "nanochat": _causal("NanoChat", _GROUPED),
    "Nemotron": _causal("Nemotron", _GROUPED, partial_rotary_factor=0.5),
    "GPT-2": _causal("GPT2", _GPT) if hasattr(hf, "GPT2ForCausalLM") else Architecture(hf.GPT2LMHeadModel, hf.GPT2Config, _GPT, tokens),
    "GPT-J": _causal("GPTJ", _GPT, rotary_dim=8),
    "GPT-NeoX": _causal("GPTNeoX", _TEXT, rotary_pct=0.25, hidden_dropout=0.0),
    "Falcon": _causal("Falcon", _TEXT, hidden_dropout=0.0, new_decoder_architecture=True, num_kv_heads=2),
    "StarCoder2": _causal("Starcoder2", _GROUPED, residual_dropout=0.0, embedding_dropout=0.0, sliding_window=None),
    "OPT": _causal("OPT", _TEXT, ffn_dim=96, word_embed_proj_dim=WIDTH, dropout=0.0),
    "Mixtral": _causal("Mixtral", _GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "Mixtral, batched experts": _causal("Mixtral", _GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
                                        experts_implementation="batched_mm"),
    "Mixtral, experts in a loop": _causal("Mixtral", _GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
                                          experts_implementation="eager"),
    "Qwen2-MoE": _causal("Qwen2Moe", _MOE, num_experts=4, shared_expert_intermediate_size=48),
    "Qwen3-MoE": _causal("Qwen3Moe", _MOE, num_experts=4),
    "GPT-OSS": _causal("GptOss", _GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
                       layer_types=["sliding_attention", "full_attention"]),
    "DeepSeek-V2": _causal("DeepseekV2", _MOE | _LATENT, head_dim=8, topk_method="greedy"),
    "DeepSeek-V3": _causal("DeepseekV3", _MOE | _LATENT, head_dim=8),
    "Llama 4": Architecture(hf.Llama4ForCausalLM, hf.Llama4TextConfig, _GROUPED | {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1,
                            "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 32}, tokens),
    "BERT": _masked("Bert", _BERT),
    "RoBERTa": _masked("Roberta", _BERT, pad_token_id=1),
    "DistilBERT": _masked("DistilBert", _BERT, dim=WIDTH, hidden_dim=96, n_layers=LAYERS, n_heads=HEADS, dropout=0.0),
    "DeBERTa-v2": _masked("DebertaV2", _BERT, pooler_hidden_size=WIDTH, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "ModernBERT": _masked("ModernBert", _BERT, cls_token_id=1, sep_token_id=2),
    "T5": _t5("relu"),
    "T5 1.1": _t5("gated-gelu"),
    "BART": Architecture(hf.BartForConditionalGeneration, hf.BartConfig, _SPEECH | {"max_position_embeddings": 64, "eos_token_id": 2}, tokens),
    "ViT": _classifier("ViT", "Image", _VISION, images),
    "DINOv2": _classifier("Dinov2", "Image", _VISION, images, mlp_ratio=2),
    "CLIP": _towers("CLIP"),
    "SigLIP": _towers("Siglip"),
    "Whisper": Architecture(hf.WhisperForConditionalGeneration, hf.WhisperConfig, _SPEECH, spectrograms),
    "Wav2Vec2": _classifier("Wav2Vec2", "Sequence", _WAVE, waves),
}
