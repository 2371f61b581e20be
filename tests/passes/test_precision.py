"""The precision pass: as exact as autocast with fewer casts, every edge checked, values that do not fit named and kept in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from strategies import Spec, Step, specs
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from fxopt.errors import PassError
from fxopt.ir import meta
from fxopt.ir.capture import Call, capture
from fxopt.ir.program import Program, Sample
from fxopt.kernels import tolerance
from fxopt.passes import dtypes_ranges, precision
from fxopt.passes.pipeline import apply, build, parse, run
from fxopt.runtime.scaler import Scaler, State
from tests.models import (
    bert,
    convnet,
    gpt2,
    handwritten,
    images,
    llama,
    loss_of,
    pairs,
    tokens,
)
from tests.passes.test_random_programs import Trial

aten = torch.ops.aten
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = "canonicalize | causal | fuse | loss"


def captured(model: nn.Module, inputs: Mapping[str, Any] | tuple[torch.Tensor, ...], passes: str = "canonicalize") -> tuple[Program, Sample]:
    call = Call.of((), dict(inputs)) if isinstance(inputs, Mapping) else Call.of(inputs, {})
    state = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return run(passes, capture(model, call)), Sample(call.tensors, state)


def made_casts(program: Program) -> list[Any]:
    return [node for node in program.nodes if node.target is aten.to.dtype and "to_dtype" in node.name]


def dtype_at(program: Program, name: str) -> torch.dtype:
    return next(node.meta["val"].dtype for node in program.nodes if node.name == name)


def kept(program: Program) -> dict[str, str]:
    """Nodes that were kept in fp32 for their own range, with the reason."""
    return {miss.node: miss.reason for miss in program.log[-1].misses if "it reads" not in miss.reason}


def gradients(model: nn.Module, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = loss_of(model(**batch))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> float:
    assert found.keys() == truth.keys()
    error = sum(float((found[name].double() - truth[name].double()).square().sum()) for name in truth)
    return (error / sum(float(truth[name].double().square().sum()) for name in truth)) ** 0.5


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "rotary": (lambda: llama(2), tokens), "tied": (lambda: gpt2(0.0, 2), tokens), "masked": (lambda: bert(0.0), tokens), "convolutions": (convnet, images),
    "handwritten": (handwritten, pairs),
}


@pytest.mark.parametrize("name", MODELS)
def test_as_exact_as_autocast(name: str) -> None:
    make, batch = MODELS[name]
    model, given = make(), batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    double = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    loss, truth = gradients(model.double(), double)
    model.float()
    program, sample = captured(model, given, PASSES)
    for short, dtype in LOW.items():
        with torch.autocast("cpu", dtype):
            their_loss, theirs = gradients(model, given)
        after = apply(build("precision", dtype=short), program, sample)
        step = dtypes_ranges.run(after, sample)
        mine, my_loss = step.gradients, next(out for out in step.outputs.values() if out.dim() == 0)
        assert not any(grad.dtype != torch.float32 for grad in mine.values())
        assert distance(mine, truth) <= tolerance.EAGER * distance(theirs, truth)
        assert distance(mine, truth) > 0
        eps = torch.finfo(dtype).eps
        assert abs(float(my_loss - loss)) <= tolerance.EAGER * abs(float(their_loss - loss)) + eps * abs(float(loss))
        assert all(a.dtype == b.dtype for a, b in zip(step.outputs.values(), dtypes_ranges.run(program, sample, backward=False).outputs.values()))


class Casts(TorchDispatchMode):
    """Casts between float dtypes, of activations and of state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.state = {p.data_ptr() for p in model.parameters()}
        self.activations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and out.is_floating_point() and args[0].is_floating_point() and out.dtype != args[0].dtype:
            self.activations += args[0].data_ptr() not in self.state
        return out


@pytest.mark.parametrize("name", ["rotary", "masked"])
def test_fewer_casts_than_autocast(name: str) -> None:
    make, batch = MODELS[name]
    model = make()
    program, _ = captured(model, batch(), "canonicalize | causal")
    after = apply(build("precision", dtype="bf16"), program)
    mine = [cast for cast in made_casts(after) if cast.args[0].op != "get_attr"]
    with Casts(model) as seen, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**batch())
    assert 0 < len(mine) < seen.activations
    assert len({(cast.args[0], cast.args[1]) for cast in made_casts(after)}) == len(made_casts(after))  # one for each value and dtype
    assert not any(cast.args[0].target is aten.to.dtype for cast in made_casts(after))  # no pairs


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.c(F.gelu(self.b(F.relu(self.a(x)) * 0.5 + 1))), y)


