"""Published architectures with code that looks at values: trained in parts, equal to eager on the sizes of the capture and on others."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as hf

import fxopt
from fxopt.kernels.tolerance import same

Data = Callable[[int, int], dict[str, torch.Tensor]]
_COMMON = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 80}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODER = {**_COMMON, "num_key_value_heads": 2, "use_cache": False}
_SPEECH = {"vocab_size": 33, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "conv_dim": (16, 16),
           "conv_stride": (5, 4), "conv_kernel": (10, 6), "num_feat_extract_layers": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0,
           "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0,
           "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
_PAIRS = {"vocab_size": 97, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "use_cache": False}


def text(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 97, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def classes(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {**text(batch, length), "labels": torch.arange(batch) % 2}


def speech(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(batch, 100 * length), "labels": torch.randint(1, 30, (batch, 5))}


def mixture() -> nn.Module:
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2))
    model.set_experts_implementation("eager")
    return model


# the model, its data, the least shares of parameters and FLOPs in graphs, and a piece of a line that forces Python
MODELS: dict[str, tuple[Callable[[], nn.Module], Data, float, float, str]] = {
    "wav2vec2": (lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**_SPEECH)), speech, 1.0, 1.0, "labels.max()"),
    "hubert": (lambda: hf.HubertForCTC(hf.HubertConfig(**_SPEECH)), speech, 1.0, 1.0, "labels.max()"),
    "layerdrop": (lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**{**_SPEECH, "layerdrop": 0.5})), speech, 1.0, 1.0, "skip_the_layer"),
    "ibert": (lambda: hf.IBertForSequenceClassification(hf.IBertConfig(**_COMMON, **_STILL, quant_mode=False)), classes, 1.0, 0.8, "isnan"),
    "prophetnet": (lambda: hf.ProphetNetForConditionalGeneration(hf.ProphetNetConfig(
        **_PAIRS, hidden_size=32, encoder_ffn_dim=48, decoder_ffn_dim=48, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, max_position_embeddings=64, ngram=2)), text, 1.0, 1.0, "assert torch.all"),
    "longformer": (lambda: hf.LongformerForMaskedLM(hf.LongformerConfig(**_COMMON, **_STILL, attention_window=[4, 4])), text, 0.9, 0.9, ".view("),
    "led": (lambda: hf.LEDForConditionalGeneration(hf.LEDConfig(
        **_PAIRS, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=[4, 4])), text, 0.9, 0.9, ".view("),
    "deberta": (lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(
        **_COMMON, **_STILL, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=32, num_labels=3, pooler_dropout=0.0)),
        classes, 1.0, 1.0, "label_index.size(0) > 0"),
    "experts": (mixture, text, 0.2, 0.3, "for expert_idx in"),
    "rope": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, rope_scaling={"rope_type": "dynamic", "factor": 2.0})), text, 1.0, 1.0, "if seq_len >"),
}


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    random.seed(5)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_parts_trains_as_eager(name: str) -> None:
    make, data, parameters, flops, line = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.05 * torch.randn_like(p))  # so that norms and biases matter
    eager = copy.deepcopy(model)
    opt: Any = fxopt.optimize(model, "canonicalize | fuse | loss | remat", inputs=data(2, 12))
    assert line in opt.report
    captured = [part for part in opt.parts if part.captured]
    assert round(sum(part.parameters for part in captured), 6) >= parameters and round(sum(part.flops or 0.0 for part in captured), 6) >= flops
    for batch in (data(2, 12), data(3, 16)):
        mine, theirs = step(opt, batch), step(eager, batch)
        assert same(mine[0], theirs[0])
        longest = max(float(grad.norm()) for grad in theirs[1].values())
        for parameter, grad in theirs[1].items():
            if float(grad.norm()) > 1e-4 * longest:  # below, it is rounding
                assert same(mine[1][parameter], grad), parameter
