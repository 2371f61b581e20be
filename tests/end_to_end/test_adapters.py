"""Several adapters on one base, in training: switching, optimizers, copies, checkpoints, whole modules, and errors that say what to do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from strategies import SIZE, Spec, build, inputs, specs

import fxopt
from fxopt.errors import FxoptError, PassError
from fxopt.ir.capture import Call
from fxopt.kernels.tolerance import same
from fxopt.passes.adapters import find
from fxopt.passes.lora import Lora
from fxopt.runtime import selfcheck
from tests.models import Handwritten, llama, pairs, tokens
from tests.parity import shake, trained

OTHER = "lora(rank=3, alpha=5, targets=[down_proj, q_proj], variant=rslora)"


def made(first: str = "rank=4, targets=[q_proj, up_proj]", quantized: bool = False) -> fxopt.Optimized:
    rest = "quantize(nf4) | siblings | fuse" if quantized else "siblings | fuse | loss | remat"
    return fxopt.optimize(llama(2), f"canonicalize | lora({first}) | {rest}", inputs=tokens())


def two() -> fxopt.Optimized:
    """A model with the adapters `default` and `other`, both away from zero; `other` is active."""
    opt = made()
    shake(opt)
    opt.add_adapter("other", OTHER)
    opt.prepare(tokens())
    shake(opt, seed=4)
    return opt


def step(opt: fxopt.Optimized, optimizer: torch.optim.Optimizer, seed: int) -> float:
    loss = opt(**tokens(seed=seed)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def optimizer_of(opt: fxopt.Optimized) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(opt).values(), lr=1e-2)


@pytest.mark.parametrize("quantized", [False, True])
def test_training_one_adapter_does_not_see_the_other(quantized: bool) -> None:
    """The losses of `default` are those of a run without `other`, bit for bit, although `other` is trained in between."""
    alone = made(quantized=quantized)
    own = optimizer_of(alone)
    expected = [step(alone, own, seed) for seed in range(6)]
    opt = made(quantized=quantized)
    first = optimizer_of(opt)
    losses = [step(opt, first, seed) for seed in range(3)]
    before = {name: parameter.detach().clone() for name, parameter in trained(opt).items()}
    opt.add_adapter("other", OTHER)
    opt.prepare(tokens())
    second = optimizer_of(opt)
    assert {name.rpartition(".")[2] for name in trained(opt)} == {"other"} and opt.active_adapter == "other"
    others = [step(opt, second, seed) for seed in range(3)]
    assert others[0] != losses[0] or others[1] != losses[1]
    parameters = dict(opt.named_parameters())
    assert all(torch.equal(parameters[name], value) and not parameters[name].requires_grad and parameters[name].grad is None for name, value in before.items())
    opt.set_adapter("default")
    losses += [step(opt, first, seed) for seed in range(3, 6)]
    assert losses == expected
    opt.set_adapter("other")
    assert step(opt, second, 3) < others[0]


def test_disabled_inside_training() -> None:
    alone, opt, plain = made(), made(), llama(2)
    own, optimizer = optimizer_of(alone), optimizer_of(opt)
    for seed in range(4):
        assert step(opt, optimizer, seed) == step(alone, own, seed)
        with opt.disable_adapter():
            assert opt.active_adapter is None
            assert torch.equal(opt(**tokens()).loss, plain(**tokens()).loss)
            with opt.disable_adapter():
                assert torch.equal(opt.model(**tokens()).loss, plain(**tokens()).loss)
        assert opt.active_adapter == "default"


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_both_adapters(how: str) -> None:
    opt = two()
    if how == "deepcopy":
        other = copy.deepcopy(opt)
    else:
        stream = io.BytesIO()
        torch.save(opt, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    assert other.adapters == ("default", "other") and other.active_adapter == "other"
    for name in ("other", "default"):
        opt.set_adapter(name), other.set_adapter(name)
        losses = [model(**tokens()).loss for model in (opt, other)]
        assert same(*losses)
        losses[1].backward()
        assert trained(opt).keys() == trained(other).keys() and all(p.grad is None for p in trained(opt).values())
        assert all(p.grad is not None for p in trained(other).values())
        other.zero_grad()
    with torch.no_grad():
        for parameter in trained(other).values():
            parameter.add_(1.0)
    assert not same(opt(**tokens()).loss, other(**tokens()).loss)


def test_a_checkpoint_of_both() -> None:
    opt = two()
    stream = io.BytesIO()
    torch.save(opt.state_dict(), stream)
    stream.seek(0)
    fresh = made()
    fresh.add_adapter("other", OTHER)
    fresh.prepare(tokens())
    assert list(fresh.state_dict()) == list(opt.state_dict())
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    for name in ("default", "other"):
        opt.set_adapter(name), fresh.set_adapter(name)
        assert torch.equal(opt(**tokens()).loss, fresh(**tokens()).loss)
    for assign in (False, True):
        fresh.load_state_dict({name: value * 3 if name == "model.layers.0.self_attn.q_proj.weight" else value for name, value in opt.state_dict().items()}, assign=assign)
        assert same(fresh(**tokens()).loss, fresh.model(**tokens()).loss) and not same(fresh(**tokens()).logits, opt(**tokens()).logits)
        fresh.load_state_dict(opt.state_dict())


# -- modules that are trained whole --------------------------------------------------------------------------------------------


def test_modules_to_save_belong_to_their_adapter() -> None:
    plain = llama(2)
    opt = made("rank=4, targets=[q_proj], modules_to_save=[lm_head, input_layernorm]")
    assert {name for name in trained(opt) if "lora_" not in name} == {"lm_head.modules_to_save.default", *(
        f"model.layers.{i}.input_layernorm.modules_to_save.default" for i in range(2))}
    assert torch.equal(opt(**tokens()).loss, made("rank=4, targets=[q_proj]")(**tokens()).loss)  # nothing has changed yet
    optimizer = optimizer_of(opt)
    for seed in range(3):
        step(opt, optimizer, seed)
    tuned = opt(**tokens()).loss.detach()
    assert same(opt(**tokens()).loss, opt.model(**tokens()).loss) and same(opt.merge()(**tokens()).loss, tuned)
    assert torch.equal(opt.state_dict()["lm_head.weight"], plain.state_dict()["lm_head.weight"])
    with opt.disable_adapter():
        assert torch.equal(opt(**tokens()).loss, plain(**tokens()).loss)
    opt.add_adapter("bare", "lora(rank=2, targets=[q_proj])")
    opt.prepare(tokens())
    assert same(opt(**tokens()).loss, plain(**tokens()).loss) and torch.equal(opt.model.lm_head.weight, plain.lm_head.weight)
    opt.add_adapter("headed", "lora(rank=2, targets=[q_proj], modules_to_save=[lm_head])")
    opt.prepare(tokens())
    assert torch.equal(opt.model.lm_head.weight, plain.lm_head.weight) and opt.model.lm_head.weight is trained(opt)["lm_head.modules_to_save.headed"]
    optimizer = optimizer_of(opt)
    for seed in range(3):
        step(opt, optimizer, seed)
    assert not same(opt(**tokens()).loss, plain(**tokens()).loss)
    opt.set_adapter("default")
    assert torch.equal(opt(**tokens()).loss, tuned) and len(trained(opt)) == 2 * 2 + 3


def test_whole_modules_of_another_kind_of_call() -> None:
    opt = fxopt.optimize(Handwritten(layers=1), "lora(targets=[qkv], modules_to_save=[norm, norm1])", inputs=pairs())
    shake(opt)
    names = set(dict(opt.named_parameters()))
    opt.eval()
    with torch.no_grad():
        assert all(same(a, b) for a, b in zip(opt(**pairs(3, 7)), opt.model(**pairs(3, 7)), strict=True))
    assert set(dict(opt.named_parameters())) == names


def test_what_modules_to_save_cannot_have() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.norm(x))

    with pytest.raises(PassError, match="modules_to_save has the buffer norm.running_mean, which the model writes into"):
        fxopt.optimize(Counted(), "lora(targets=[layer], modules_to_save=[norm])", inputs=(torch.randn(5, 4),))
    with pytest.raises(PassError, match="modules_to_save names 'nrm'"):
        fxopt.optimize(Counted(), "lora(targets=[layer], modules_to_save=[nrm])", inputs=(torch.randn(5, 4),))


# -- errors --------------------------------------------------------------------------------------------------------------------


def test_two_lora_passes_in_one_pipeline() -> None:
    with pytest.raises(PassError, match="has a lora pass already") as caught:
        fxopt.optimize(llama(1), "lora(targets=[q_proj]) | lora(targets=[v_proj], adapter=other)", inputs=tokens())
    assert "opt.add_adapter" in str(caught.value)


@pytest.mark.parametrize("quantized", [False, True])
def test_an_adapted_weight_cannot_be_assigned(quantized: bool) -> None:
    opt = made(quantized=quantized)
    layer = opt.model.model.layers[0].self_attn.q_proj
    before, keys = layer.weight.detach().clone(), set(opt.state_dict())
    for value in (nn.Parameter(torch.zeros(32, 32)), *([None] if not quantized else [])):
        with pytest.raises(FxoptError, match="q_proj.weight is an adapted weight"):
            layer.weight = value
    with pytest.raises(TypeError):
        layer.weight = torch.zeros(32, 32)
    assert torch.equal(layer.weight, before) and set(opt.state_dict()) == keys
    opt(**tokens()).loss.backward()
    layer.bias = nn.Parameter(torch.zeros(32))  # what is not adapted is as ever


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "mul_": lambda w: w.mul_(2), "copy_": lambda w: w.copy_(torch.zeros_like(w)), "init": nn.init.normal_, "xavier": nn.init.xavier_uniform_,
    "data": lambda w: w.data.zero_(), "detach": lambda w: w.detach().zero_(), "item": lambda w: w.__setitem__(0, 1.0), "row": lambda w: w[0].zero_(),
    "view": lambda w: w.view(-1)[3:].fill_(1), "iadd": lambda w: w.__iadd__(1), "set data": lambda w: setattr(w, "data", torch.zeros(1)),
    "out": lambda w: torch.add(w, 1, out=w), "relu": lambda w: F.relu(w, inplace=True), "split": lambda w: w.split(2)[1].zero_(),
    "unbind": lambda w: w.unbind()[0].add_(1), "clamp": lambda w: torch.clamp_(w, 0),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_into_a_computed_weight_is_an_error(name: str, layer: nn.Module = nn.Linear(3, 4)) -> None:
    if not hasattr(layer, "lora_A"):
        fxopt.optimize(nn.Sequential(layer), "lora(rank=2, targets=[\"0\"])", inputs=(torch.randn(2, 3),))
    with torch.no_grad(), pytest.raises(FxoptError, match="adapted weight") as caught:
        WRITES[name](layer.weight)
    assert "lora_A" in str(caught.value)


def test_a_computed_weight_is_an_ordinary_tensor_otherwise() -> None:
    layer = nn.Linear(3, 4)
    opt = fxopt.optimize(nn.Sequential(layer), "lora(rank=2, targets=[\"0\"])", inputs=(torch.randn(2, 3),))
    shake(opt)
    x, weight = torch.randn(2, 3), layer.weight
    for made in (F.linear(x, weight), weight + 1, weight.double(), weight.clone(), x @ weight.t(), torch.cat([weight, weight]), copy.deepcopy(weight.detach())):
        assert type(made) is torch.Tensor
    assert same(weight.detach() + 0, layer._parameters["weight"] + 4.0 / 2 * layer.lora_B["default"] @ layer.lora_A["default"])
    weight.square().sum().backward()
    assert layer.lora_A["default"].grad is not None and weight.requires_grad and weight.to(torch.float32) is weight
    stream = io.BytesIO()
    torch.save(weight.detach(), stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=True), weight.detach())
    assert torch.equal(torch.compile(opt.model, backend="eager")(x), opt.model(x))
    opt.set_adapter("default")
    with opt.disable_adapter():
        assert layer.weight is layer._parameters["weight"]


# -- random programs and options -----------------------------------------------------------------------------------------------

QUICK = settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
LONG = settings(QUICK, max_examples=200, phases=list(Phase))


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of the lora pass; `named` chooses among the sites of the program."""
    return {"rank": draw(st.integers(1, 5)), "alpha": draw(st.sampled_from((None, 3.0))), "variant": draw(st.sampled_from(("lora", "rslora", "dora"))),
            "seed": draw(st.integers(0, 9)), "named": draw(st.none() | st.integers(0, 255))}


