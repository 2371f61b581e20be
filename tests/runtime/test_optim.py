"""AdamW: torch's own results and states, and everything around a step."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from steps import STEPS, assert_equal, give_gradients, of_ours, of_torch, parameters, run, saved
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import LlamaConfig, LlamaForCausalLM

from fxopt.errors import CheckError, DataError
from fxopt.kernels.tolerance import same
from fxopt.train.trainer import fit

# -- torch's results


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.0}, {"betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.3}], ids=str)
def test_results_and_states_are_those_of_torch_fused(settings):
    assert_equal(run(of_ours, **settings), run(of_torch, **settings))


def test_fp64_too():
    assert_equal(run(of_ours, params=parameters(dtype=torch.float64)), run(of_torch, params=parameters(dtype=torch.float64)))


def test_parameters_without_a_gradient_are_left_alone():
    """One never has a gradient, some have none now and then or at first: their steps lag behind, as torch's do."""

    def missing(step):
        return {1} | ({3} if step % 3 == 1 else set()) | ({4} if step % 4 == 3 else set()) | ({5} if step < 4 else set())

    mine, theirs = run(of_ours, missing=missing), run(of_torch, missing=missing)
    assert_equal(mine, theirs)
    params, optimizer = mine
    assert torch.equal(params[1], parameters()[1]) and not optimizer.state[params[1]]
    assert [float(optimizer.state[params[place]]["step"]) for place in (0, 3, 4, 5)] == [STEPS, STEPS - 4, STEPS - 3, STEPS - 4]


def test_groups_have_their_own_settings_and_may_come_later():
    def make(kind):
        def of(params, **settings):
            optimizer = kind([{"params": params[:3], "lr": 0.1}, {"params": params[3:6], "weight_decay": 0.5}], **settings)
            optimizer.add_param_group({"params": params[6:], "betas": (0.0, 0.5)})
            return optimizer

        return of

    assert_equal(run(make(of_ours)), run(make(of_torch)))


def test_schedules_closures_clipping_and_hooks_work():
    def train(kind):
        params, seen = parameters(((4, 3), (4,))), []
        optimizer = kind(params)
        schedule = CosineAnnealingLR(optimizer, STEPS)
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
        x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), torch.ones(8, 4)

        def closure():
            optimizer.zero_grad(set_to_none=len(seen) % 2 == 0)
            loss = F.mse_loss(F.linear(x, *params), y)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 0.1, foreach=True)
            return loss

        losses = []
        for _ in range(STEPS):
            losses.append(float(optimizer.step(closure).detach()))
            schedule.step()
        assert len(seen) == STEPS and losses[-1] < losses[0]
        return (params, optimizer), losses

    (mine, losses), (theirs, others) = train(of_ours), train(of_torch)
    assert_equal(mine, theirs)
    assert losses == others


@pytest.mark.parametrize("settings", [{}, {"bits": 8}], ids=str)
def test_a_gradient_factor_is_a_scaled_gradient(settings):
    """And the gradients stay what they are."""

    def steps(scale, factor):
        params = parameters()
        optimizer = of_ours(params, **settings)
        for step in range(3):
            give_gradients(params, step)
            for param in params:
                param.grad *= scale
            before = [param.grad.clone() for param in params]
            optimizer.step(grad_factor=factor)
            assert all(map(torch.equal, before, (param.grad for param in params)))
        return params, optimizer

    assert_equal(steps(1.0, torch.tensor(0.25)), steps(0.25, None))


@pytest.mark.parametrize("settings", [{}, {"bits": 8}], ids=str)
def test_a_gradient_scaler_skips_what_overflows(settings):
    params = parameters(((64, 80),))
    optimizer, scaler = of_ours(params, **settings), torch.amp.GradScaler("cpu", init_scale=4.0)
    plain, other = parameters(((64, 80),)), None
    other = of_ours(plain, **settings)
    for step in range(4):
        give_gradients(plain, step)
        scaler.scale(torch.zeros(()))
        params[0].grad = plain[0].grad * scaler.get_scale() * (math.inf if step == 2 else 1.0)
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            other.step()
    assert_equal((params, optimizer), (plain, other))


def test_any_strides():
    """Channels-last weights, transposed and expanded ones' gradients."""

    def strided():
        params = parameters(((8, 4, 3, 3), (16, 24), (5, 6)))
        params[0].data = params[0].data.contiguous(memory_format=torch.channels_last)
        params[1].data = params[1].data.t().contiguous().t()
        return params

    def missing(step):
        return (1,) if step == 2 else ()

    mine, theirs = run(of_ours, missing=missing, params=strided()), run(of_torch, missing=missing, params=strided(), fused=None)
    for a, b in zip(*(each[0] for each in (mine, theirs)), strict=True):
        assert a.stride() == b.stride() and same(a.detach(), b.detach())
    param = parameters(((5, 6),))
    optimizer = of_ours(param)
    param[0].grad = torch.ones(6).expand(5, 6)
    optimizer.step()
    assert len({tuple(row) for row in (param[0] - parameters(((5, 6),))[0]).mul(1e3).round().tolist()}) <= 2


# -- parameters stay where they are


