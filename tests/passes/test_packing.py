"""Masks of packed documents: which become packed attention, which must not, and that models compute what they did."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mask_truth import check_formula
from captured import FAMILIES, Captured, data, function, weight

import fxopt
from fxopt.errors import CheckError
from fxopt.ir import meta
from fxopt.ir.edit import Edit
from fxopt.ir.program import Assumption, AtMost
from fxopt.kernels.tolerance import SELF_CHECK
from fxopt.passes import packing, verify
from fxopt.passes.causal import Causal

IDS = torch.tensor([[1, 1, 2, 2, 2, 3], [4, 4, 0, 1, 1, 4]])
POSITIONS = torch.tensor([[0, 1, 0, 1, 2, 0], [3, 4, 5, 0, 1, 0]])  # restarts are where documents begin
PAD = torch.ones(2, 6, dtype=torch.int64)


def le(x):
    """Causal [length, length]."""
    positions = torch.arange(x.shape[1])
    return positions[None, :] <= positions[:, None]


def same(ids):
    return ids[:, None, :, None] == ids[:, None, None, :]


def runs_of(positions):
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


# -- masks by hand: of x [batch, length, width], ids, positions and pad [batch, length] ---------------------------------


def documents(x, ids, positions, pad):
    return le(x) & same(ids)


def both_ways(x, ids, positions, pad):
    return same(ids)


def added(x, ids, positions, pad):
    lowest = torch.finfo(torch.float32).min
    return torch.where(le(x), 0.0, lowest) + torch.where(same(ids), 0.0, lowest)


def differing(x, ids, positions, pad):
    return ~((ids[:, None, :, None] != ids[:, None, None, :]) | ~le(x))


def difference_of_zero(x, ids, positions, pad):
    return le(x) & ((ids[:, None, :, None] - ids[:, None, None, :]) == 0)


def squeezed(x, ids, positions, pad):
    return le(x) & (ids[:, :, None] == ids[:, None, :])[:, None]


def restarts(x, ids, positions, pad):
    return le(x) & same((positions == 0).cumsum(-1))


def runs(x, ids, positions, pad):
    return le(x) & same(runs_of(positions))


def runs_by_position(x, ids, positions, pad):
    return same(runs_of(positions)) & (positions[:, None, None, :] <= positions[:, None, :, None])


def padded(x, ids, positions, pad):
    return le(x) & same(ids) & pad[:, None, None, :].bool()


def chunks(x, ids, positions, pad):
    chunk = torch.arange(x.shape[1]) // 2
    return le(x) & (chunk[:, None] == chunk[None, :])


def first_row(x, ids, positions, pad):
    return le(x) & (ids[0][:, None] == ids[0][None, :])


def transposed(x, ids, positions, pad):
    turned = ids.t() * 1
    return le(x) & (turned.t()[:, None, :, None] == turned.t()[:, None, None, :])


def large(x, ids, positions, pad):
    return same(ids > 1)


def zero_or_not(x, ids, positions, pad):
    return same(ids != 0)


def numbers_of_flags(x, ids, positions, pad):
    return same(ids.bool().long())


def narrowed(x, ids, positions, pad):
    return le(x) & same((ids * 256).to(torch.uint8))


def wrapped(x, ids, positions, pad):
    high = ids.to(torch.uint8) * 128
    return le(x) & same(high + high)


def wide_window(x, ids, positions, pad):
    return runs_by_position(x, ids, positions, pad) & (positions[:, None, None, :] > positions[:, None, :, None] - 7)


def two_numbers(x, ids, positions, pad):
    return le(x) & same(ids) & same(positions // 2)


def not_before(x, ids, positions, pad):
    return le(x) & (ids[:, None, None, :] <= ids[:, None, :, None])


def next_document(x, ids, positions, pad):
    return le(x) & (ids[:, None, :, None] == ids[:, None, None, :] + 1)


def shifted(x, ids, positions, pad):
    later = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    return le(x) & (ids[:, None, :, None] == later[:, None, None, :])


def other_positions(x, ids, positions, pad):
    return same(ids) & (positions[:, None, None, :] <= positions[:, None, :, None])


def steps_of_two(x, ids, positions, pad):
    steps = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 2).cumsum(-1)
    return same(steps) & (positions[:, None, None, :] <= positions[:, None, :, None])


def steps_of_another(x, ids, positions, pad):
    return same(runs_of(ids)) & (positions[:, None, None, :] <= positions[:, None, :, None])


def steps_over_rows(x, ids, positions, pad):
    steps = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(0)
    return same(steps) & (positions[:, None, None, :] <= positions[:, None, :, None])


def without_itself(x, ids, positions, pad):
    positions = torch.arange(x.shape[1])
    return (positions[None, :] < positions[:, None]) & same(ids)


def window(x, ids, positions, pad):
    return runs_by_position(x, ids, positions, pad) & (positions[:, None, None, :] > positions[:, None, :, None] - 2)


def by_head(x, ids, positions, pad):
    return le(x) & (ids[None, :, :, None] == ids[None, :, None, :])


def computed_padding(x, ids, positions, pad):
    return same(ids) & ((positions + 1) * (pad + 1))[:, None, None, :].bool()


def others(x, ids, positions, pad):
    return ~same(ids)


PACKED = [documents, both_ways, added, differing, difference_of_zero, squeezed, restarts, runs, runs_by_position, padded, chunks, first_row, transposed,
          narrowed, wrapped, wide_window]
NOT = [two_numbers, not_before, next_document, shifted, other_positions, steps_of_two, steps_of_another, steps_over_rows, without_itself, window, by_head,
       others, computed_padding, large, zero_or_not, numbers_of_flags]


@functools.cache
def attention(mask, **options) -> Captured:
    """One attention under a mask, in canonical form."""
    def fn(x, ids, positions, pad, w):
        q = k = v = (x @ w).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(x, ids, positions, pad), **options).transpose(1, 2).reshape(x.shape)

    return function(fn, data(2, 6, 8), IDS, POSITIONS, PAD, w=weight(8, 8)).after("canonicalize")


def square(node) -> bool:
    """Whether a node's value is as large as the mask."""
    val = meta.tensor(node)
    return val is not None and val.dim() > 1 and not isinstance(val.shape[-1], int) and meta.same_size(val.shape[-1], val.shape[-2])


