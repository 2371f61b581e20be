"""The saved set: fewer bytes, nothing heavy or random computed twice, the same gradients."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.ir.edit import random
from fxopt.ir.partition import Split, heavy
from fxopt.kernels.tolerance import same
from tests.models import MODELS, loss_of


def splits(opt: fxopt.Optimized) -> list[Split]:
    return [c.split for r in opt.dispatcher.runners.values() for c in r.compiled.values()]


def trained(name: str, passes: str) -> tuple[fxopt.Optimized, dict[str, torch.Tensor]]:
    make, data = MODELS[name]
    model = make()
    opt = fxopt.optimize(model, passes)
    torch.manual_seed(0)
    loss_of(opt(**data())).backward()
    return opt, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_fewer_bytes_and_the_same_gradients(name: str) -> None:
    plain, expected = trained(name, "canonicalize")
    opt, found = trained(name, "canonicalize | remat")
    assert sum(s.saved_bytes for s in splits(opt)) < 0.8 * sum(s.saved_bytes for s in splits(plain))
    assert found.keys() == expected.keys()
    for key in found:  # dropout masks are saved, not drawn again: equal bit for bit
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_nothing_heavy_or_random_runs_twice(name: str) -> None:
    opt, _ = trained(name, "canonicalize | remat")
    again = [name for s in splits(opt) for name in s.recomputed]
    assert again, "nothing is recomputed at all"
    for s in splits(opt):
        forward = {n.name: n for n in s.forward.graph.nodes}
        for recomputed in s.recomputed:
            node = forward.get(recomputed)
            assert node is None or not (heavy(node) or random(node)), recomputed


def test_a_wrong_partitioner_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow random operations to be repeated, as torch's budgeted partitioner does: the gradients change."""
    _, expected = trained("gpt2", "canonicalize | remat")
    for ban in ("random", "heavy"):
        monkeypatch.setattr(f"fxopt.ir.partition.{ban}", lambda node: False)
    _, found = trained_without_check("gpt2", "canonicalize | remat")
    assert any(not same(found[k], expected[k]) for k in expected)


def trained_without_check(name: str, passes: str) -> tuple[fxopt.Optimized, dict[str, torch.Tensor]]:
    make, data = MODELS[name]
    model = make()
    opt = fxopt.optimize(model, passes, check=False)
    torch.manual_seed(0)
    loss_of(opt(**data())).backward()
    return opt, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
