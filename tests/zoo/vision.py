"""Vision, speech and multimodal models of transformers. Rows of configuration values."""

from __future__ import annotations

from typing import Any

from tests.zoo.batches import PLACEHOLDER, captions, depths, described, frames, images, prompted, said, scenes, spectrograms, transcripts, waves
from tests.zoo.decoders import GROUPED, HEADS, LAYERS, TEXT, WIDTH
from tests.zoo.encoders import SEQ2SEQ
from tests.zoo.entry import Batches, Configured

VIT: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": 32, "patch_size": 8,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0, "drop_path_rate": 0.0, "num_labels": 3, "mlp_ratio": 2,
    "dropout": 0.0, "classifier_dropout": 0.0, "classifier_dropout_prob": 0.0, "drop_rate": 0.0}
STAGES = {key: value for key, value in VIT.items() if key not in ("hidden_size", "num_hidden_layers", "num_attention_heads")} | {
    "mlp_ratio": 2.0, "depths": [1, 1], "embed_dim": 16, "num_heads": [2, 4], "window_size": 4, "patch_size": 4, "hidden_sizes": [16, 32], "num_stages": 2,
                "embedding_size": 16, "hidden_dropout_rate": 0.0, "attention_dropout_rate": 0.0}
PYRAMID = VIT | {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2],
                 "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32, "semantic_loss_ignore_index": 255}
TOWER = {key: value for key, value in TEXT.items() if key not in ("bos_token_id", "eos_token_id", "pad_token_id")}
SPEECH = SEQ2SEQ | {"num_mel_bins": 16, "max_source_positions": 24, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
                    "input_feat_per_channel": 16, "conv_channels": 32}
