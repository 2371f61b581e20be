"""Weight formats: what they store, that their files are those of others, and that a damaged file is a DataError."""

from __future__ import annotations

import json
import math

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fxopt.errors import CheckError, DataError
from fxopt.kernels.dequantize.cases import base_of
from fxopt.kernels.formats import FORMATS, Format, entry, named, stored_as
from fxopt.kernels.formats.gguf import LAYOUTS
from fxopt.kernels.formats.nf4 import dynamic_map

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
quantizer = pytest.mark.parametrize("format", [f for f in FORMATS.values() if f.quantize is not None], ids=lambda format: format.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


# -- what a format says of itself -------------------------------------------------------------------------------------


@every_format
def test_parts_are_what_the_format_says(format: Format) -> None:
    for shape in ((2, 256), (7, 512), (3, 2, 256), (0, 256)):
        base = base_of(format, weights(*shape))
        format.check(base, shape)
        assert [tensor.dtype for tensor in base] == [part.dtype or torch.float32 for part in format.parts]
        assert format.fits(shape) is None
        for dtype in DTYPES:
            assert same_bits(format.dequantize(base, shape, dtype), format.reference(base, shape, dtype))


@every_format
def test_wrong_parts_are_refused(format: Format) -> None:
    shape = (4, 256)
    base = base_of(format, weights(*shape))
    with pytest.raises(CheckError, match="tensors"):
        format.check((*base, base[0]), shape)
    with pytest.raises(CheckError, match=format.parts[0].name):
        format.check((base[0].to(torch.int32), *base[1:]), shape)
    for place in range(len(base)):
        if base[place].dim():
            short = base[place][:-1]
            with pytest.raises(RuntimeError, match=format.parts[place].name):
                format.check((*base[:place], short, *base[place + 1 :]), shape)


@quantizer
def test_the_error_and_the_size_are_as_stated(format: Format) -> None:
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(1))
    base = format.quantize(weight)
    error = (format.dequantize(base, weight.shape, torch.float32) - weight).norm() / weight.norm()
    assert round(float(error), 3) == round(format.error, 3)
    stored = sum(part.numel() * part.element_size() for part in base)
    tables = 16 * 4 + 256 * 4 + 4
    assert 0 <= stored - format.bits(weight.shape) * weight.numel() / 8 <= tables


def test_a_format_says_why_a_shape_does_not_fit() -> None:
    assert "blocks of 32" in named("q4_0").fits((4, 33))
    assert "blocks of 256" in named("q6_k").fits((4, 32))
    assert "vector" in named("int8").fits((32,))
    assert named("nf4").fits((3, 5)) is None


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(CheckError, match="nf4"):
        named("nf5")


@quantizer
def test_rows_of_zeros_stay_zero(format: Format) -> None:
    weight = torch.zeros(3, 256)
    weight[1, 7] = 0.25
    values = format.dequantize(format.quantize(weight), weight.shape, torch.float32)
    assert values.isfinite().all() and not values[0].any() and not values[2].any() and values[1].any()


@every_format
@pytest.mark.parametrize("shape", [(3, 2**18 - 256), (5, 2**16 + 256), (2**11, 256)], ids=str)
def test_across_the_blocks_of_the_loop(format: Format, shape: tuple[int, int]) -> None:
    base = base_of(format, weights(*shape))
    for dtype in (torch.float32, torch.bfloat16):
        assert same_bits(format.dequantize(base, shape, dtype), format.reference(base, shape, dtype))


# -- against those who defined them -----------------------------------------------------------------------------------


def bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()


@layouts
def test_blocks_are_read_as_gguf_reads_them(layout) -> None:
    kind = gguf.GGMLQuantizationType(layout.number)
    assert gguf.GGML_QUANT_SIZES[kind] == (layout.weights, layout.bytes)
    shape = (37, 3 * layout.weights)
    (blocks,) = base_of(named(layout.name), weights(*shape) if layout.encode is None else weights(*shape))
    for blocks in (blocks, torch.randint(0, 256, blocks.shape, dtype=torch.uint8).index_fill_(1, torch.tensor(_high_bytes(layout, 3)), 0x2C)):
        theirs = torch.from_numpy(gguf.dequantize(blocks.numpy(), kind))
        for read in (named(layout.name).reference, named(layout.name).dequantize):
            assert same_bits(read((blocks,), shape, torch.float32), theirs)


