"""Language models of transformers: dense decoders, mixtures of experts, state-space and hybrid models. Rows of configuration values."""

from __future__ import annotations

from typing import Any

from tests.zoo.batches import VOCABULARY, padded, tokens
from tests.zoo.entry import Batches, Configured

WIDTH, LAYERS, HEADS = 64, 2, 4

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "d_model": WIDTH, "n_embd": WIDTH, "emb_dim": WIDTH, "embedding_size": WIDTH, "intermediate_size": 96,
    "ffn_dim": 96, "d_ff": 96, "n_inner": 96, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_hidden_layers": LAYERS, "num_layers": LAYERS,
    "n_layer": LAYERS, "n_layers": LAYERS, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "num_attention_heads": HEADS, "n_head": HEADS,
    "num_heads": HEADS, "n_heads": HEADS, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "max_position_embeddings": 64,
    "n_positions": 64, "n_ctx": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False, "attention_dropout": 0.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout": 0.0, "dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "dropout_rate": 0.0, "activation_dropout": 0.0, "classifier_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}
"""Sizes by all the names that configurations give them. A name that a class does not know is stored by it and read by nobody."""
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 16}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": HEADS, "head_dim": 8}
MOE = GROUPED | {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
                 "shared_expert_intermediate_size": 48, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
STATE = MOE | {"state_size": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1,
               "mamba_chunk_size": 8, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1, "chunk_size": 8,
               "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
               "time_step_rank": 4}
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}


def causal(family: str, name: str, kind: str, settings: dict[str, Any], more: dict[str, Any] | None = None, *, config: str | None = None,
           model: str | None = None, batches: Batches = tokens) -> Configured:
    """A row: the page's name, the name that its classes begin with, settings."""
    return Configured(name, family, model or f"{kind}ForCausalLM", config or f"{kind}Config", settings | (more or {}), batches)


def _rows(family: str, base: dict[str, Any], rows: dict[str, Any]) -> tuple[Configured, ...]:
    """Rows of (class prefix, changed settings, other arguments of `causal`) or of a class prefix alone."""
    found = []
    for name, row in rows.items():
        kind, more, other = (*((row,) if isinstance(row, str) else row), {}, {})[:3]
        found.append(causal(family, name, kind, other.get("base", base), more, **{key: value for key, value in other.items() if key != "base"}))
    return tuple(found)


_PLAIN: dict[str, Any] = {"base": TEXT}
_ENDLESS: dict[str, Any] = {"base": {key: value for key, value in TEXT.items() if key != "max_position_embeddings"}}

DECODERS = _rows("decoder", GROUPED, {
    "Llama": "Llama",
    "Llama, padded": ("Llama", {}, {"batches": padded}),
    "Llama, eager attention": ("Llama", {"attn_implementation": "eager"}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama, Llama-3 rotary": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                            "original_max_position_embeddings": 32}}),
    "Llama, YaRN": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}}),
    "Llama, dynamic rotary": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "Mistral": ("Mistral", {"sliding_window": 8}),
    "Ministral": ("Ministral", ALTERNATING),
    "Ministral 3": "Ministral3",
    "Qwen2": "Qwen2",
    "Qwen3": "Qwen3",
    "Gemma": "Gemma",
    "Gemma 2": ("Gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "Gemma 3": ("Gemma3", {"query_pre_attn_scalar": 16} | ALTERNATING, {"config": "Gemma3TextConfig"}),
    "Gemma 4, unified": ("Gemma4Unified", {}, {"config": "Gemma4UnifiedTextConfig"}),
    "VaultGemma": "VaultGemma",
    "Phi": ("Phi", {"partial_rotary_factor": 0.5}, _PLAIN),
    "Phi-3": ("Phi3", {"sliding_window": None}),
    "Cohere": "Cohere",
    "Cohere 2": ("Cohere2", {"sliding_window": 8}),
    "Granite": ("Granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "OLMo": "Olmo",
    "OLMo 2": "Olmo2",
    "OLMo 3": "Olmo3",
    "GLM": ("Glm", {"partial_rotary_factor": 0.5}),
    "GLM 4": ("Glm4", {"partial_rotary_factor": 0.5}),
    "SmolLM3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "StableLM": ("StableLm", {"partial_rotary_factor": 0.25}),
    "ERNIE 4.5": "Ernie4_5",
    "EXAONE 4": ("Exaone4", ALTERNATING),
    "Helium": "Helium",
    "nanochat": "NanoChat",
    "Nemotron": ("Nemotron", {"partial_rotary_factor": 0.5}),
    "Apertus": "Apertus",
    "Arcee": "Arcee",
    "BitNet": "BitNet",
    "CWM": "Cwm",
    "DiffLlama": "DiffLlama",
    "Emu3": ("Emu3", {}, {"config": "Emu3TextConfig"}),
    "HunYuan": "HunYuanDenseV1",
    "HyperCLOVA X": "HyperCLOVAX",
    "Jais 2": "Jais2",
    "Seed-OSS": "SeedOss",
    "MiniCPM3": ("MiniCPM3", LATENT),
    "Persimmon": ("Persimmon", {}, _PLAIN),
    "GPT-2": ("GPT2", {}, _PLAIN | {"model": "GPT2LMHeadModel"}),
    "GPT-J": ("GPTJ", {"rotary_dim": 8}, _PLAIN),
    "CodeGen": ("CodeGen", {"rotary_dim": 8}, _PLAIN),
    "GPT-Neo": ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}, _PLAIN),
    "GPT-NeoX": ("GPTNeoX", {"rotary_pct": 0.25}, _PLAIN),
    "GPT-BigCode": ("GPTBigCode", {}, _PLAIN),
    "GPT": ("OpenAIGPT", {}, _PLAIN | {"model": "OpenAIGPTLMHeadModel"}),
    "CTRL": ("CTRL", {"dff": 96}, _PLAIN | {"model": "CTRLLMHeadModel"}),
    "Falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, _PLAIN),
    "StarCoder2": ("Starcoder2", {"sliding_window": None}),
    "OPT": ("OPT", {"word_embed_proj_dim": WIDTH}, _PLAIN),
    "BLOOM": ("Bloom", {}, _PLAIN),
    "MPT": ("Mpt", {}, _PLAIN),
    "XGLM": ("XGLM", {}, _PLAIN),
    "BioGPT": ("BioGpt", {}, _PLAIN),
    "XLNet": ("XLNet", {"d_inner": 96}, _ENDLESS | {"model": "XLNetLMHeadModel"}),
    "ModernBERT decoder": ("ModernBertDecoder", {}, _PLAIN),
})