def test_the_casts_of_a_known_graph() -> None:
    torch.manual_seed(0)
    program, sample = captured(Perceptron(), (torch.randn(6, 8), torch.randn(6, 4)))
    after = apply(build("precision", dtype="bf16"), program, sample)
    casts = made_casts(after)
    assert sorted(cast.args[0].name for cast in casts if cast.args[0].op == "get_attr") == ["a_bias", "a_weight", "b_bias", "b_weight", "c_bias", "c_weight"]
    assert [cast.args[0].op for cast in casts if cast.args[0].op != "get_attr"] == ["placeholder", "call_function"]  # the input, and what the loss reads
    assert all(node.meta["val"].dtype == torch.bfloat16 for node in after.nodes if node.target in (aten.relu.default, aten.gelu.default, aten.mul.Tensor))
    note = next(note for note in after.log[-1].notes if "casts:" in note)
    assert "(3 products)" in note and "8 casts: 6 of state, 2 of other values" in note
    assert any("error against the program as it was" in note for note in after.log[-1].notes)


# -- what stays as it is -----------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """A product of positions and frequencies beside one that is learned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(8, 8)
        self.register_buffer("frequencies", torch.rand(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(x.shape[1])
        return self.map(x) * torch.cos(torch.stack([place, place + 1], -1).to(torch.float32) @ self.frequencies)


def test_positions_are_computed_as_they_are() -> None:
    """bf16 holds no position above 256, fp16 none above 2,048."""
    program, sample = captured(Positions(), (torch.randn(2, 3001, 8),))
    after = apply(build("precision", dtype="bf16"), program, sample)
    assert {node.name: node.meta["val"].dtype for node in after.nodes if node.target in (aten.matmul.default, aten.mm.default, aten.linear.default)} == {
        "linear": torch.bfloat16, "matmul": torch.float32}
    _, error, _, _ = dtypes_ranges.difference(dtypes_ranges.run(program, sample), dtypes_ranges.run(after, sample))
    assert error <= torch.finfo(torch.bfloat16).eps


class Stream(nn.Module):
    """Layers that add to a stream; with it in 16 bits there would be two casts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(7, 8), nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return x


def test_streams_stay_wide_and_what_is_rounded_anyway_does_not() -> None:
    dtypes_of = lambda program, target: [node.meta["val"].dtype for node in program.nodes if node.target is target]  # noqa: E731
    for model, given in ((handwritten(), pairs()), (Stream(), (torch.arange(7)[None],))):
        after = apply(build("precision", dtype="bf16"), captured(model, given)[0])
        assert set(dtypes_of(after, aten.add.Tensor)) | set(dtypes_of(after, aten.layer_norm.default)) == {torch.float32}
        assert set(dtypes_of(after, aten.gelu.default)) == {torch.bfloat16}
    assert [cast.args[0].name for cast in made_casts(after) if cast.args[0].op != "get_attr"] == ["embedding", "add", "add_1", "add_2"]
    program, _ = captured(convnet(), images())
    after = apply(build("precision", dtype="bf16"), program)
    found = [*dtypes_of(after, aten.batch_norm.default), *dtypes_of(after, aten.relu.default), *dtypes_of(after, aten.add.Tensor)]
    assert len(found) > 15 and set(found) == {torch.bfloat16}


def test_what_the_model_computes_in_16_bits_stays_or_is_widened() -> None:
    model = Perceptron().bfloat16()
    given = (torch.randn(6, 8).bfloat16(), torch.randn(6, 4).bfloat16())
    program, sample = captured(model, given)
    same = apply(build("precision", dtype="fp16"), program, sample)
    assert any("computed by the model in 16 bits, and left so" in note for note in same.log[-1].notes) and not made_casts(same)
    wide = apply(build("precision", dtype="fp32"), program, sample)
    assert all(dtype_at(wide, node.name) == torch.float32 for node in wide.nodes if node.target in (aten.linear.default, aten.gelu.default, aten.mse_loss.default))
    step = dtypes_ranges.run(wide, sample)
    assert step.outputs[0].dtype == torch.bfloat16 and all(grad.dtype == torch.bfloat16 for grad in step.gradients.values())
    double = Sample(tuple(t.double() for t in given), {name: t.double() for name, t in sample.state.items()})
    truth = dtypes_ranges.run(captured(Perceptron().double(), double.inputs)[0], double).gradients
    assert distance(step.gradients, truth) < distance(dtypes_ranges.run(program, sample).gradients, truth)


def test_a_call_under_autocast_is_left_alone() -> None:
    model = Perceptron()
    with torch.autocast("cpu", torch.bfloat16):
        program, sample = captured(model, (torch.randn(6, 8), torch.randn(6, 4)))
        after = apply(build("precision", dtype="fp16"), program, sample)
    assert len(after.nodes) == len(program.nodes) and "runs under autocast to bf16" in after.log[-1].notes[0]


@pytest.mark.parametrize("units", [True, False])
def test_auto_asks_the_device(units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    program, sample = captured(Perceptron(), (torch.randn(6, 8), torch.randn(6, 4)))
    after = apply(build("precision"), program, sample)
    assert dtype_at(after, "linear") == (torch.bfloat16 if units else torch.float32)
    assert f"auto: {'bf16' if units else 'fp32'}, because the CPU has {'AMX' if units else 'no bf16'}" in after.log[-1].notes[0]
    low, low_sample = captured(Perceptron().bfloat16(), (torch.randn(6, 8).bfloat16(), torch.randn(6, 4).bfloat16()))
    assert dtype_at(apply(build("precision"), low, low_sample), "linear") == (torch.bfloat16 if units else torch.float32)


def test_text() -> None:
    assert str(parse("precision(bf16)")) == "precision(dtype=bf16)" and str(parse("precision")) == "precision"
    assert parse("precision(fp16, margin=4.0)").passes[0] == precision.Precision("fp16") and parse("precision(fp16, 2)").passes[0].margin == 2.0
    for wrong in ("precision(int8)", "precision(fp16, margin=0.5)", "precision(fp16, margin=nan)"):
        with pytest.raises(PassError):
            parse(wrong)


# -- random programs, adapters -----------------------------------------------------------------------------------------------


def try_precisions(spec: Spec, blind: bool = True) -> None:
    trial = Trial(spec)
    program = run("canonicalize | fuse | loss", trial.program)
    for dtype, seen in itertools.product(("bf16", "fp16", "fp32"), (False, True) if blind else (True,)):
        after = apply(build("precision", dtype=dtype), program, Sample(trial.inputs[0], trial.state) if seen else None)
        for tensors in trial.inputs:
            exact, found = (dtypes_ranges.run(each, Sample(tensors, trial.state), backward=each.grad) for each in (program, after))
            assert exact.gradients.keys() == found.gradients.keys()
            output, error, _, _ = dtypes_ranges.difference(exact, found)
            coarse = LOW.get(dtype, spec.dtype)
            if error > tolerance.SELF_CHECK[coarse]:  # an ill-conditioned program answers one rounding of its state with more
                moved = {name: value.to(coarse).to(value.dtype) if value.is_floating_point() else value for name, value in trial.state.items()}
                response = dtypes_ranges.difference(exact, dtypes_ranges.run(program, Sample(tensors, moved), backward=False))[1]
                assert error <= tolerance.SELF_CHECK_RESPONSE * response, output


FEW = settings(max_examples=6, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])


@FEW
@given(specs(max_steps=8))
def test_random_programs(spec: Spec) -> None:
    try_precisions(spec, blind=False)


@pytest.mark.slow
@settings(FEW, max_examples=200)
@given(specs(max_steps=20))
def test_random_programs_on_many(spec: Spec) -> None:
    try_precisions(spec)


def test_what_is_written_in_place_is_not_cast() -> None:
    """A cast is a copy: of a value that is written between two readers it would be the wrong one for one of them."""
    steps = (Step("linear"), Step("in_place", option=4), Step("linear"), Step("in_place", option=2), Step("linear", option=1))
    try_precisions(Spec(steps, blocks=2, ids=False))

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 4)
            self.register_buffer("average", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = self.map(self.average + 0.0 * x)
            self.average.mul_(0.5).add_(1.0)
            return before + self.map(self.average)

    program, sample = captured(Written(), (torch.randn(3, 4),))
    after = apply(build("precision", dtype="bf16"), program, sample)
    exact, found = (dtypes_ranges.run(each, sample).outputs[0] for each in (program, after))
    assert float((found - exact).norm() / exact.norm()) <= torch.finfo(torch.bfloat16).eps
    assert "writes in place" in next(iter(kept(after).values()))


@pytest.mark.parametrize("dtype", LOW)
def test_adapters_on_quantized_weights_train(dtype: str) -> None:
    passes = f"canonicalize | causal | lora(rank=2) | quantize(nf4) | siblings | fuse | loss | precision({dtype}) | remat"
    opt = fxopt.optimize(llama(2), passes, inputs=tokens(), check=False)
    products = [node for node in opt.program.nodes if node.target is torch.ops.fxopt.lora_linear.default]
    assert products and all(meta.tensors(node)[0].dtype == LOW[dtype] and meta.tensor(node.args[0]).dtype == LOW[dtype] for node in products)
    parts = [part for node in products for part in node.args[1]]
    assert parts and all(part.op == "get_attr" for part in parts)  # stored weights are read as they are stored
    scaler = Scaler.of(opt.program)
    assert (scaler is not None) == (dtype == "fp16")
    scaler = scaler or Scaler(State(scale=1.0))
    trained = [p for p in opt.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for step in range(4):
        loss = opt(**tokens()).loss
        scaler.scale(loss).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
        assert scaler.step(optimizer)
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert opt(**tokens()).logits.dtype == torch.float32


def test_frozen_weights_stored_in_16_bits_need_no_casts() -> None:
    passes = "canonicalize | causal | lora(rank=2) | quantize(bf16) | siblings | fuse | loss | precision(bf16) | remat"
    model = llama(2)
    dense = {name: p.detach().clone() for name, p in model.named_parameters() if "_proj" in name}
    opt = fxopt.optimize(model, passes, inputs=tokens(), check=False)
    state = opt.state_dict()
    assert all(state[name].dtype == torch.bfloat16 and torch.equal(state[name], value.bfloat16()) for name, value in dense.items())
    cast = {cast.args[0].target for cast in made_casts(opt.program) if cast.args[0].op == "get_attr"}
    assert not any("_proj" in name and "lora" not in name for name in cast)
    assert any(note.startswith("1 frozen weights are cast") for record in opt.program.log for note in record.notes)  # the head
    plain = run("canonicalize | lora(rank=2) | precision(bf16)", capture(llama(2), Call.of((), tokens())))
    assert any(note.startswith("15 frozen weights are cast in each step") for note in plain.log[-1].notes)
    loss = opt(**tokens()).loss
    loss.backward()
    assert all(p.grad is not None for p in opt.parameters() if p.requires_grad)
    other = fxopt.optimize(llama(2), passes, inputs=tokens(), check=False)
    with torch.no_grad():
        next(p for p in opt.parameters() if p.requires_grad).add_(1.0)
    other.load_state_dict(opt.state_dict())
    assert torch.equal(opt(**tokens()).loss, other(**tokens()).loss)
    with torch.no_grad():
        for p in opt.parameters():
            p.add_(0.1 * p.requires_grad)
    merged = opt.merge(base="stored")
    assert all(merged.get_parameter(name).dtype == value.dtype for name, value in dense.items())


def test_regions_compute_what_the_program_says() -> None:
    """Lowered, the casts are where the program has them: the joint graph of a block makes the interpreter's values."""
    opt = fxopt.optimize(llama(2), f"{PASSES} | precision(bf16) | remat", inputs=tokens(), check=False)
    loss = opt(**tokens()).loss
    loss.backward()
    found = {name: p.grad for name, p in opt.model.named_parameters()}
    state = {name: t.detach() for name, t in (*opt.model.named_parameters(), *opt.model.named_buffers())}
    step = dtypes_ranges.run(opt.program, Sample(Call.of((), tokens()).tensors, state))
    assert float(next(out for out in step.outputs.values() if out.dim() == 0)) == float(loss)
    assert distance(found, step.gradients) <= torch.finfo(torch.bfloat16).eps