def _high_bytes(layout, repeats: int) -> list[int]:
    """Where the exponents of the fp16 fields are: random ones would give infinities, whose NaNs differ in sign."""
    return [turn * layout.bytes + at + 1 for turn in range(repeats) for at in layout.halves]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.encode], ids=lambda layout: layout.name)
def test_blocks_are_written_as_gguf_writes_them(layout) -> None:
    weight = weights(64, 256)
    weight[3, :64] = 0
    weight[5, :32] = 0.25
    theirs = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType(layout.number))
    assert np.array_equal(named(layout.name).quantize(weight)[0].numpy(), theirs)


def test_the_nested_map_is_theirs() -> None:
    assert same_bits(dynamic_map(), bnb.create_dynamic_map())


@every_dtype
@pytest.mark.parametrize("shape", [(33, 66), (128, 64), (257, 1025), (300, 200), (1, 1)], ids=str)
def test_nested_scales_are_read_bit_exactly(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, state = bnb.quantize_4bit(weights(*shape).to(dtype), blocksize=64, quant_type="nf4", compress_statistics=True)
    base = (codes, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
    assert same_bits(named("nf4_nested").dequantize(base, shape, dtype), bnb.dequantize_4bit(codes, state).view(shape))


def test_nested_scales_are_quantized_as_they_do() -> None:
    """All parts are equal but for 8-bit codes of scales that lie on the middle of two values."""
    weight = weights(2048, 512)
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, absmax, _, nested, table, offset = named("nf4_nested").quantize(weight)
    assert same_bits(codes, theirs) and same_bits(nested, state.state2.absmax) and same_bits(table, state.state2.code)
    assert same_bits(offset, state.offset.view(()))
    different = absmax != state.absmax
    assert different.sum() * 200 < absmax.numel()
    assert ((absmax.int() - state.absmax.int()).abs() <= 1).all()


@pytest.mark.parametrize("name", ["nf4", "nf4_nested"])
def test_blocks_straddle_rows(name: str) -> None:
    """Blocks run over the flattened weight. bitsandbytes 0.50 quantizes so too, but its AVX-512 code restarts them at each row
    of 16 k columns that are no multiple of 64: it reads its own [64, 96] with an error of 0.28. As one row it reads it rightly."""
    weight = weights(64, 96)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=name == "nf4_nested")
    nested = () if state.state2 is None else (state.state2.absmax, state.state2.code, state.offset)
    mine = named(name).dequantize((codes, state.absmax, state.code, *nested), (64, 96), torch.float32)
    state.shape = torch.Size([64 * 96])
    assert same_bits(mine, bnb.dequantize_4bit(codes, state).view(64, 96))


@every_dtype
def test_int8_is_read_as_in_their_products(dtype: torch.dtype) -> None:
    codes, absmax = named("int8").quantize(weights(33, 66))
    theirs = codes.to(dtype).mul_(absmax.unsqueeze(1).mul(1.0 / 127.0))
    assert same_bits(named("int8").dequantize((codes, absmax), (33, 66), dtype), theirs)
    quantized, magnitudes, _ = bnb.int8_vectorwise_quant(weights(33, 66).half())
    mine = named("int8").quantize(weights(33, 66).half())
    assert same_bits(mine[1], magnitudes) and ((mine[0].int() - quantized.int()).abs() <= 1).all()


def test_fp8_takes_the_largest_value_of_a_row_to_the_largest_code() -> None:
    codes, scale = named("fp8").quantize(weights(33, 66))
    values = codes.view(torch.float8_e4m3fn).float()
    assert (values.abs().amax(1) == 448).all() and scale.shape == (33, 1)


# -- files ------------------------------------------------------------------------------------------------------------


@every_format
def test_what_is_written_is_read(format: Format, tmp_path) -> None:
    shape, key = (6, 256), "model.layer.weight"
    base = base_of(format, weights(*shape))
    save_file({name: tensor.contiguous() for name, tensor in format.write(key, base, shape, torch.float32).items()}, tmp_path / "f.safetensors")
    entries = load_file(tmp_path / "f.safetensors")
    assert key in entries
    parts = format.read(key, entries, shape)
    assert len(parts) == len(base) and all(map(same_bits, parts, base))
    plain = format.name in ("bf16", "fp16")  # in a file, a weight in 16 bits is a dense weight of that dtype
    assert stored_as(key, entries) is (format if format.claims is not None else named("dense") if plain else None)


def test_siblings_of_several_weights_of_a_module_do_not_collide() -> None:
    assert entry("layer.weight", "../SCB") == "layer.SCB"
    assert entry("weight", "../SCB") == "SCB"
    assert entry("experts.down", "../SCB") == "experts.down.SCB" != entry("experts.up", "../SCB")
    assert entry("layer.weight", ".absmax") == "layer.weight.absmax"


@pytest.mark.parametrize("name", ["nf4", "nf4_nested"])
@every_dtype
def test_bitsandbytes_reads_our_4_bit_files(name: str, dtype: torch.dtype) -> None:
    shape = (48, 128)
    format = named(name)
    base = format.quantize(weights(*shape))
    entries = format.write("layer.weight", base, shape, dtype)
    layer = Linear4bit(128, 48, bias=False, compute_dtype=dtype, quant_type="nf4")
    state = {key: tensor for key, tensor in entries.items() if key != "layer.weight"}
    layer.weight = Params4bit.from_prequantized(data=entries["layer.weight"], quantized_stats=state, requires_grad=False, device="cpu")
    x = weights(5, 128, seed=1).to(dtype)
    assert same_bits(layer(x), torch.nn.functional.linear(x, format.dequantize(base, shape, dtype)))


CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """(format, dense model, folder that transformers and bitsandbytes saved, their model)."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    # Rows of a multiple of 64: bitsandbytes' AVX-512 code reads others wrongly (see below).
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=100, **sizes)).eval()
    dense.save_pretrained(folder / "dense")
    config = BitsAndBytesConfig(**CONFIGS[request.param])
    theirs = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config, dtype=torch.float32, device_map="cpu")
    theirs.save_pretrained(folder / "theirs")
    return named(request.param), dense, folder / "theirs", theirs


def quantized_linears(dense):
    return [(name, module) for name, module in dense.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name]


def test_we_read_what_transformers_saves(saved) -> None:
    format, dense, folder, theirs = saved
    entries = load_file(folder / "model.safetensors")
    layers = quantized_linears(dense)
    assert len(layers) == 7
    for name, module in layers:
        key, shape = f"{name}.weight", tuple(module.weight.shape)
        assert stored_as(key, entries) is format
        mine = format.dequantize(format.read(key, entries, shape), shape, torch.float32)
        weight = theirs.get_submodule(name).weight
        if format.name == "int8":
            right = weight.data.float().mul_(entries[f"{name}.SCB"].unsqueeze(1).mul(1.0 / 127.0))
        else:
            right = bnb.dequantize_4bit(weight.data, weight.quant_state)
        assert same_bits(mine, right.view(shape))


def test_transformers_reads_what_we_save(saved, tmp_path) -> None:
    """Our quantization of the dense weights in their folder: their model computes what ours does, bit for bit.

    (In training mode: in evaluation, on a CPU with AVX512-BF16, bitsandbytes repacks and rounds the scales to bf16.) With int8
    weights their layer also rounds the input to 8 bits, so there the weights are compared.
    """
    format, dense, folder, _ = saved
    entries = {}
    ours = LlamaForCausalLM(dense.config).eval()
    ours.load_state_dict(dense.state_dict())
    layers = dict(quantized_linears(dense))
    for name, tensor in dense.state_dict().items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            entries[name] = tensor
            continue
        base = format.quantize(tensor)
        entries |= format.write(name, base, tuple(tensor.shape), torch.float32)
        ours.get_parameter(name).data = format.dequantize(base, tuple(tensor.shape), torch.float32)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: tensor.clone() for name, tensor in entries.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").train()
    if format.name == "int8":
        for name in layers:
            weight = theirs.get_submodule(name).weight
            assert same_bits(weight.data, entries[f"{name}.weight"]) and same_bits(weight.SCB, entries[f"{name}.SCB"])
        return
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert same_bits(theirs(tokens).logits, ours(tokens).logits)


# -- damaged files ----------------------------------------------------------------------------------------------------


def damaged(draw, tensor: Tensor) -> Tensor | None:
    """The tensor with one thing wrong; None: it is missing."""
    kind = draw(st.sampled_from(("missing", "short", "long", "dtype", "flat", "scalar", "bytes")))
    if kind == "missing":
        return None
    if kind == "short":
        return tensor.flatten()[: draw(st.integers(0, max(0, tensor.numel() - 1)))]
    if kind == "long":
        return torch.cat([tensor.flatten(), tensor.flatten()])
    if kind == "dtype":
        return tensor.to(draw(st.sampled_from((torch.int64, torch.float64, torch.bfloat16, torch.uint8, torch.int8, torch.bool))))
    if kind == "flat":
        return tensor.flatten().unsqueeze(0)
    if kind == "scalar":
        return torch.zeros((), dtype=tensor.dtype)
    flat = tensor.clone().flatten().view(torch.uint8) if tensor.dim() else tensor.clone().view(1).view(torch.uint8)
    for _ in range(draw(st.integers(1, 4))):
        if flat.numel():
            flat[draw(st.integers(0, flat.numel() - 1))] = draw(st.integers(0, 255))
    return flat.view(tensor.dtype).view(tensor.shape)


def check_read(format: Format, entries: dict[str, Tensor], shape: tuple[int, ...]) -> bool:
    """Reading gives parts that dequantize, or a DataError that says where; whether it gave parts."""
    try:
        parts = format.read("layer.weight", entries, shape)
    except DataError as error:
        assert error.where and error.what and error.do
        return False
    assert format.dequantize(parts, shape, torch.float32).shape == shape
    return True


@every_format
def test_a_damaged_file_is_a_data_error(format: Format) -> None:
    shape = (6, 256)
    good = format.write("layer.weight", base_of(format, weights(*shape)), shape, torch.float32)
    outcomes = set()

    @settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=tuple(HealthCheck))
    @given(st.data())
    def check(data):
        entries = dict(good)
        for key in data.draw(st.lists(st.sampled_from(sorted(good)), min_size=1, max_size=2, unique=True)):
            tensor = damaged(data.draw, entries[key])
            entries = {k: v for k, v in entries.items() if k != key} | ({} if tensor is None else {key: tensor})
        wanted = data.draw(st.sampled_from((shape, shape, (5, 256), (6, 512))))
        outcomes.add(check_read(format, entries, wanted))

    check()
    assert check_read(format, good, shape) and False in outcomes


STATES = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [6, 256], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}


@pytest.mark.parametrize(
    "change",
    [{"nested_offset": math.inf}, {"nested_offset": math.nan}, {"nested_offset": 10**400}, {"nested_offset": True}, {"nested_blocksize": 128},
     {"nested_blocksize": 256.0}, {"nested_dtype": "float16"}, {"shape": [6, 257]}, {"shape": [256, 6]}, {"shape": [6.0, 256]},
     {"nested_offset": None, "nested_blocksize": None}],
    ids=str,
)  # fmt: skip
def test_a_wrong_state_is_a_data_error(change: dict) -> None:
    format, shape = named("nf4_nested"), (6, 256)
    entries = format.write("layer.weight", format.quantize(weights(*shape)), shape, torch.float32)
    key = "layer.weight.quant_state.bitsandbytes__nf4"

    def state(fields):
        return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    assert check_read(format, entries | {key: state(STATES)}, shape)
    assert not check_read(format, entries | {key: state(STATES | change)}, shape)
