"""Turns the GGUF file of a work folder into a Hugging Face folder, in a process of its own (its memory goes back)."""

from __future__ import annotations

from pathlib import Path
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from transformers.utils.quantization_config import GgufConfig


def convert(work: Path) -> None:
    """Reads `work/gguf`, writes config, weights in fp32, tokenizer and chat template beside it, removes it."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"gguf_file": "gguf", "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(work, **source)
    model = AutoModelForCausalLM.from_pretrained(
        work, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **source
    )
    # The weights are plain fp32 now, but the model still calls itself GGUF and refuses to be saved.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    (work / "gguf").unlink()
    for file in work.iterdir():
        file.chmod(0o644)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        if not (work / name).exists():
            raise SystemExit(f"the conversion wrote no {name}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