def adapted_model(spec: Spec, chosen: dict[str, Any]) -> fxopt.Optimized | None:
    """The model of a spec with an adapter; None if there is no site, or no legal choice of them."""
    chosen, model = dict(chosen), build(spec)
    named = chosen.pop("named")
    if named is not None:
        raw = fxopt.optimize(build(spec), "", inputs=inputs(spec), check=False).program
        slots = {name: slot for name, slot in raw.slots.items() if slot.kind == "parameter"}
        names = sorted({site.name for site in find(raw.nodes, slots.keys())})
        picked = [name for i, name in enumerate(names) if named >> (i % 8) & 1]
        if not picked:
            return None
        chosen["targets"] = tuple(other for name in picked for other in (name, *slots[name].aliases))
    try:
        opt = fxopt.optimize(model, [Lora(**chosen), "siblings", "fuse"], inputs=inputs(spec))
    except PassError as error:
        assert any(reason in str(error) for reason in ("changed nothing", "also read by", "DoRA would scale", "cannot serve")), error
        return None
    shake(opt)
    return opt


def check(spec: Spec, chosen: dict[str, Any]) -> None:
    """The program, the original code on the adapted weights, and the merged module are one function."""
    opt = adapted_model(spec, chosen)
    if opt is None:
        return
    kwargs = inputs(spec, *(SIZE if spec.static else (2, 7)))
    call = Call.of((), kwargs)

    def original(given: Sequence[torch.Tensor]) -> Any:
        return type(opt.model).forward(opt.model, **call.rebuild(given)[1])

    expected = selfcheck.step(opt.model, original, call.tensors, 1)
    found = selfcheck.step(opt.model, lambda given: opt(**call.rebuild(given)[1]), call.tensors, 1)
    selfcheck.compare(opt.model, expected, found, "the program", lambda: selfcheck.rounded(opt.model, original, call.tensors, 1))
    assert all(gradient is None or gradient.isfinite().all() for gradient in found.gradients.values())
    merged = opt.merge(certify=False)
    outputs = [selfcheck.step(model, lambda given, model=model: model(**call.rebuild(given)[1]), call.tensors, 1, frozenset()).outputs for model in (opt.model, merged)]
    assert all(same(a, b) for a, b in zip(*outputs, strict=True) if isinstance(a, torch.Tensor) and a.is_floating_point())


@QUICK
@given(specs().filter(lambda spec: spec.dtype == torch.float32), options())
def test_random_programs(spec: Spec, chosen: dict[str, Any]) -> None:
    check(spec, chosen)


@pytest.mark.slow
@LONG
@given(specs().filter(lambda spec: spec.dtype == torch.float32), options())
def test_many_random_programs(spec: Spec, chosen: dict[str, Any]) -> None:
    check(spec, chosen)
