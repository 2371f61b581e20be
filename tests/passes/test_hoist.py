"""What no training changes, kept for each sample: equal values in any batch, found again, and dropped when weights change."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import fxopt
from fxopt.errors import PassError
from fxopt.kernels.tolerance import same
from fxopt.passes.hoist import Hoist
from fxopt.runtime.hoisting import Folder, Hoisting, Memory

WIDTH = 16


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.dropout = nn.LayerNorm(WIDTH), dropout

    def forward(self, x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)[:, None]
        key, value = self.kv(y).chunk(2, -1)
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), key, value, attn_mask=allowed)).squeeze(1)
        return F.dropout(x, self.dropout, self.training)


class Model(nn.Module):
    """Three blocks, of which the last is trained; `meet`: samples see each other in front of them."""

    def __init__(self, dropout: float = 0.0, meet: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.head = nn.Embedding(50, WIDTH), nn.ModuleList(Block(dropout) for _ in range(3)), nn.Linear(WIDTH, 50)
        self.meet = meet
        for part in (self.embed, *self.blocks[:2]):
            part.requires_grad_(False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.meet:
            x = x - x.mean(0, keepdim=True)
        for block in self.blocks:
            x = block(x, mask[:, None, None, :].bool())
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def samples(number: int, length: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(0, 50, (number, length), generator=generator) for _ in range(2))
    mask = torch.arange(length)[None] < torch.randint(2, length + 1, (number, 1), generator=generator)
    return {"ids": ids, "mask": mask.long(), "labels": labels}


def some(data: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: value[rows] for name, value in data.items()}


@functools.cache
def compiled() -> fxopt.Optimized:
    return fxopt.optimize(Model(), "canonicalize | fuse | loss | hoist | remat | dead_code", inputs=some(samples(4), [0, 1, 2, 3]), check=False)


def made(text: str = "hoist", **kind: Any) -> fxopt.Optimized:
    """Most tests share one capture: a copy of it has its own store."""
    if text == "hoist" and not kind:
        return copy.deepcopy(compiled())
    return fxopt.optimize(Model(**kind), f"canonicalize | {text}", inputs=some(samples(4), [0, 1, 2, 3]), check=False)


def store(opt: fxopt.Optimized) -> Hoisting:
    opt.plan(some(samples(4), [0, 1, 2, 3]))  # binds it
    return opt.dispatcher.last.binding.hoisting


def equal(opt: fxopt.Optimized, plain: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    loss, expected = opt(**batch), plain(**batch)
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    grads, wanted = (torch.autograd.grad(x, [model.get_parameter(name) for name in names]) for x, model in ((loss, opt.model), (expected, plain)))
    assert same(loss, expected)
    total = max(float(g.norm()) for g in wanted)
    assert all(same(a, b) or float(b.norm()) < torch.finfo(b.dtype).eps * 100 * total for a, b in zip(grads, wanted, strict=True))


def test_epochs_in_any_order_and_batches_of_any_size() -> None:
    opt, data = made(), samples(9)
    plain = copy.deepcopy(opt.model)
    for block in plain.blocks:
        block.__dict__.pop("forward", None)
    found = store(opt)
    assert [opt.dispatcher.last.binding.steps[at][0].path for at in sorted(found.skipped)][-2:] == ["blocks.0", "blocks.1"]
    for rows in ([0, 1, 2, 3], [4, 5, 6], [7, 8]):
        equal(opt, plain, some(data, rows))
    assert (found.hits, found.misses) == (0, 9)
    for rows in ([8, 0], [3, 3, 5, 1], [2, 7, 6, 4]):
        equal(opt, plain, some(data, rows))
    assert (found.hits, found.misses) == (10, 9)
    longer = samples(3, 9)
    longer["ids"][:, :7] = data["ids"][:3]
    equal(opt, plain, longer)
    assert found.misses == 12 and "samples found 10, computed 12" in opt.report


def test_a_sample_whose_mask_differs_is_another_one() -> None:
    opt, data = made(), samples(4)
    found = store(opt)
    opt(**data)
    opt(**(data | {"mask": data["mask"].roll(1, 0)}))
    changed = int((data["mask"] != data["mask"].roll(1, 0)).any(1).sum())
    assert found.misses == 4 + changed and found.hits == 4 - changed


def test_changed_weights_drop_what_was_kept(caplog: pytest.LogCaptureFixture) -> None:
    opt, data = made(), samples(4)
    found = store(opt)
    before = opt(**data)
    with torch.no_grad():
        opt.model.blocks[0].out.weight.mul_(2.0)
    after = opt(**data)
    assert found.dropped == 1 and found.misses == 8 and "weights in front of the trained layers changed" in caplog.text
    assert not same(before, after)
    with torch.no_grad():
        opt.model.blocks[2].out.weight.mul_(2.0)  # trained: behind what is kept
    opt(**data)
    assert found.dropped == 1 and found.hits == 4


def test_a_wrong_key_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    opt, data = made(), samples(4)
    expected = opt(**data)
    monkeypatch.setattr(Hoisting, "_keys", lambda self, tensors, batch: ["one"] * batch)
    assert not same(opt(**data), expected)


@pytest.mark.parametrize(("kind", "why"), [({"dropout": 0.1}, "no region with products depends on frozen state alone"), ({"meet": True}, "samples meet in")])
def test_what_cannot_be_kept_is_said(kind: dict[str, Any], why: str) -> None:
    opt = made("fuse | hoist", **kind)
    found = store(opt)
    assert (not found.values or all("blocks" not in str(opt.dispatcher.last.binding.steps[at][0].path) for at in found.skipped)) and why in opt.report


def test_hooks_on_a_region_that_would_be_left_out_run() -> None:
    opt, data = made(), samples(4)
    found, seen = store(opt), []
    opt.model.blocks[0].register_forward_hook(lambda *given: seen.append(1))
    opt(**data)
    assert seen == [1] and found.bypassed == 1 and found.misses == 0


def test_on_disk_for_another_run(tmp_path: Path) -> None:
    text = f'hoist(folder="{tmp_path}")'
    first = made(text)
    second = copy.deepcopy(first)  # another run, as far as what is kept goes
    data = samples(5)
    loss = first(**data)
    found = store(second)
    assert same(second(**data), loss) and (found.hits, found.misses) == (5, 0)
    with torch.no_grad():
        second.model.blocks[0].out.weight.mul_(2.0)
    second(**data)
    assert (found.misses, found.dropped) == (5, 1) and len(list(tmp_path.iterdir())) == 2
    with torch.no_grad():
        second.model.blocks[0].out.weight.mul_(0.5)
    second(**data)
    assert found.hits == 10  # what was kept for these weights is there still


@pytest.mark.parametrize("kind", [Memory, Folder])
def test_bytes_stay_within_the_limit(kind: type, tmp_path: Path) -> None:
    values = {str(n): (torch.full((64,), float(n)),) for n in range(6)}
    one = values["0"][0].nbytes + (96 if kind is Folder else 0)  # a file has a header
    found = Memory(3 * one) if kind is Memory else Folder(tmp_path, 3 * one + 60)
    for key, value in values.items():
        found.put(key, value)
        assert found.get("0", torch.device("cpu")) is not None or int(key) > 4  # used again and again: it stays
        assert found.held <= found.limit + (96 if kind is Folder else 0)
    assert found.get("1", torch.device("cpu")) is None and found.get("5", torch.device("cpu"))[0][0] == 5.0
    found.put("large", (torch.zeros(10_000),))
    assert found.get("large", torch.device("cpu")) is None


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(PassError, match="above 0"):
        Hoist(limit=0)
