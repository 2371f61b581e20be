"""Adapted weights: getters, names, skeleton, copies, and their being undone."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn as nn

import fxopt
from fxopt.kernels.tolerance import same
from fxopt.runtime import adapted
from tests.models import llama, tokens


def made(passes: str = "lora(rank=2) | quantize(nf4)") -> fxopt.Optimized:
    opt = fxopt.optimize(llama(2), passes, inputs=tokens())
    with torch.no_grad():
        for name, parameter in opt.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.03)
    return opt


def test_a_weight_has_one_meaning() -> None:
    opt = made()
    layer = opt.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear"
    base = layer._modules["weight"].dequantize()
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert same(layer.weight, base + 2.0 * b @ a)
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), x @ layer.weight.t()) or same(layer(x), x @ layer.weight.t())
    layer.weight.sum().backward()
    assert a.grad is not None and b.grad is not None


def test_names_keep_their_order() -> None:
    plain, opt = llama(2), made("lora(rank=2)")
    kept = [n for n in opt.state_dict() if "lora_" not in n]
    assert kept == list(plain.state_dict())


def test_skeleton_is_the_original_and_is_undone() -> None:
    opt = made()
    layer = opt.model.model.layers[0].mlp.up_proj
    kind, names = type(layer), list(opt.state_dict())
    with pytest.raises(ZeroDivisionError), adapted.skeleton(opt.model):
        assert type(layer) is nn.Linear and layer.weight.shape == (48, 32) and layer.weight.untyped_storage().size() == 0
        assert [n for n, _ in opt.model.named_parameters()] == [n for n, _ in llama(2).named_parameters()]
        1 / 0
    assert type(layer) is kind and list(opt.state_dict()) == names


def test_dense_weights_are_dropped_again() -> None:
    opt = made()
    layer = opt.model.model.layers[0].mlp.up_proj
    with opt.dense():
        assert layer.weight is layer.weight
    assert layer.weight is not layer.weight


def test_a_copied_layer_stands_alone() -> None:
    layer = made().model.model.layers[0].mlp.up_proj
    other = copy.deepcopy(layer)
    assert torch.equal(other.weight, layer.weight)
    with torch.no_grad():
        other.lora_B["default"].zero_()
    assert not torch.equal(other.weight, layer.weight)


def test_install_frees_each_dense_weight_before_the_next() -> None:
    """The peak of quantizing is one weight's dense copy, not the model's."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(6)))
    model.requires_grad_(False)
    dense = [weakref.ref(p) for p in model.parameters()]
    opt = fxopt.optimize(model, "quantize(nf4, head=true)", inputs=(torch.randn(2, 256),))
    assert all(ref() is None for ref in dense)
    assert sum(b.numel() * b.element_size() for b in opt.buffers()) < 0.16 * 6 * 256 * 256 * 4
