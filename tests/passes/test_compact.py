"""Rows whose label is ignored, left out behind the last attention: the same loss, gradients and returned logits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from padded import Tokens, batch, here, padded_labels, program_of, right, shifted

import fxopt
from fxopt.errors import CheckError
from fxopt.ir.program import Program, Sample
from fxopt.kernels.live_attention import OVERLOAD as ATTENTION
from fxopt.kernels.live_rows import OVERLOAD
from fxopt.kernels.tolerance import same
from fxopt.passes import compact as compacts, verify
from fxopt.passes.compact import Compact
from fxopt.passes.pack import Pack
from fxopt.passes.pipeline import apply, run
from tests.models import handwritten, llama, pairs, tokens


def only_loss(model: Tokens, loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return loss


def with_logits(model: Tokens, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = F.linear(x, model.embed.weight)
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)), logits


class Deep(Tokens):
    """An MLP behind the last attention."""

    def __init__(self, head: Callable[..., torch.Tensor], returns: Callable[..., Any] = only_loss, **changes: Any) -> None:
        super().__init__(lambda model, x, mask, labels: head(model, model.deepen(x), mask, labels), returns=returns, **changes)
        self.up, self.down = nn.Linear(16, 32).double(), nn.Linear(32, 16).double()

    def deepen(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Separate(nn.Module):
    """Queries, keys and values from products of their own; fewer heads of keys, which have no bias (its gradient would be rounding alone); `mask` false:
    causal by the attention's own argument."""

    def __init__(self, causal: bool, mask: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.q, self.k, self.v = nn.Embedding(97, 16), nn.Linear(16, 16), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)
        self.out, self.norm, self.causal, self.mask = nn.Linear(16, 16), nn.LayerNorm(16), causal, mask
        self.double()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows, length = ids.shape
        x = self.embed(ids)
        q, k, v = (part(x).view(rows, length, -1, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        allowed = mask[:, None, None, :].bool()
        if self.causal:
            allowed = allowed & (torch.arange(length)[None] <= torch.arange(length)[:, None])
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed if self.mask else None, is_causal=self.causal and not self.mask, enable_gqa=True)
                         .transpose(1, 2).reshape(rows, length, 16))
        return F.cross_entropy(F.linear(self.norm(x), self.embed.weight).view(-1, 97), labels.view(-1))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "shifted": lambda: Deep(shifted), "padded labels": lambda: Deep(padded_labels), "both ways": lambda: Deep(here, causal=False),
    "with logits": lambda: Deep(with_logits), "queries": lambda: Separate(True), "queries, both ways": lambda: Separate(False),
    "queries, no mask": lambda: Separate(True, mask=False),
}


@functools.cache
def programs(kind: str, packed: bool = False) -> tuple[nn.Module, Program, Program]:
    model = KINDS[kind]()
    before = program_of(model)
    between = apply(Pack(4), before) if packed else before
    return model, before, apply(Compact(4), between)


def compare(kind: str, tensors: tuple[torch.Tensor, ...], packed: bool = False) -> None:
    model, before, after = programs(kind, packed)
    assert after.log[-1].rewrites, after.log[-1]
    assert any(node.target is ATTENTION for node in after.nodes) == ("queries" in kind)
    state = dict(model.named_parameters())
    found = []
    for program in (before, after):
        outputs = program.run(tensors, state)
        found.append((outputs, torch.autograd.grad(outputs[0], list(state.values()), allow_unused=True)))
    (outputs, grads), (compacted, compacted_grads) = found
    assert same(compacted[0].nan_to_num(), outputs[0].nan_to_num()) and bool(compacted[0].isnan()) == bool(outputs[0].isnan())
    for a, b in zip(compacted[1:], outputs[1:], strict=True):
        assert same(a if not packed else a[tensors[1] != 0], b if not packed else b[tensors[1] != 0])
    for name, a, b in zip(state, compacted_grads, grads, strict=True):
        a, b = (torch.zeros_like(state[name]) if grad is None else grad for grad in (a, b))
        assert same(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()), name


LABELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all": lambda labels: labels, "none": lambda labels: torch.full_like(labels, -100),
    "one": lambda labels: torch.full_like(labels, -100).index_put((torch.tensor(1), torch.tensor(2)), labels[1, 2]),
    "last turn": lambda labels: labels.masked_fill(torch.arange(labels.shape[1]) < labels.shape[1] - 2, -100),
    "some": lambda labels: labels.masked_fill(torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.7, -100),
}


CASES = [(kind, packed) for kind in KINDS for packed in (False, True) if not (packed and kind == "queries, no mask")]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(("kind", "packed"), CASES)
def test_loss_and_gradients(kind: str, labels: str, packed: bool) -> None:
    ids, mask, target = batch(4, 6, right([6, 4, 1, 0], 6) if packed else None)
    compare(kind, (ids, mask, LABELS[labels](target).masked_fill(mask == 0, -100)), packed)


@settings(max_examples=10, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_random_labels(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    ids, mask, target = batch(rows, length, seed=data.draw(st.integers(0, 99)))
    drop = torch.rand(target.shape, generator=torch.Generator().manual_seed(length)) < data.draw(st.sampled_from((0.0, 0.5, 0.9, 1.0)))
    kind, packed = data.draw(st.sampled_from(CASES))
    compare(kind, (ids, mask, target.masked_fill(drop, -100)), packed)


@pytest.mark.parametrize("kind", ["shifted", "padded labels"])
def test_only_rows_that_count_are_computed(kind: str) -> None:
    """The projection of the last attention and the MLP see as many rows as count, rounded up; the layers before all."""
    model, _, after = programs(kind)
    ids, mask, target = batch(4, 9)
    target[:, :7] = -100
    seen: dict[str, int] = {}

    def see(node: torch.fx.Node, value: object, env: object) -> None:
        if node.target is torch.ops.aten.linear.default and isinstance(value, torch.Tensor):
            seen[str(node.args[1])] = value.shape[:-1].numel()

    after.watch(Sample((ids, mask, target), dict(model.named_parameters())), see)
    assert seen == {"qkv_0_weight": 36, "out_0_weight": 36, "qkv_1_weight": 36, "out_1_weight": 8, "up_weight": 8, "down_weight": 8}


def rows_of(program: Program, model: nn.Module, tensors: tuple[torch.Tensor, ...]) -> dict[str, int]:
    """For each weight of a linear layer, how many rows it is multiplied with."""
    seen: dict[str, int] = {}

    def see(node: torch.fx.Node, value: object, env: object) -> None:
        if node.target is torch.ops.aten.linear.default and isinstance(value, torch.Tensor):
            seen[str(node.args[1].target)] = value.shape[:-1].numel()

    program.watch(Sample(tensors, dict(model.named_parameters())), see)
    return seen


@pytest.mark.parametrize("kind", ["queries", "queries, both ways", "queries, no mask"])
def test_queries_are_those_of_rows_that_count(kind: str) -> None:
    model, _, after = programs(kind)
    ids, mask, target = batch(4, 9)
    target[:, :7] = -100
    assert rows_of(after, model, (ids, mask, target)) == {"q.weight": 8, "k.weight": 36, "v.weight": 36, "out.weight": 8}


@pytest.mark.parametrize("passes", ["compact", pytest.param("pack | compact", marks=pytest.mark.slow)])
def test_queries_rotated_together_with_keys(passes: str) -> None:
    """A rotation of both becomes one of each; through regions and in packed rows too. Returned logits are computed for all rows when they are read."""
    model = llama(layers=1)
    plain = copy.deepcopy(model)
    data = tokens(3, 12, ignored=0.7)
    opt = fxopt.optimize(model, f"canonicalize | causal(assume=false) | fuse | loss | {passes} | remat | dead_code", check=False)
    found, expected = opt(**data), plain(**data)
    found.loss.backward()
    expected.loss.backward()
    assert sum(node.target is ATTENTION for node in opt.program.nodes) == 1
    assert all(same(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert same(found.logits + 0, expected.logits)
    assert not any("attention" in str(node.target) and node.target is not ATTENTION for region in opt.dispatcher.last.schedule.regions for node in region.graph.nodes)


def test_queries_whose_product_makes_keys_too_stay() -> None:
    record = programs("both ways")[2].log[-1]
    assert any("queries" in miss.rule and "also reads it" in miss.reason for miss in record.misses), record.misses


def test_states_that_are_returned_end_it() -> None:
    record = apply(Compact(), program_of(Tokens(shifted))).log[-1]
    assert not record.rewrites and "also reads it" in record.misses[0].reason and record.misses[0].source


def test_a_loss_of_each_row_is_left() -> None:
    def each(model: Tokens, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (F.cross_entropy(F.linear(x, model.embed.weight).flatten(0, 1), labels.flatten(), reduction="none") ** 2).mean()

    record = apply(Compact(), program_of(Deep(each))).log[-1]
    assert not record.rewrites and "a loss of each row" in record.misses[0].reason


def test_sequences_cut_at_a_length_are_left() -> None:
    def beginning(model: Tokens, x: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x[:, :5], model.embed.weight).flatten(0, 1), labels[:, :5].flatten())

    record = apply(Compact(), program_of(Deep(beginning))).log[-1]
    assert not record.rewrites and "the number of rows is fixed" in record.misses[0].reason


def test_mixing_behind_the_attention_ends_it() -> None:
    record = apply(Compact(), program_of(Deep(here, mix=lambda x: x.cumsum(1)))).log[-1]
    assert record.rewrites and "cumsum_1" in record.notes[0]  # the MLP and the norm are behind it


def test_regions_and_logits_read_late() -> None:
    """A model that returns (logits, loss): the logits are computed for all rows, when they are read."""
    model = handwritten()
    plain = copy.deepcopy(model)
    opt = fxopt.optimize(model, "canonicalize | causal | fuse | loss | compact | remat | dead_code")
    for rows, length in ((3, 9), (4, 6)):
        data = pairs(rows, length, seed=rows)
        (logits, loss), (expected, expected_loss) = opt(**data), plain(**data)
        loss.backward()
        expected_loss.backward()
        assert same(loss, expected_loss) and same(logits + 0, expected)
    for (key, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert same(a.grad, b.grad), key
    assert any(node.target is OVERLOAD for node in opt.program.nodes)


def test_a_wrong_choice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows gathered one place further on."""
    model = Deep(shifted).float()
    before = program_of(model)
    inputs, state = batch(3, 7), dict(model.named_parameters())
    assert "values compared: " in verify.check(Compact(4), before, apply(Compact(4), before), inputs, state)
    original = compacts.Space._index

    def late(self: compacts.Space, node: torch.fx.Node, layout: Any, at: torch.fx.Node) -> torch.fx.Node:
        found = original(self, node, layout, at)
        return found if node.op == "placeholder" else self.edit.call(torch.ops.aten.flip.default, (found, [0]), like=node, before=at)

    monkeypatch.setattr(compacts.Space, "_index", late)
    monkeypatch.setattr(compacts.Space, "target", lambda self, node, layout, ignored, at: self.edit.call(
        torch.ops.aten.index_select.default, (node, 0, original(self, node, layout, at)), like=node, before=at))
    with pytest.raises(CheckError):
        verify.check(Compact(4), before, apply(Compact(4), before), inputs, state)


def test_both_in_one_pipeline_say_what_they_did() -> None:
    model = Deep(padded_labels)
    after = run("pack | compact", program_of(model))
    assert [len(record.rewrites) for record in after.log[-2:]] == [2, 1]
    assert sum(node.target is OVERLOAD for node in after.nodes) == 2