@pytest.mark.parametrize("settings", [{}, {"bits": 8}], ids=str)
def test_models_are_saved_and_copied_as_before(tmp_path, settings):
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=160, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    places = [param.data_ptr() for param in model.parameters()]
    optimizer = of_ours(model.parameters(), **settings)
    ids = torch.arange(20).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert [param.data_ptr() for param in model.parameters()] == places
    save_model(model, tmp_path / "model.safetensors")
    load_model(copy.deepcopy(model), tmp_path / "model.safetensors")
    model.save_pretrained(tmp_path / "folder")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "folder")
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    file = io.BytesIO()
    torch.save(model.model.norm.weight, file)
    assert len(file.getvalue()) < 4096


# -- states


@pytest.mark.parametrize("first", [of_ours, of_torch])
@pytest.mark.parametrize("then", [of_ours, of_torch])
def test_states_are_loaded_both_ways(first, then):
    missing = lambda step: (3,) if step < 2 else ()  # noqa: E731
    params, optimizer = run(first, steps=4, missing=missing)
    loaded = then(params, lr=0.5)
    loaded.load_state_dict(saved(optimizer))
    loaded.param_groups[0]["fused"] = True  # Ours does not say how torch is to compute.
    whole = run(of_torch, steps=6, missing=missing)
    for step in (4, 5):
        give_gradients(params, step)
        loaded.step()
    assert_equal((params, loaded), whole)
    assert loaded.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("settings", [{}, {"bits": 8}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copied_and_reloaded_optimizers_go_on_alike(settings, dtype):
    params, optimizer = run(of_ours, steps=3, params=parameters(dtype=dtype), **settings)
    twins, twin = copy.deepcopy((params, optimizer))
    others = parameters(dtype=dtype)
    with torch.no_grad():
        for a, b in zip(others, params, strict=True):
            a.copy_(b)
    other = of_ours(others, **settings)
    seen = []
    other.register_load_state_dict_pre_hook(lambda _, state: seen.append(type(state["state"][0]["step"])))
    other.load_state_dict(saved(optimizer))
    assert seen == [torch.Tensor]
    for step in range(3, 6):
        for each in (params, twins, others):
            give_gradients(each, step)
        for each in (optimizer, twin, other):
            each.step()
    assert_equal((params, optimizer), (twins, twin))
    assert_equal((params, optimizer), (others, other))
    whole = run(of_ours, steps=6, params=parameters(dtype=dtype), **settings)
    assert_equal((params, optimizer), whole)


def test_states_of_another_kind_are_refused():
    params, eight = run(of_ours, bits=8)
    with pytest.raises(CheckError, match="exp_avg does not fit"):
        other = of_ours(params)
        other.load_state_dict(eight.state_dict() | {"param_groups": other.state_dict()["param_groups"]})
    _, thirty_two = run(of_torch)
    with pytest.raises(CheckError, match="exp_avg_codes does not fit"):
        of_ours(params, bits=8).load_state_dict(thirty_two.state_dict())
    for setting in ({"amsgrad": True}, {"maximize": True}):
        with pytest.raises(CheckError, match=next(iter(setting))):
            of_ours(params).load_state_dict(run(of_torch, **setting)[1].state_dict())
    with pytest.raises(CheckError, match="coupled"):
        of_ours(params).load_state_dict(torch.optim.Adam(params).state_dict())


# -- what cannot be done is said


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_parameters_have_averages_of_their_own(one_process):
    def train(make, shard):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 80), nn.GELU(), nn.Linear(80, 8))
        if shard:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = make(model.parameters())
        for step in range(3):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [getattr(param, "full_tensor", lambda param=param: param)().detach() for param in model.parameters()], optimizer

    with pytest.warns(UserWarning, match="DTensor; they have averages of their own"):
        mine, optimizer = train(of_ours, True)
    theirs, _ = train(of_torch, False)
    assert all(map(torch.equal, mine, theirs))
    state = next(iter(optimizer.state.values()))
    assert type(state["exp_avg"]).__name__ == "DTensor"
    copied = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.load_state_dict(copied)
    with pytest.raises(CheckError, match="its own kind"):
        train(lambda params: of_ours(params, bits=8), True)


@pytest.mark.parametrize(
    "setting",
    [{"lr": -1.0}, {"lr": math.nan}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -1}, {"bits": 4}, {"rounding": "up"}, {"seed": 0.5}],
    ids=str,
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(DataError, match=next(iter(setting))):
        of_ours(parameters(), **setting)
    with pytest.raises(DataError, match=next(iter(setting))):
        of_ours([{"params": parameters(), **setting}])


def test_what_changed_under_the_optimizer_is_noticed():
    params, optimizer = run(of_ours)
    params[0].data = params[0].data.double()
    params[0].grad = None
    params[0].grad = torch.zeros_like(params[0])
    with pytest.raises(CheckError, match="when it was first stepped it was"):
        optimizer.step()
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(CheckError, match="sparse"):
        of_ours(embedding.parameters()).step()
    complex_one = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    complex_one.grad = torch.ones_like(complex_one)
    with pytest.raises(CheckError, match="floating-point"):
        of_ours([complex_one]).step()
    double = parameters(((64, 80),), torch.float64)
    give_gradients(double, 0)
    with pytest.raises(CheckError, match="fp64"):
        of_ours(double, bits=8).step()


def test_fit_takes_it():
    def losses(make):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 80), nn.GELU(), nn.Linear(80, 1))
        data = [torch.randn(4, 8, generator=torch.Generator().manual_seed(step)) for step in range(4)]
        return fit(model, data, epochs=2, optimizer=make(model.parameters()), warmup=1, loss=lambda m, x: (m(x) - x.sum(-1, True)).square().mean(),
                   progress=False).losses  # fmt: skip

    assert losses(of_ours) == losses(of_torch)
