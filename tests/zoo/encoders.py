"""Encoders, encoder-decoders and sentence embedders of transformers. Rows of configuration values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

from tests.zoo.batches import pairs, spans, texts, tokens, translations, words
from tests.zoo.decoders import GROUPED, LAYERS, MOE, TEXT, WIDTH
from tests.zoo.entry import Batches, Configured, Written

PARTS = {"num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS, "d_kv": 16, "decoder_start_token_id": 0, "max_source_positions": 64, "max_target_positions": 64,
         "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
_SKIP = ("num_layers", "num_hidden_layers", "num_attention_heads", "hidden_size", "n_layers")
SEQ2SEQ = {key: value for key, value in TEXT.items() if key not in _SKIP} | PARTS
T5 = SEQ2SEQ | {"num_layers": LAYERS}


def _rows(family: str, base: dict[str, Any], suffix: str, batches: Batches, rows: dict[str, Any]) -> tuple[Configured, ...]:
    """Rows of (class prefix, changed settings, model class) or of a class prefix alone."""
    found = []
    for name, row in rows.items():
        kind, more, model = (*((row,) if isinstance(row, str) else row), {}, None)[:3]
        found.append(Configured(name, family, model or f"{kind}{suffix}", f"{kind}Config", base | more, batches))
    return tuple(found)


ENCODERS = _rows("encoder", TEXT, "ForMaskedLM", tokens, {
    "BERT": "Bert",
    "RoBERTa": ("Roberta", {"pad_token_id": 1}),
    "RoBERTa, pre-norm": ("RobertaPreLayerNorm", {"pad_token_id": 1}),
    "XLM-RoBERTa XL": ("XLMRobertaXL", {"pad_token_id": 1}),
    "DistilBERT": ("DistilBert", {"dim": WIDTH, "hidden_dim": 96}),
    "ALBERT": "Albert",
    "ELECTRA": "Electra",
    "DeBERTa": ("Deberta", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": WIDTH}),
    "DeBERTa-v2": ("DebertaV2", {"pooler_hidden_size": WIDTH, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "ModernBERT": ("ModernBert", {"cls_token_id": 1, "sep_token_id": 2}),
    "MPNet": "MPNet",
    "Nomic-BERT": "NomicBert",
    "EuroBERT": ("EuroBert", {"num_key_value_heads": 2, "head_dim": 16}),
    "Jina v3": "JinaEmbeddingsV3",
    "GTE": "Gte",
    "MobileBERT": ("MobileBert", {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32}),
    "SqueezeBERT": "SqueezeBert",
    "Megatron-BERT": "MegatronBert",
    "ConvBERT": ("ConvBert", {"head_ratio": 2, "conv_kernel_size": 3}),
    "FNet": "FNet",
    "ESM": ("Esm", {"position_embedding_type": "rotary", "mask_token_id": 4}),
    "RoFormer": "RoFormer",
    "RemBERT": ("RemBert", {"input_embedding_size": 32, "output_embedding_size": 32}),
    "YOSO": ("Yoso", {"use_expectation": True}),
    "I-BERT": "IBert",
    "Longformer": ("Longformer", {"attention_window": 4}),
    "XLM": ("XLM", {}, "XLMWithLMHeadModel"),
}) + (Configured("Nyströmformer", "encoder", "NystromformerForMaskedLM", "NystromformerConfig", TEXT | {"num_landmarks": 4, "segment_means_seq_len": 12}, tokens,
                 ((2, 12), (3, 12))),
) + _rows("encoder", TEXT, "ForSequenceClassification", texts, {
    "BERT, classes": "Bert",
    "DeBERTa-v2, classes": ("DebertaV2", {"pooler_hidden_size": WIDTH, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_dropout": 0.0}),
    "Qwen2, classes": ("Qwen2", {"num_key_value_heads": 2}),
}) + _rows("encoder", TEXT, "ForTokenClassification", words, {"ELECTRA, tokens": "Electra", "LayoutLM, tokens": "LayoutLM",
}) + _rows("encoder", TEXT, "ForQuestionAnswering", spans, {"ALBERT, answers": "Albert"})

SEQUENCES = _rows("encoder-decoder", T5, "ForConditionalGeneration", translations, {
    "T5": ("T5", {"feed_forward_proj": "relu"}),
    "T5 1.1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mT5": "MT5",
    "UMT5": "UMT5",
    "LongT5": ("LongT5", {"local_radius": 4, "encoder_attention_type": "local"}),
    "Switch": ("SwitchTransformers", {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 16}),
}) + _rows("encoder-decoder", SEQ2SEQ, "ForConditionalGeneration", translations, {
    "BART": "Bart",
    "mBART": "MBart",
    "Pegasus": "Pegasus",
    "PEGASUS-X": ("PegasusX", {"block_size": 8, "num_global_tokens": 4}),
    "BigBird-Pegasus": ("BigBirdPegasus", {"attention_type": "original_full"}),
    "Blenderbot": "Blenderbot",
    "M2M-100": "M2M100",
    "NLLB-MoE": ("NllbMoe", {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 16}),
    "PLBART": "PLBart",
    "MVP": "Mvp",
    "LED": ("LED", {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}),
    "Marian": ("Marian", {}, "MarianMTModel"),
})


class Embedder(nn.Module):
    """A text encoder, pooled and normalized, with the loss of pairs against the others of the batch.

    Args:
        kind: the prefix of its configuration's class, of which the model's is the base model.
        pool: "mean" of all tokens, "first" or "last".
    """

    def __init__(self, kind: str, settings: dict[str, Any], pool: str, model: str | None) -> None:
        super().__init__()
        self.encoder = getattr(transformers, model or f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
        self.pool, self.scale = pool, nn.Parameter(torch.tensor(3.0))

    def embed(self, text: dict[str, torch.Tensor]) -> torch.Tensor:
        """[batch, width], of length 1."""
        hidden = self.encoder(**text).last_hidden_state
        if self.pool == "mean":
            mask = text["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return F.normalize(hidden[:, 0 if self.pool == "first" else -1], dim=-1)

    def forward(self, first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        a, b = self.embed(first), self.embed(second)
        scores = a @ b.mT * self.scale.exp()
        target = torch.arange(scores.shape[0], device=scores.device)
        return {"loss": (F.cross_entropy(scores, target) + F.cross_entropy(scores.mT, target)) / 2, "first": a, "second": b}


def _embedder(name: str, kind: str, settings: dict[str, Any], pool: str, model: str | None = None) -> Written:
    return Written(name, "sentence embedder", lambda: Embedder(kind, settings, pool, model), pairs)


EMBEDDERS = (
    _embedder("BERT, mean of tokens", "Bert", TEXT, "mean"),
    _embedder("MPNet, mean of tokens", "MPNet", TEXT, "mean"),
    _embedder("XLM-RoBERTa, first token", "XLMRoberta", TEXT | {"pad_token_id": 1}, "first"),
    _embedder("ModernBERT, mean of tokens", "ModernBert", TEXT | {"cls_token_id": 1, "sep_token_id": 2}, "mean"),
    _embedder("Qwen3, last token", "Qwen3", GROUPED, "last"),
    _embedder("Mistral, last token", "Mistral", GROUPED | {"sliding_window": 8}, "last"),
    _embedder("T5 encoder, mean of tokens", "T5", T5, "mean", "T5EncoderModel"),
    _embedder("Qwen3-MoE, last token", "Qwen3Moe", MOE, "last"),
)
