"""`optimize` with each preset on each model: loss, every gradient and every buffer as in eager; 20 steps track eager."""

from __future__ import annotations

import copy

import pytest
import torch

import fxopt
from fxopt.kernels.tolerance import SELF_CHECK
from tests.models import MODELS, loss_of

FP32 = SELF_CHECK[torch.float32]
PIPELINES = {
    "nothing": "dead_code",
    "exact": fxopt.presets.exact(),
    "remat": "remat",
    "exact, everything saved": "canonicalize | causal | fuse | loss",
}


def relative(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    return float((found.double() - expected.double()).norm() / max(float(expected.double().norm()), floor, 1e-30))


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    loss = loss_of(model(**batch))
    loss.backward()
    return loss


def worst_gradient(found: torch.nn.Module, expected: torch.nn.Module) -> float:
    grads = {name: p.grad for name, p in expected.named_parameters()}
    floor = max(float(g.double().norm()) for g in grads.values() if g is not None) * 1e-3
    worst = 0.0
    mine = dict(found.named_parameters())
    assert mine.keys() == grads.keys()
    for name, grad in grads.items():
        assert (mine[name].grad is None) == (grad is None), name
        if grad is not None:
            worst = max(worst, relative(mine[name].grad, grad, floor))
    return worst


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", MODELS)
def test_one_step_equals_eager(name: str, pipeline: str) -> None:
    make, data = MODELS[name]
    model, eager = make(), make()
    opt = fxopt.optimize(model, PIPELINES[pipeline])
    for batch in (data(), data(3, seed=2)):  # the second has other sizes, and must not be captured again
        expected, found = step(eager, batch), step(opt, batch)
        assert relative(found, expected) <= FP32
        assert worst_gradient(model, eager) <= FP32
        for (key, mine), theirs in zip(model.named_buffers(), eager.buffers(), strict=True):
            assert relative(mine, theirs) <= FP32, key
    assert sum(map(len, opt.dispatcher.entries.values())) == 1, "the second batch was captured again"
    assert sum(p.grad is not None for p in model.parameters()) == sum(1 for _ in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_track_eager(name: str) -> None:
    make, data = MODELS[name]
    eager = make()
    opt = fxopt.optimize(make(), str(fxopt.presets.exact()))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (eager, opt)]
    for i in range(20):
        batch, losses = data(seed=i), []
        for model, optimizer in zip((eager, opt), optimizers):
            losses.append(step(model, batch, seed=i).detach())
            optimizer.step()
            optimizer.zero_grad()
        assert relative(losses[1], losses[0]) <= FP32, f"step {i}"


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_adapted_model_equals_its_own_python_code(name: str, quantize: str | None) -> None:
    """The adapted weight has one meaning: the graph and the original code with computed weights agree, also after training."""
    make, data = MODELS[name]
    opt = fxopt.optimize(make(), fxopt.presets.finetune(rank=4, alpha=8, quantize=quantize), inputs=data())
    trainable = {n for n, p in opt.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in opt.named_parameters():
            if "lora_B" in n:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    batch = data(3, seed=5)
    expected = step(opt.model, batch)
    grads = {n: p.grad.clone() for n, p in opt.named_parameters() if p.requires_grad}
    opt.zero_grad()
    found = step(opt, batch)
    assert relative(found, expected) <= FP32
    floor = max(float(g.norm()) for g in grads.values()) * 1e-3
    for n, p in opt.named_parameters():
        if p.requires_grad:
            assert float(grads[n].norm()) > 0, n
            assert relative(p.grad, grads[n], floor) <= FP32, n
        else:
            assert p.grad is None, n


@pytest.mark.parametrize("name", MODELS)
def test_lora_does_not_change_the_outputs_at_first(name: str) -> None:
    make, data = MODELS[name]
    eager = make().eval()
    opt = fxopt.optimize(make().eval(), "lora(rank=4)", inputs=data())
    mine, theirs = opt(**data()), eager(**data())
    for a, b in zip(torch.utils._pytree.tree_leaves(mine), torch.utils._pytree.tree_leaves(theirs), strict=True):
        assert torch.equal(a, b)


def test_a_copy_is_independent() -> None:
    make, data = MODELS["llama"]
    opt = fxopt.optimize(make(), fxopt.presets.finetune(rank=4), inputs=data())
    other = copy.deepcopy(opt)
    with torch.no_grad():
        for n, p in other.named_parameters():
            if "lora_B" in n:
                p.fill_(0.1)
    batch = data()
    assert not torch.equal(opt(**batch).loss, other(**batch).loss)
    assert torch.allclose(other(**batch).loss, other.model(**batch).loss, rtol=FP32)
    assert torch.allclose(opt(**batch).loss, make()(**batch).loss, rtol=FP32)
    assert sum(map(len, other.dispatcher.entries.values())) == 1