WAVE = TEXT | {"conv_dim": (32, 32), "conv_kernel": (4, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
               "num_conv_pos_embedding_groups": 4, "feat_proj_dropout": 0.0, "layerdrop": 0.0, "final_dropout": 0.0, "mask_time_prob": 0.0,
               "apply_spec_augment": False, "ctc_zero_infinity": True, "squeeze_factor": 2, "num_labels": 3, "classifier_proj_size": 32,
               "conv_pos_kernel_size": 9}
IMAGES = ((2, 32), (3, 32))
SOUNDS = ((2, 10), (3, 14))


def _rows(family: str, base: dict[str, Any], suffix: str, batches: Batches, sizes: tuple[tuple[int, int], ...], rows: dict[str, Any]) -> tuple[Configured, ...]:
    """Rows of (class prefix, changed settings, model class) or of a class prefix alone."""
    found = []
    for name, row in rows.items():
        kind, more, model = (*((row,) if isinstance(row, str) else row), {}, None)[:3]
        found.append(Configured(name, family, model or f"{kind}{suffix}", f"{kind}Config", base | more, batches, sizes))
    return tuple(found)


VISION = _rows("vision", VIT, "ForImageClassification", images, IMAGES, {
    "ViT": "ViT",
    "DeiT": "DeiT",
    "BEiT": ("Beit", {"layer_scale_init_value": 0.1, "use_relative_position_bias": True}),
    "DINOv2": "Dinov2",
    "DINOv2, registers": "Dinov2WithRegisters",
    "I-JEPA": "IJepa",
    "ViT-MSN": "ViTMSN",
    "MobileViT": ("MobileViT", {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 40], "expand_ratio": 2.0, "patch_size": 2, "mlp_ratio": 2.0,
                                "conv_kernel_size": 3, "output_stride": 32}),
}) + _rows("vision", STAGES, "ForImageClassification", images, IMAGES, {
    "Swin": "Swin",
    "Swin v2": "Swinv2",
    "ConvNeXt": "ConvNext",
    "ConvNeXt v2": "ConvNextV2",
    "ResNet": ("ResNet", {"layer_type": "basic"}),
    "RegNet": ("RegNet", {"groups_width": 8}),
    "BiT": ("Bit", {"num_groups": 4}),
    "FocalNet": ("FocalNet", {"focal_levels": [1, 1], "focal_windows": [3, 3]}),
    "MobileNet v2": ("MobileNetV2", {"depth_multiplier": 0.25, "classifier_dropout_prob": 0.0}),
    "EfficientNet": ("EfficientNet", {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320, "dropout_rate": 0.0, "drop_connect_rate": 0.0}),
    "PoolFormer": ("PoolFormer", {"patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1], "num_encoder_blocks": 2, "mlp_ratio": 2.0}),
    "Hiera": ("Hiera", {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3],
                        "masked_unit_size": [4, 4], "image_size": [32, 32], "num_query_pool": 2, "embed_dim_multiplier": 2.0}),
}) + _rows("vision", PYRAMID, "ForImageClassification", images, IMAGES, {
    "SegFormer": "Segformer",
    "PVT": ("Pvt", {"patch_sizes": [4, 2], "num_hidden_layers": 2, "sequence_reduction_ratios": [2, 1]}),
}) + _rows("vision", PYRAMID, "ForSemanticSegmentation", scenes, IMAGES, {"SegFormer, pixels": "Segformer",
}) + _rows("vision", PYRAMID, "ForDepthEstimation", depths, IMAGES, {"GLPN": "GLPN",
}) + _rows("vision", STAGES, "ForMaskedImageModeling", depths, IMAGES, {"Swin, masked": ("Swin", {"encoder_stride": 8}),
})

_TEXTS = TOWER | {"eos_token_id": 255, "pad_token_id": 0, "projection_dim": 32, "projection_size": WIDTH}
TOWERS = {"text_config": _TEXTS, "vision_config": VIT | {"projection_dim": 32}, "projection_dim": 32}
SEEING = {"image_token_id": PLACEHOLDER, "image_token_index": PLACEHOLDER, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
          "text_config": GROUPED | {"model_type": "llama"}}


def _seeing(tower: str, text: str = "llama", **more: Any) -> dict[str, Any]:
    """A vision tower before a decoder."""
    return SEEING | {"vision_config": VIT | {"model_type": tower, "projection_dim": 32}, "text_config": GROUPED | {"model_type": text}} | more


MULTIMODAL = _rows("multimodal", TOWERS, "Model", captions, ((2, 12), (3, 12)), {
    "CLIP": "CLIP",
    "SigLIP": "Siglip",
    "Chinese-CLIP": "ChineseCLIP",
    "AltCLIP": ("AltCLIP", {"text_config": _TEXTS | {"project_dim": 32}}),
    "BLIP, matching": ("Blip", {"image_text_hidden_size": 32}),
}) + tuple(Configured(name, "multimodal", model, config, settings, said(places)) for name, model, config, settings, places in (
    ("LLaVA", "LlavaForConditionalGeneration", "LlavaConfig", _seeing("clip_vision_model", vision_feature_select_strategy="default"), 16),
    ("VipLLaVA", "VipLlavaForConditionalGeneration", "VipLlavaConfig", _seeing("clip_vision_model", vision_feature_layers=[-1, -2]), 16),
    ("Gemma 3, images", "Gemma3ForConditionalGeneration", "Gemma3Config",
     _seeing("siglip_vision_model", "gemma3_text", mm_tokens_per_image=4, vision_use_head=False), 4),
    ("InternVL", "InternVLForConditionalGeneration", "InternVLConfig", _seeing("internvl_vision", "qwen2", downsample_ratio=0.5), 4),
    ("AyaVision", "AyaVisionForConditionalGeneration", "AyaVisionConfig", _seeing("siglip_vision_model", "cohere2", downsample_factor=2), 4),
)) + (
    Configured("PaliGemma", "multimodal", "PaliGemmaForConditionalGeneration", "PaliGemmaConfig", _seeing("siglip_vision_model", "gemma", projection_dim=WIDTH),
               prompted(16)),
) + tuple(Configured(name, "multimodal", model, config, settings, described) for name, model, config, settings in (
    ("ViT to GPT-2", "VisionEncoderDecoderModel", "VisionEncoderDecoderConfig",
     {"encoder": VIT | {"model_type": "vit"}, "decoder": TEXT | {"model_type": "gpt2", "is_decoder": True, "add_cross_attention": True},
      "decoder_start_token_id": 1, "pad_token_id": 0}),
    ("Donut", "VisionEncoderDecoderModel", "VisionEncoderDecoderConfig",
     {"encoder": STAGES | {"model_type": "donut-swin"}, "decoder": TEXT | {"model_type": "mbart", "is_decoder": True, "add_cross_attention": True, "d_model": 32},
      "decoder_start_token_id": 1, "pad_token_id": 0}),
))

SPEAKING = _rows("speech", SPEECH, "ForConditionalGeneration", spectrograms, ((2, 12), (3, 20)), {"Whisper": "Whisper",
}) + _rows("speech", SPEECH, "ForConditionalGeneration", frames, ((2, 8), (3, 12)), {"Speech2Text": "Speech2Text",
}) + _rows("speech", WAVE, "ForSequenceClassification", waves, SOUNDS, {
    "Wav2Vec2": "Wav2Vec2",
    "HuBERT": "Hubert",
    "WavLM": "WavLM",
    "UniSpeech": "UniSpeech",
    "SEW": "SEW",
    "Data2Vec audio": "Data2VecAudio",
}) + _rows("speech", WAVE, "ForCTC", transcripts, SOUNDS, {
    "Wav2Vec2, CTC": "Wav2Vec2",
    "HuBERT, CTC": "Hubert",
    "WavLM, CTC": "WavLM",
    "SEW-D, CTC": ("SEWD", {"share_att_key": True, "position_buckets": 8, "max_relative_positions": 8, "relative_attention": True}),
}) + (Configured("Moonshine", "speech", "MoonshineForConditionalGeneration", "MoonshineConfig",
                 SEQ2SEQ | GROUPED | {"encoder_num_hidden_layers": LAYERS, "decoder_num_hidden_layers": LAYERS, "encoder_num_attention_heads": HEADS,
                                      "decoder_num_attention_heads": HEADS, "encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS}, transcripts, ((2, 30), (3, 40))),)