@pytest.mark.parametrize("mask", PACKED, ids=lambda fn: fn.__name__)
def test_masks_of_documents(mask) -> None:
    before = attention(mask)
    assert any(map(square, before.program.nodes))
    after = before.check(Causal())
    assert after.rules == {"packed mask": 1} and not after.misses
    (node,) = after.calls("packed_attention")
    assert node.args[5] is (mask is not both_ways) and len(meta.tensor(node.args[3]).shape) == 2
    assert after.program.assumptions == {padded: (Assumption("tensors_3"),), wide_window: (AtMost("tensors_0", 1, 7),)}.get(mask, ())
    left = after.after("dead_code")
    assert not left.calls("scaled_dot_product_attention") and not [node for node in left.program.nodes if square(node)]


@pytest.mark.parametrize("mask", NOT, ids=lambda fn: fn.__name__)
def test_other_masks_stay(mask) -> None:
    after = attention(mask).check(Causal())
    assert not after.rules and len(after.misses) == 1 and not after.program.assumptions
    assert not after.calls("packed_attention")


@pytest.mark.parametrize("mask", [*PACKED, *NOT], ids=lambda fn: fn.__name__)
def test_formulas_are_the_masks(mask) -> None:
    if mask is by_head:  # two heads, which the check has not
        return
    generator = torch.Generator().manual_seed(3)
    x, ids, positions, pad = (torch.randn(2, 6, 8), *(torch.randint(0, 3, (2, 6), generator=generator) for _ in range(3)))
    check_formula(attention(mask), {f"tensors_{i}": value for i, value in enumerate((x, ids, positions, pad))}, mask(x, ids, positions, pad))


def test_misses_say_why() -> None:
    assert attention(window).after(Causal()).misses == ["within documents the mask is neither causal nor full: q - k >= 0 and k - q >= -1"]
    assert attention(other_positions).after(Causal()).misses == ["within documents the mask depends on the values of tensors_2"]
    assert attention(two_numbers).after(Causal()).misses[0].startswith("within documents the mask depends on the values of ")
    assert attention(padded).after(Causal(assume=False)).misses == ["within documents the mask depends on the values of tensors_3"]
    assert attention(by_head).after(Causal()).misses == ["`tensors_1` does not hold one segment for each token"]
    assert attention(documents, dropout_p=0.25).after(Causal()).misses == [
        "the attention drops out with probability 0.25, and packed attention has no dropout"]


def test_any_segments_and_lengths_give_what_they_gave() -> None:
    """The program is made once, for some documents; it is right for others, of other lengths."""
    for mask in (documents, both_ways, runs_by_position):
        before = attention(mask)
        after = before.after(Causal())
        generator = torch.Generator().manual_seed(0)
        for batch, length in ((2, 6), (3, 9), (2, 17)):
            ids = torch.randint(-1, 3, (batch, length), generator=generator)
            positions = torch.arange(length) - (torch.rand(batch, length, generator=generator) < 0.3).mul(torch.arange(length)).cummax(1).values
            inputs = (data(batch, length, 8, seed=length), ids, positions, torch.ones_like(ids))
            verify.check(Causal(), before.program, after.program, inputs, before.state)


def test_options_and_grouped_heads_are_kept() -> None:
    def fn(x, ids, w, v):
        q = (x @ w).view(x.shape[0], x.shape[1], 4, 2).transpose(1, 2)
        k = (x @ v).view(x.shape[0], x.shape[1], 2, 2).transpose(1, 2)
        k = k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=same(ids), scale=0.3)

    after = function(fn, data(2, 6, 8), IDS, w=weight(8, 8), v=weight(8, 4)).after("canonicalize").check(Causal())
    (node,) = after.calls("packed_attention")
    assert node.args[4] == 0.3 and meta.tensor(node.args[1]).shape[1] == 2 and node.args[3].name == "tensors_1"