EXPERTS = _rows("experts", MOE, {
    "Mixtral": ("Mixtral", {"sliding_window": None}),
    "Mixtral, batched experts": ("Mixtral", {"sliding_window": None, "experts_implementation": "batched_mm"}),
    "Mixtral, experts in a loop": ("Mixtral", {"sliding_window": None, "experts_implementation": "eager"}),
    "Mixtral, auxiliary loss": ("Mixtral", {"sliding_window": None, "output_router_logits": True}),
    "Qwen2-MoE": "Qwen2Moe",
    "Qwen3-MoE": "Qwen3Moe",
    "GPT-OSS": ("GptOss", ALTERNATING),
    "DeepSeek-V2": ("DeepseekV2", LATENT | {"topk_method": "greedy"}),
    "DeepSeek-V3": ("DeepseekV3", LATENT),
    "DeepSeek-V3.2": ("DeepseekV32", LATENT),
    "Llama 4": ("Llama4", {"intermediate_size_mlp": 96, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0],
                           "attention_chunk_size": 32}, {"config": "Llama4TextConfig"}),
    "OLMoE": "Olmoe",
    "FlexOlmo": "FlexOlmo",
    "Phi-MoE": "Phimoe",
    "Granite-MoE": "GraniteMoe",
    "Granite-MoE, shared": "GraniteMoeShared",
    "GLM 4-MoE": "Glm4Moe",
    "GLM 4-MoE lite": ("Glm4MoeLite", LATENT),
    "dots1": "Dots1",
    "ERNIE 4.5-MoE": "Ernie4_5_Moe",
    "EXAONE-MoE": "ExaoneMoe",
    "HunYuan-MoE": "HunYuanMoEV1",
    "AFMoE": "Afmoe",
    "Aria": ("AriaText", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}, {"config": "AriaTextConfig"}),
    "Cohere 2-MoE": "Cohere2Moe",
    "MiniMax-M2": "MiniMaxM2",
    "MiMo-V2-Flash": "MiMoV2Flash",
    "JetMoE": ("JetMoe", {"kv_channels": 16}),
    "Solar-Open": "SolarOpen",
    "Doge": "Doge",
    "LongCat-Flash": ("LongcatFlash", LATENT | {"zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 32}),
})

RECURRENT = _rows("state space, hybrid", STATE, {
    "Mamba": "Mamba",
    "Mamba-2": ("Mamba2", {"num_heads": 4, "head_dim": 32, "expand": 2}),
    "Falcon-Mamba": "FalconMamba",
    "Falcon-H1": ("FalconH1", {"mamba_d_ssm": 64, "mamba_n_heads": 2}),
    "Bamba": ("Bamba", {"attn_layer_indices": [1]}),
    "Jamba": ("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 4,
                        "use_mamba_kernels": False}),
    "Granite-MoE hybrid": ("GraniteMoeHybrid", {"layer_types": ["mamba", "attention"]}),
    "Nemotron-H": ("NemotronH", {"hybrid_override_pattern": "M*", "layers_block_type": ["mamba", "attention"]}),
    "MiniMax": ("MiniMax", {"layer_types": ["full_attention", "linear_attention"], "block_size": 8}),
    "Qwen3-Next": ("Qwen3Next", HYBRID),
    "Qwen3.5": ("Qwen3_5", HYBRID, {"config": "Qwen3_5TextConfig"}),
    "OLMo hybrid": ("OlmoHybrid", HYBRID),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_dim": WIDTH, "block_ff_dim": 96}),
    "RWKV": ("Rwkv", {"attention_hidden_size": WIDTH, "context_length": 64}),
    "RecurrentGemma": ("RecurrentGemma", {"lru_width": WIDTH, "block_types": ["recurrent", "attention"], "attention_window_size": 16}),
    "Zamba 2": ("Zamba2", {"layers_block_type": ["mamba", "hybrid"], "mamba_ngroups": 1, "n_mamba_heads": 4, "num_mem_blocks": 1, "use_mem_rope": False,
                           "use_shared_attention_adapter": False, "num_attention_heads": 4, "attention_head_dim": 32, "num_key_value_heads": 4}),
})
