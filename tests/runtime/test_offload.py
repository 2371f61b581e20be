"""Saved values that wait on the host: exact, planned as measured, two at a time. The host is a stand-in that keeps arrays, so that what is on
the "device" can be counted; `-m gpu` runs the same on a device with streams."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import fxopt
from fxopt.ir.facts import Budget
from fxopt.ir.offload import Offloaded
from fxopt.ir.partition import min_cut
from fxopt.kernels.tolerance import same
from fxopt.runtime import machine, offload
from fxopt.runtime.memory import Allocations
from fxopt.runtime.plan import Plan, Planned, Planner
from fxopt.runtime.saving import Always
from tests.models import MODELS, loss_of, llama, tokens

PLAIN = "canonicalize | causal | fuse | loss"
BIG = {"layers": 7, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 128}


class Elsewhere(offload.Host):
    """A host whose memory is no tensor's: what torch allocates is the device's. Copies are done at once, memory is let go as late as with streams."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.sent = self.fetched = 0

    def out(self, memory: Sequence[torch.Tensor]) -> list:
        self.settle()
        self.leaving.append((None, list(memory)))
        self.sent += sum(piece.nbytes for piece in memory)
        return [piece.numpy().copy() for piece in memory]

    def back(self, away: Sequence[np.ndarray]) -> tuple[None, list[torch.Tensor]]:
        found = [torch.empty(piece.shape, dtype=torch.uint8) for piece in away]
        for piece, source in zip(found, away):
            piece.numpy()[:] = source
        self.fetched += sum(piece.nbytes for piece in found)
        return None, found


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    made = Elsewhere(torch.device("cpu"))
    monkeypatch.setattr(offload, "_host", lambda device: made)
    monkeypatch.setattr(machine, "measured", lambda *_: dataclasses.replace(RATES, host=1e10))
    return made


RATES = machine.Machine({"float32": 1e11, "attention float32": 1e11}, 1e10, 1e11, 1e-6)


def step(opt: torch.nn.Module, data: dict) -> dict[str, torch.Tensor]:
    for parameter in opt.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    loss_of(opt(**data)).backward()
    return {name: p.grad.clone() for name, p in opt.named_parameters() if p.grad is not None}


def planned(opt: fxopt.Optimized) -> Plan:
    return opt.dispatcher.last.binding.saving.last


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_back_is_what_left(name: str, host: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)
    make, data = MODELS[name]
    opt = fxopt.optimize(make(), "canonicalize | fuse | loss | remat", check=False)
    expected = step(opt, data())
    for policy in (Offloaded(min_cut), Offloaded(min_cut, inputs=False)):
        opt.dispatcher.last.binding.saving = Always(policy)
        before = host.sent
        found = step(opt, data())
        assert host.sent > before and found.keys() == expected.keys()
        assert all(same(found[key], expected[key]) for key in expected)


def test_state_does_not_leave(host: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)
    opt = fxopt.optimize(llama(), f"{PLAIN} | remat", check=False)
    step(opt, tokens(2, 8))
    opt.dispatcher.last.binding.saving = Always(Offloaded(min_cut))
    owned = {p.untyped_storage().data_ptr() for p in opt.model.parameters()}
    left: set[int] = set()
    out = host.out
    monkeypatch.setattr(host, "out", lambda memory: (left.update(piece.untyped_storage().data_ptr() for piece in memory), out(memory))[1])
    step(opt, tokens(2, 8))
    assert left and not left & owned


def test_a_backward_may_run_twice_and_two_steps_may_interleave(host: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)
    opt = fxopt.optimize(llama(), f"{PLAIN} | remat", check=False)
    expected = [step(opt, tokens(2, 8, seed=seed)) for seed in (0, 1)]
    opt.dispatcher.last.binding.saving = Always(Offloaded(min_cut))
    opt.zero_grad(set_to_none=True)
    first, second = (loss_of(opt(**tokens(2, 8, seed=seed))) for seed in (0, 1))
    parameters = [p for p in opt.parameters() if p.requires_grad]
    for loss, wanted in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert all(same(g, wanted[name]) for g, (name, _) in zip(found, ((n, p) for n, p in opt.named_parameters() if p.requires_grad)))


@pytest.mark.slow  # 20 seconds: every level of every region is compiled
def test_the_plan_says_what_is_measured_and_needs_less_than_any_other(host: Elsewhere) -> None:
    data = tokens(8, 128)
    opt = fxopt.optimize(llama(**BIG), f"lora(rank=2) | {PLAIN} | memory(least)", check=False, inputs=data)
    expected = step(opt, data)
    at_least = planned(opt).peak.total
    binding = opt.dispatcher.last.binding
    shapes = tuple(tuple(tensor.shape) for tensor in opt.dispatcher.example.tensors)
    without = Planner(binding, Budget(None), machine=RATES).plan(shapes, (False,) * len(shapes))
    assert at_least < without.peak.total
    for budget in (None, int(at_least * 1.2)):
        binding.saving = Planned(Budget(budget))
        step(opt, data)
        found = step(opt, data)
        assert all(same(found[key], expected[key]) for key in expected)
        for parameter in opt.parameters():
            parameter.grad = None
        gc.collect()
        with Allocations() as allocations:
            loss_of(opt(**data)).backward()
        plan = planned(opt)
        above = plan.peak.total - sum(plan.peak.parts[part] for part in ("weights", "optimizer", "inputs"))
        assert abs(allocations.peak - above) <= 0.05 * allocations.peak, (budget, allocations.peak, above, str(plan))
        assert budget is None or plan.peak.total <= budget
        assert budget is not None or any(level.offloaded for level in plan.levels)


@pytest.mark.gpu
def test_on_a_device_with_memory_of_its_own() -> None:
    data = {name: value.cuda() for name, value in tokens(8, 128).items()}
    opt = fxopt.optimize(llama(**BIG).cuda(), f"lora(rank=2) | {PLAIN} | memory(least)", check=False, inputs=data)
    offloaded = step(opt, data)
    assert any(level.offloaded for level in planned(opt).levels)
    peaks = []
    for saving in (opt.dispatcher.last.binding.saving, Always(min_cut)):
        opt.dispatcher.last.binding.saving = saving
        step(opt, data)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found = step(opt, data)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
        assert all(same(found[key], offloaded[key]) for key in offloaded)
    assert peaks[0] < peaks[1]
