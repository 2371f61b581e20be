"""Adapters go to PEFT and come back with equal logits; damaged and foreign files are refused by name."""

from collections.abc import Callable
import dataclasses
import json
import os
from pathlib import Path
import stat

from peft import LoraConfig, PeftModel, get_peft_model
import pytest
from safetensors.torch import load_file, save_file
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fxopt.errors import DataError
from fxopt.runtime.store import Adapter, read_adapters, write_adapters


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
}


def size(layer: nn.Module, conv1d: bool) -> tuple[int, int]:
    """(out, in) of a Linear or a Conv1D."""
    out, into = layer.weight.shape
    return (into, out) if conv1d else (out, into)


def make_adapters(name: str, **changes: object) -> list[Adapter]:
    """Random adapters for every target module; rank and alpha vary by module when `vary` is asked for."""
    build, targets = MODELS[name]
    vary = changes.pop("vary", False)
    adapters, conv1d = [], name == "gpt2"
    torch.manual_seed(1)
    for path, layer in build().named_modules():
        if path.rpartition(".")[2] in targets:
            out, into = size(layer, conv1d)
            r, alpha = (2 + len(adapters) % 3, 3.5 + len(adapters)) if vary else (4, 8.0)
            adapters.append(
                Adapter(path, 0.3 * torch.randn(r, into), 0.3 * torch.randn(out, r), alpha, fan_in_fan_out=conv1d)
            )
    return [dataclasses.replace(adapter, **changes) for adapter in adapters]


def reference_logits(model: nn.Module, adapters: list[Adapter], ids: torch.Tensor) -> torch.Tensor:
    """Logits with the adapters merged into the weights by the definition of LoRA."""
    with torch.no_grad():
        for adapter in adapters:
            delta = adapter.scale * adapter.b @ adapter.a
            model.get_submodule(adapter.path).weight += delta.T if adapter.fan_in_fan_out else delta
        return model(ids).logits