def test_ids_that_are_written_later_are_left_alone() -> None:
    def fn(x, ids, w):
        mask = same(ids)
        ids.add_(torch.arange(x.shape[1]))
        q = (x @ w).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    after = function(fn, data(2, 6, 8), IDS, w=weight(8, 8)).after("canonicalize").check(Causal())
    assert after.calls("packed_attention") == [] and "written in place" in after.misses[0]


def test_lengths_that_may_differ_are_not_packed() -> None:
    def fn(x, ids, memory, memory_ids, w):
        q, kv = ((t @ w).view(t.shape[0], t.shape[1], 2, 4).transpose(1, 2) for t in (x, memory))
        return F.scaled_dot_product_attention(q, kv, kv, attn_mask=ids[:, None, :, None] == memory_ids[:, None, None, :])

    after = function(fn, data(2, 6, 8), IDS, data(2, 9, 8), torch.ones(2, 9, dtype=torch.int64), w=weight(8, 8)).after("canonicalize").check(Causal())
    assert not after.rules and "depends on the values of tensors_1, tensors_3" in after.misses[0]


def test_segments_of_another_order_would_show(monkeypatch) -> None:
    """The planted fault: rows and tokens of the segments are mixed up."""
    right = packing._rows

    def wrong(edit: Edit, *given):
        node = right(edit, *given)
        return edit.call(torch.ops.aten.flip.default, (node, [1]), like=node, before=node.next)

    monkeypatch.setattr(packing, "_rows", wrong)
    with pytest.raises(CheckError, match="differs"):
        attention(documents).check(Causal())


# -- models ------------------------------------------------------------------------------------------------------------

LENGTHS = (5, 1, 7, 3)


def relative(mine: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0) -> float:
    return float((mine.double() - theirs.double()).norm()) / max(float(theirs.double().norm()), floor)


def assert_same_step(mine: tuple[torch.Tensor, list[torch.Tensor]], theirs: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Loss and all gradients, to what the self-check of a capture allows in fp32."""
    floor = max(float(grad.norm()) for grad in theirs[1]) * 1e-3
    assert relative(mine[0].detach(), theirs[0].detach()) <= SELF_CHECK[torch.float32]
    assert max(relative(a, b, floor) for a, b in zip(mine[1], theirs[1], strict=True)) <= SELF_CHECK[torch.float32]


def gradients(model: nn.Module, loss: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss, [p.grad.clone() for p in model.parameters()]


@dataclasses.dataclass
class Packed:
    """A packed row [1, tokens], and its documents."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...]) -> Packed:
        ids = torch.randint(3, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return cls(ids, ids.masked_fill(positions == 0, -100), positions)  # the first token of a document is nobody's next one

    def documents(self, lengths: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.ids.split(lengths, 1), self.labels.split(lengths, 1), strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_causal_language_models(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name](2).train()
    eager = copy.deepcopy(model)
    opt = fxopt.optimize(model)
    for lengths in (LENGTHS, (12,)):
        packed = Packed.of(lengths)
        call = {"input_ids": packed.ids, "position_ids": packed.positions, "labels": packed.labels}
        mine = gradients(model, opt(**call).loss)
        assert_same_step(mine, gradients(eager, eager(**call).loss))
        each = [eager(input_ids=ids, labels=labels) for ids, labels in packed.documents(lengths) if ids.shape[1] > 1]
        counts = [length - 1 for length in lengths if length > 1]
        apart = sum(out.loss * count for out, count in zip(each, counts, strict=True)) / sum(counts)
        assert_same_step(mine, gradients(eager, apart))
    (entries,) = opt.dispatcher.entries.values()
    assert len(entries) == 1, "other documents were captured again"
    assert "packed mask (causal.py" in opt.report and "): 2 times" in next(line for line in opt.report.splitlines() if "packed mask" in line)


class Encoder(nn.Module):
    """Looks both ways within documents."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(97, 16), nn.Linear(16, 48), nn.Linear(16, 97)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).view(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mask = (document[:, :, None] == document[:, None, :])[:, None]
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)
        return F.cross_entropy(self.out(x).flatten(0, 1), labels.flatten(), reduction="sum")


def test_an_encoder() -> None:
    torch.manual_seed(0)
    model = Encoder()
    eager = copy.deepcopy(model)
    opt = fxopt.optimize(model)
    packed = Packed.of(LENGTHS)
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None]
    mine = gradients(model, opt(packed.ids, packed.labels, document))
    assert_same_step(mine, gradients(eager, eager(packed.ids, packed.labels, document)))
    apart = sum(eager(ids, labels, torch.zeros_like(ids)) for ids, labels in packed.documents(LENGTHS))
    assert_same_step(mine, gradients(eager, apart))
    assert "packed mask (causal.py" in opt.report
