"""A GGUF file as the base: values, gradients, names, memory; what does not fit is refused before anything changes."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn as nn
from house import ROOT
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import fxopt
from demo import assets
from fxopt.errors import DataError
from fxopt.kernels.formats import named
from fxopt.kernels.tolerance import same
from fxopt.runtime.gguf import File, state_of
from fxopt.runtime.stored import StoredWeight
from tests.parity import compare, equal_values, in_peft
from tests.runtime.test_gguf_file import CONFIGS, tiny, write

TYPES = gguf.GGMLQuantizationType
QLORA = "lora(rank=2) | quantize | siblings | fuse | loss | remat"


def empty(config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).train()


def dense(path: Path, config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with the file's weights dequantized by the formats' references."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).train()  # it writes the dtype into the configuration
    state = {name: named(format).reference(parts, shape, dtype) for name, format, parts, shape in state_of(File(path))}
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def batch(vocabulary: int, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", "llama", tiny("llama"), TYPES.Q4_1)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_outputs_are_those_of_the_dequantized_weights(architecture: str, tmp_path: Path) -> None:
    path, config = write(tmp_path / "m.gguf", architecture, tiny(architecture), TYPES.Q8_0), CONFIGS[architecture]
    model, given = fxopt.load_gguf(empty(config), path), batch(64)
    assert torch.equal(model(**given).logits, dense(path, config)(**given).logits)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stored = {name for name, module in linears.items() if isinstance(module._modules.get("weight"), StoredWeight)}
    assert stored == linears.keys() - ({"lm_head"} if config.tie_word_embeddings else set())
    assert (model.lm_head._parameters.get("weight") is model.model.embed_tokens.weight) == config.tie_word_embeddings
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_the_bytes_are_the_files(file: Path) -> None:
    """A weight is a view of the mapped file, and computing with it does not change the file."""
    before, model = file.read_bytes(), fxopt.load_gguf(empty(CONFIGS["llama"]), file)
    up, down = (getattr(model.model.layers[0].mlp, name)._modules["weight"].blocks for name in ("up_proj", "down_proj"))
    assert up.untyped_storage().data_ptr() == down.untyped_storage().data_ptr() and up.untyped_storage().nbytes() == len(before)
    norm = model.model.norm.weight
    assert norm.untyped_storage().nbytes() == 4 * norm.numel()  # what is trained lies in memory of its own
    with torch.no_grad():
        up.zero_()
    assert file.read_bytes() == before


def test_a_head_that_the_file_lacks_is_the_embedding(file: Path) -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = False
    model = fxopt.load_gguf(empty(config), file)
    head = model.lm_head._modules["weight"]
    assert isinstance(head, StoredWeight) and torch.equal(head.dequantize(), model.model.embed_tokens.weight)
    assert torch.equal(model(**batch(64)).logits, dense(file, config)(**batch(64)).logits)


def test_a_model_in_memory_and_in_another_dtype(file: Path) -> None:
    model = fxopt.load_gguf(AutoModelForCausalLM.from_config(CONFIGS["llama"]), file, dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16 and model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert torch.equal(model(**batch(64)).logits, dense(file, CONFIGS["llama"], torch.bfloat16)(**batch(64)).logits)


def changed(**changes: Any) -> Any:
    config = copy.deepcopy(CONFIGS["llama"])
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_what_does_not_fit_changes_nothing(file: Path, tmp_path: Path) -> None:
    untied = tiny("llama")
    untied.config = changed(tie_word_embeddings=False)
    untied.lm_head.weight = nn.Parameter(torch.randn(64, 64))
    for path, config, said in (
        (file, changed(num_hidden_layers=3), r"13 of the model's are not in the file \(model.layers.2."),
        (file, changed(num_hidden_layers=1), r"13 of 28 are not in the model \(model.layers.1."),
        (file, changed(intermediate_size=128), r"is \(128, 64\) in the model, \(96, 64\) in the file"),
        (write(tmp_path / "untied.gguf", "llama", untied, TYPES.Q8_0), CONFIGS["llama"], "ties (lm_head|model.embed_tokens).weight to .* two different tensors"),
    ):
        model = empty(config)
        with pytest.raises(DataError, match=said):
            fxopt.load_gguf(model, path)
        assert all(p.is_meta for p in model.parameters())
    twice = fxopt.load_gguf(empty(CONFIGS["llama"]), file)
    with pytest.raises(DataError, match="stored weights already"):
        fxopt.load_gguf(twice, file)


def test_buffers_that_nothing_computes_are_an_error(file: Path) -> None:
    model = empty(CONFIGS["llama"])
    model.model.register_buffer("table", torch.ones(3, device="meta"), persistent=False)
    with pytest.raises(DataError, match="1 buffers are on the meta device, and nothing says how to compute them: model.table"):
        fxopt.load_gguf(model, file)


def test_training_equals_peft_on_the_dequantized_model(file: Path) -> None:
    parity(fxopt.load_gguf(empty(CONFIGS["llama"]), file), dense(file, CONFIGS["llama"]), batch(64), QLORA)


def parity(model: nn.Module, other: nn.Module, given: dict[str, torch.Tensor], passes: str, rank: int = 2) -> fxopt.Optimized:
    """Logits, loss and all adapter gradients against PEFT on dense weights."""
    targets = sorted({name.rpartition(".")[2] for name, module in other.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"})
    theirs = in_peft(other, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    opt = fxopt.optimize(model, passes, inputs=given)
    equal_values(theirs, opt)
    compare(theirs, opt, given)
    return opt


def test_the_pipeline_keeps_what_is_stored(file: Path) -> None:
    logits = []
    for passes in ("lora(rank=2)", "fuse", "quantize(int8)", QLORA, "quantize(bits=5)", None):
        opt = fxopt.optimize(fxopt.load_gguf(empty(CONFIGS["llama"]), file).requires_grad_(False), passes, inputs=batch(64))
        assert {w.format.name for w in opt.model.modules() if isinstance(w, StoredWeight)} == {"q4_1"}
        targets = [str(node.target) for node in opt.program.nodes]
        assert any("quantized_linear" in t or "lora_linear" in t for t in targets) and "q4_1: 14 weights" in opt.report
        logits.append(opt(**batch(64)).logits)
    assert all(same(each, logits[0]) for each in logits)


def test_state_dict_comes_back(file: Path, tmp_path: Path) -> None:
    opt = fxopt.optimize(fxopt.load_gguf(empty(CONFIGS["llama"]), file), QLORA, inputs=batch(64))
    with torch.no_grad():
        for name, parameter in opt.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
        opt.model.model.layers[0].mlp.up_proj._modules["weight"].blocks[0].zero_()
    state = opt.state_dict()
    key = "model.layers.1.self_attn.q_proj.weight"
    assert state[key].dtype == torch.uint8 and state[key].shape == (64, 2 * 20)
    save_file({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}, tmp_path / "m.safetensors")
    other = fxopt.optimize(fxopt.load_gguf(empty(CONFIGS["llama"]), file), QLORA, inputs=batch(64))
    assert not torch.equal(other(**batch(64)).loss, opt(**batch(64)).loss)
    other.load_state_dict({**load_file(tmp_path / "m.safetensors"), "lm_head.weight": state["lm_head.weight"]})
    assert torch.equal(other(**batch(64)).loss, opt(**batch(64)).loss)
    with pytest.raises(RuntimeError, match="torch.float32"):
        other.load_state_dict({**state, key: torch.zeros(64, 64)})
    plain = opt.merge("stored")
    assert same(plain(**batch(64)).loss, opt(**batch(64)).loss) and not any(isinstance(m, StoredWeight) for m in plain.modules())


# -- a real model -----------------------------------------------------------------------------------------------------

_MEASURE = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModelForCausalLM
import fxopt, fxopt.runtime.gguf_model, fxopt.passes.catalog
def mib(field): return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) // 1024
config = AutoConfig.from_pretrained(sys.argv[2])
config.use_cache = False
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
before = mib("VmRSS")
fxopt.load_gguf(model, sys.argv[1])
print("load", mib("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assets.gguf_file(tmp_path_factory.mktemp("smollm"))


def test_a_real_model_trains_as_in_peft(real: Path) -> None:
    """SmolLM2-135M-Instruct: the base logits are transformers' to the bit, one step's gradients PEFT's."""
    config = AutoConfig.from_pretrained(assets.model_folder())
    config.use_cache = False
    model = fxopt.load_gguf(empty(config), real)
    other = AutoModelForCausalLM.from_pretrained(assets.model_folder(), dtype=torch.float32).train()
    other.config.use_cache = False
    given = batch(config.vocab_size, 16)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, other(**given).logits)
    parity(model, other, given, "lora(rank=8) | quantize | siblings | fuse | loss | remat", rank=8)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's counters")
def test_memory_at_the_real_size(real: Path) -> None:
    """A dense fp32 copy of the stored weights is 405 MiB. Loading needs the file, the embedding and little else."""
    settings = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(real), str(assets.model_folder())], env=settings, capture_output=True, text=True, timeout=600, check=True)
    used = {name: int(mib) for name, mib in re.findall(r"^(\w+) (\d+)$", done.stdout, re.MULTILINE)}
    print(used)
    size, embedding = real.stat().st_size >> 20, 49152 * 576 * 4 >> 20
    assert used["load"] <= size + embedding + 64