IDS = torch.arange(24).reshape(2, 12)
CASES = [{}, {"rslora": True}, {"vary": True}, {"vary": True, "rslora": True}]


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_modules", [True, False])
def test_peft_reads_what_we_write(tmp_path: Path, name: str, changes: dict, with_modules: bool) -> None:
    adapters = make_adapters(name, **changes)
    model = MODELS[name][0]()
    modules = [path for path, _ in model.named_modules()] if with_modules else None
    write_adapters(tmp_path / "a", adapters, task_type="CAUSAL_LM", modules=modules)
    peft = PeftModel.from_pretrained(MODELS[name][0](), tmp_path / "a").eval()
    adapted = {path.removeprefix("base_model.model.") for path, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {adapter.path for adapter in adapters}
    with torch.no_grad():
        logits = peft(IDS).logits
        plain = model(IDS).logits
    expected = reference_logits(model, adapters, IDS)
    assert (expected - plain).abs().max() > 1e-2
    assert (logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"patterns": True}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_we_read_what_peft_writes(tmp_path: Path, name: str, options: dict) -> None:
    build, targets = MODELS[name]
    options = dict(options)
    if options.pop("patterns", False):
        last = targets[-1]
        options |= {"rank_pattern": {last: 2, f".*0.*{targets[0]}": 3}, "alpha_pattern": {rf"^.*\.1\..*\.{last}": 5}}
    config = LoraConfig(
        r=4, lora_alpha=7, target_modules=targets, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM",
        init_lora_weights=False, **options,
    )  # fmt: skip
    peft = get_peft_model(build(), config).eval()
    peft.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        logits = peft(IDS).logits
    assert (reference_logits(build(), read_adapters(tmp_path / "a"), IDS) - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_round_trip_is_bit_equal(tmp_path: Path, changes: dict) -> None:
    adapters = make_adapters("llama", **changes)
    write_adapters(tmp_path, adapters)
    back = read_adapters(tmp_path)
    assert [a.path for a in back] == sorted(a.path for a in adapters)
    for old, new in zip(sorted(adapters, key=lambda a: a.path), back, strict=True):
        assert torch.equal(old.a, new.a) and torch.equal(old.b, new.b)
        assert (old.alpha, old.rslora, old.fan_in_fan_out) == (new.alpha, new.rslora, new.fan_in_fan_out)


def test_mixed_scales_keep_their_value(tmp_path: Path) -> None:
    adapters = make_adapters("llama")
    adapters[0] = dataclasses.replace(adapters[0], rslora=True)
    write_adapters(tmp_path, adapters)
    assert {a.path: a.scale for a in read_adapters(tmp_path)} == pytest.approx({a.path: a.scale for a in adapters})


def test_the_files_are_peft_s(tmp_path: Path) -> None:
    write_adapters(tmp_path / "ours", make_adapters("llama"), base_model="base", task_type="CAUSAL_LM")
    peft = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    peft.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 41
    chosen = {"r", "lora_alpha", "target_modules", "base_model_name_or_path"}
    assert {k: v for k, v in ours.items() if k not in chosen} == {k: v for k, v in theirs.items() if k not in chosen}
    for file in (tmp_path / "ours").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


class Nested(nn.Module):
    """`proj` is also the end of `inner.proj`; `inner.deep.proj` ends with neither full path's owner."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4), "deep": nn.ModuleDict({"proj": nn.Linear(4, 4)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


@pytest.mark.parametrize(
    "paths", [["proj"], ["inner.proj"], ["inner.deep.proj", "proj"], ["proj", "inner.proj", "inner.deep.proj"]]
)
def test_peft_adapts_exactly_our_modules(tmp_path: Path, paths: list[str]) -> None:
    adapters = [Adapter(path, torch.ones(2, 4), torch.ones(4, 2), 2.0) for path in paths]
    write_adapters(tmp_path, adapters, modules=[path for path, _ in Nested().named_modules()])
    peft = PeftModel.from_pretrained(Nested(), tmp_path)
    adapted = {path.removeprefix("base_model.model.") for path, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(paths)
    assert {adapter.path for adapter in read_adapters(tmp_path)} == set(paths)


def test_views_of_one_buffer_and_strided_tensors_are_written(tmp_path: Path) -> None:
    flat = torch.randn(2 * 2 * 8)
    adapter = Adapter("proj", flat[:16].view(8, 2).T, flat[16:].view(8, 2), 2.0)
    write_adapters(tmp_path, [adapter])
    (back,) = read_adapters(tmp_path)
    assert torch.equal(back.a, adapter.a) and torch.equal(back.b, adapter.b)


def test_writing_refuses(tmp_path: Path) -> None:
    adapter = Adapter("proj", torch.ones(2, 4), torch.ones(4, 2), 2.0)
    with pytest.raises(DataError, match="no adapter"):
        write_adapters(tmp_path, [])
    with pytest.raises(DataError, match="same module path"):
        write_adapters(tmp_path, [adapter, adapter])
    with pytest.raises(DataError, match="no module"):
        write_adapters(tmp_path, [adapter], modules=["other"])
    for a, b in [((2, 4), (4, 3)), ((2, 4, 1), (4, 2)), ((0, 4), (4, 0))]:
        with pytest.raises(DataError, match="shapes do not fit"):
            Adapter("proj", torch.ones(a), torch.ones(b), 2.0)
    with pytest.raises(DataError, match="floating point"):
        Adapter("proj", torch.ones(2, 4, dtype=torch.int8), torch.ones(4, 2), 2.0)
    with pytest.raises(DataError, match="alpha"):
        Adapter("proj", torch.ones(2, 4), torch.ones(4, 2), float("nan"))


def test_a_refused_write_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapters(tmp_path, [Adapter("proj", torch.ones(2, 4), torch.ones(4, 2), 2.0)])

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_adapters(tmp_path, [Adapter("proj", torch.zeros(2, 4), torch.ones(4, 2), 2.0)])
    monkeypatch.undo()
    (back,) = read_adapters(tmp_path)
    assert back.a.sum() == 8
    assert len(list(tmp_path.iterdir())) == 2


def edited(folder: Path, changes: dict, drop: tuple[str, ...] = ()) -> Path:
    write_adapters(folder, [Adapter("layers.0.proj", torch.ones(2, 4), torch.ones(4, 2), 2.0)])
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
    return folder


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_missing_fields_are_errors(tmp_path: Path, field: str) -> None:
    with pytest.raises(DataError, match=f"no `{field}`"):
        read_adapters(edited(tmp_path, {}, drop=(field,)))
    with pytest.raises(DataError, match=f"no `{field}`"):
        read_adapters(edited(tmp_path, {field: None}))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_qalora": True}, {"use_bdlora": {"x": 1}}, {"lora_bias": True}, {"bias": "all"},
        {"alora_invocation_tokens": [1]}, {"layer_replication": [[0, 1]]}, {"use_dora": True},
        {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}, {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq"}, {"kasa_config": {"r": 1}},
        {"arrow_config": {"a": 1}}, {"monteclora_config": {"a": 1}}, {"velora_config": {"a": 1}},
        {"megatron_config": {"a": 1}}, {"use_something_new": True},
    ],
    ids=str,
)  # fmt: skip
def test_other_arithmetic_is_refused_by_name(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(DataError, match=next(iter(changes)) if "bias" not in changes else "biases"):
        read_adapters(edited(tmp_path, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 3}, "rank is 2"), ({"r": True}, "`r`"), ({"r": 0}, "`r`"), ({"r": "2"}, "`r`"), ({"r": 2.0}, "`r`"),
        ({"lora_alpha": "8"}, "`lora_alpha`"), ({"target_modules": ["other"]}, "does not select"),
        ({"target_modules": [1]}, "`target_modules`"), ({"target_modules": {}}, "`target_modules`"),
        ({"peft_type": "IA3"}, "IA3"), ({"use_rslora": "yes"}, "`use_rslora`"), ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"proj": 3}}, "rank is 2"), ({"rank_pattern": {"(a|a)*b": 2}}, "simple module pattern"),
        ({"alpha_pattern": {"proj": None}}, "alpha_pattern"), ({"use_dora": 1}, "`use_dora`"), ({"lora_dropout": "a"}, "`lora_dropout`"),
        ({"modules_to_save": "head"}, "`modules_to_save`"), ({"modules_to_save": [""]}, "empty name"), ({"target_parameters": [1]}, "`target_parameters`"),
        ({"target_parameters": ["x"], "target_modules": []}, "whose name only the model knows"), ({"ensure_weight_tying": 2}, "`ensure_weight_tying`"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_adapters(edited(tmp_path, changes))


def test_empty_unknown_fields_and_expressions_are_read(tmp_path: Path) -> None:
    changes = {"new_field": None, "new_switch": False, "target_modules": "(a|a)*b"}
    assert len(read_adapters(edited(tmp_path, changes))) == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"r": NaN}', '{"r": 1, "r": 2}', '{"r": 1e999}', "[" * 100_000, "\ud800", " " * 9_000_000],
    ids=range(9),
)
def test_damaged_configurations(tmp_path: Path, text: str) -> None:
    edited(tmp_path, {})
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match="adapter_config.json"):
        read_adapters(tmp_path)


def test_damaged_weights(tmp_path: Path) -> None:
    file = edited(tmp_path, {}) / "adapter_model.safetensors"
    whole = file.read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match="could not be read"):
            read_adapters(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match="could not be read"):
        read_adapters(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match="pickle"):
        read_adapters(tmp_path)


PATH = "base_model.model.layers.0.proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{PATH}.lora_B.weight": None}, "only a, not both"),
        ({f"{PATH}.lora_B.weight": torch.ones(4, 3)}, "shapes do not fit"),
        ({f"{PATH}.lora_magnitude_vector": torch.ones(4)}, "has DoRA magnitudes"),
        ({f"{PATH}.lora_B.bias": torch.ones(4)}, "a part of an adapter that is not read"),
        ({"base_model.model.lm_head.weight": torch.ones(4)}, "not of its `modules_to_save`"),
        ({"layers.0.proj.lora_A.weight": torch.ones(4)}, "no part of a LoRA adapter"),
        ({"base_model.model.lora_A.weight": torch.ones(4)}, "no part of an adapter"),
        ({PATH.replace("proj", "proj.base_layer") + f".lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}, "does not select"),
        ({f"{PATH}.lora_A.weight": torch.ones(2, 4, dtype=torch.int32)}, "floating point"),
    ],
    ids=range(9),
)
def test_wrong_tensors(tmp_path: Path, change: dict, message: str) -> None:
    file = edited(tmp_path, {}) / "adapter_model.safetensors"
    tensors = {key: value for key, value in (load_file(file) | change).items() if value is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=message):
        read_adapters(tmp_path)
