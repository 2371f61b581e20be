"""Padded batches as one row of tokens: the same loss and gradients on any mask, and refused where rows do not stay apart."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import fxopt
from fxopt.errors import CheckError
from fxopt.ir.capture import Call, capture
from fxopt.ir.program import Program, Sample
from fxopt.ir.rows import Layout
from fxopt.kernels.live_rows import OVERLOAD
from fxopt.kernels.tolerance import same
from fxopt.passes import pack as packs, verify
from fxopt.passes.compact import Compact
from fxopt.passes.pack import Pack
from fxopt.passes.pipeline import apply, run
from padded import Tokens, batch, first_token, here, masked_mean, padded_labels, plain_mean, program_of, right, shifted
from tests.models import MODELS, bert, gpt2, llama

KINDS: dict[str, Callable[[], nn.Module]] = {
    "shifted": lambda: Tokens(shifted), "padded labels": lambda: Tokens(padded_labels), "both ways": lambda: Tokens(here, causal=False),
    "first token": lambda: Tokens(first_token, causal=False), "masked mean": lambda: Tokens(masked_mean, causal=False), "added mask": lambda: Tokens(shifted, added=True),
}
PER_TOKEN = ("shifted", "padded labels", "both ways", "added mask")


@functools.cache
def programs(kind: str) -> tuple[nn.Module, Program, Program]:
    """The model, its program, and the same after `pack`."""
    model = KINDS[kind]()
    before = program_of(model)
    return model, before, apply(Pack(4), before)


MASKS = {
    "none": torch.ones(3, 6, dtype=torch.int64), "one token": right([1, 0, 0], 5), "an empty document": right([4, 0, 2], 5), "length 1": right([1, 1, 1], 1),
    "right": right([1, 6, 3, 2], 6), "left": right([1, 6, 3, 2], 6).flip(1), "all padding": right([0, 0], 4), "holes": torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]]),
}


def compare(kind: str, tensors: tuple[torch.Tensor, ...]) -> None:
    model, before, after = programs(kind)
    state = dict(model.named_parameters())
    found = []
    for program in (before, after):
        loss, states = program.run(tensors, state)
        found.append((loss.detach(), states.detach(), torch.autograd.grad(loss, list(state.values()), allow_unused=True)))
    (loss, states, grads), (packed_loss, packed_states, packed_grads) = found
    live = tensors[1] != 0
    assert same(packed_loss.nan_to_num(), loss.nan_to_num()) and bool(packed_loss.isnan()) == bool(loss.isnan())
    assert same(packed_states[live], states[live])
    if kind == "masked mean":
        assert not packed_states[~live].any()  # nothing reads padding: it is zero
    for name, a, b in zip(state, packed_grads, grads, strict=True):
        a, b = (torch.zeros_like(state[name]) if grad is None else grad for grad in (a, b))
        assert same(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()), name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind: str, mask: str) -> None:
    if mask in ("left", "holes", "all padding", "one token", "an empty document") and (kind, mask) in REFUSED:
        with pytest.raises(CheckError, match="a token of padding is read"):
            compare(kind, batch(*MASKS[mask].shape, MASKS[mask]))
        return
    compare(kind, batch(*MASKS[mask].shape, MASKS[mask]))


# a label before the first token counts in a shifted loss: that row sees no key, for which an added mask gives the mean of all keys; in a
# mask with holes it sees keys; and the first token is padding that sees others
REFUSED = {("added mask", "left"), ("added mask", "holes"), ("shifted", "holes"), ("padded labels", "holes"), ("first token", "left"), ("first token", "holes")}


@pytest.mark.parametrize("kind", PER_TOKEN)
@pytest.mark.parametrize("kept", ["last turn", "nothing"])
def test_few_labels(kind: str, kept: str) -> None:
    ids, mask, labels = batch(4, 8, right([8, 5, 3, 1], 8))
    last = torch.zeros_like(mask)
    if kept == "last turn":
        for row, length in enumerate((8, 5, 3, 1)):
            last[row, max(0, length - 2): length] = 1
    compare(kind, (ids, mask, labels.masked_fill(last == 0, -100)))


# what a model returns, and the same of the mask: True where a row is live
RETURNED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "cut at the end": (lambda x: x[:, :-1], lambda live: live[:, :-1]), "cut at the start": (lambda x: x[:, 2:], lambda live: live[:, 2:]),
    "flat": (lambda x: x.reshape(-1, x.shape[-1]), lambda live: live.flatten()), "cut and flat": (lambda x: x[:, 1:].flatten(0, 1), lambda live: live[:, 1:].flatten()),
    "heads first": (lambda x: x.unflatten(-1, (2, -1)).transpose(1, 2), lambda live: live[:, None].expand(-1, 2, -1)),
    "tokens first": (lambda x: x.transpose(0, 1), lambda live: live.t()), "a number each": (lambda x: x.square().sum(-1), lambda live: live),
}


@pytest.mark.parametrize("how", RETURNED)
def test_values_that_are_returned(how: str) -> None:
    """Put back where they were, zero at padding."""
    make, of_mask = RETURNED[how]
    model = Tokens(masked_mean, causal=False, returns=lambda model, loss, x: (loss, make(x)))
    before = program_of(model)
    after, state = apply(Pack(4), before), dict(model.named_parameters())
    assert after.log[-1].rewrites, after.log[-1]
    for mask in (right([7, 2, 4], 7), right([5, 1, 3, 2, 5], 5).flip(1)):
        tensors = batch(*mask.shape, mask)
        expected, found = (program.run(tensors, state)[1] for program in (before, after))
        live = of_mask(mask != 0)
        assert found.shape == expected.shape and same(found[live], expected[live]) and not found[~live].any()


@settings(max_examples=12, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_random_masks(data: st.DataObject) -> None:
    rows, length, kind = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)), data.draw(st.sampled_from(("shifted", "both ways", "masked mean")))
    lengths = data.draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
    mask = right(lengths, length)
    mask = mask.flip(1) if data.draw(st.booleans()) else mask
    ids, mask, labels = batch(rows, length, mask, seed=data.draw(st.integers(0, 99)))
    drop = torch.rand(labels.shape, generator=torch.Generator().manual_seed(rows)) < data.draw(st.sampled_from((0.0, 0.5, 1.0)))
    compare(kind, (ids, mask, labels.masked_fill(drop, -100)))


# -- what is computed ------------------------------------------------------------------------------------------------------


def test_nothing_is_computed_for_padding() -> None:
    """All products see as many rows as there are tokens, rounded up; the rows are found once."""
    _, _, after = programs("shifted")
    assert sum(node.target is OVERLOAD for node in after.nodes) == 1
    ids, mask, labels = batch(4, 9, right([9, 1, 2, 1], 9))
    seen: list[int] = []
    from_program = dict(programs("shifted")[0].named_parameters())

    def see(node: torch.fx.Node, value: object, env: object) -> None:
        if node.target is torch.ops.aten.linear.default and isinstance(value, torch.Tensor):
            seen.append(value.shape[:-1].numel())

    after.watch(Sample((ids, mask, labels), from_program), see)
    assert seen and set(seen) == {16}  # 13 tokens, by 4


@pytest.mark.parametrize("kind", KINDS)
def test_no_size_is_fixed(kind: str) -> None:
    """The passes look at fake values only where that asks nothing of the sizes of a call."""
    model = KINDS[kind]()
    before = program_of(model)
    known = [str(guard.expr) for guard in before.fake_mode.shape_env.guards]
    apply(Compact(), apply(Pack(), before))
    assert [str(guard.expr) for guard in before.fake_mode.shape_env.guards] == known


def test_a_label_at_padding_is_refused() -> None:
    _, _, after = programs("shifted")
    model = programs("shifted")[0]
    ids, mask, labels = batch(2, 6, right([6, 3], 6))
    labels[1, 5] = 7
    with pytest.raises(CheckError, match="sequence 1, token 4"):
        after.run((ids, mask, labels), dict(model.named_parameters()))


def test_tensors_of_another_batch_are_refused() -> None:
    model, _, after = programs("shifted")
    ids, mask, labels = batch(2, 6)
    with pytest.raises(CheckError, match="no rows of one batch"):
        after.run((ids, mask[:, :5], labels), dict(model.named_parameters()))


# -- what cannot be proven ---------------------------------------------------------------------------------------------------


def captured(model: nn.Module) -> Program:
    return apply(Pack(), program_of(model))


@pytest.mark.parametrize("mix, head, why", [
    (lambda x: x.cumsum(1), shifted, "it computes along the rows"),
    (lambda x: x - x.mean(1, keepdim=True), shifted, "it computes along the rows"),
    (lambda x: torch.cat([x[:, :1], x[:, 1:]], 1), shifted, "it cuts sequences at a length"),
    (lambda x: x.flip(1), shifted, "nothing is known of aten.flip"),
    (lambda x: x / x.norm(), shifted, "it reduces all rows to one value"),
    (lambda x: (x.transpose(1, 2) @ x) [:, :1] + x, shifted, "it sums over the rows"),
    (lambda x: x, plain_mean, "it computes along the rows"),
])
def test_mixed_rows_are_refused(mix: Callable[..., torch.Tensor], head: Callable[..., torch.Tensor], why: str) -> None:
    program = captured(Tokens(head, mix=mix))
    record = program.log[-1]
    assert not record.rewrites and any(why in miss.reason for miss in record.misses), (record.misses, record.notes)
    assert all(miss.source for miss in record.misses)
    assert OVERLOAD not in {node.target for node in program.nodes}


class Windowed(Tokens):
    """Looks at three keys back."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])
        allowed = mask[:, None, None, :].bool() & (places[:, None] - places[None, :] < 3) & (places[None, :] <= places[:, None])
        q = self.embed(ids).unsqueeze(1)
        return shifted(self, F.scaled_dot_product_attention(q, q, q, attn_mask=allowed).squeeze(1), mask, labels)


def test_other_masks_are_refused() -> None:
    record = captured(Windowed(shifted)).log[-1]
    assert not record.rewrites and "its mask says something else" in record.misses[0].reason


def test_a_program_without_padding_says_so() -> None:
    record = program_of(Tokens(shifted), "canonicalize | causal | pack").log[-1]
    assert not record.rewrites and any("for calls without any" in note for note in record.notes)


# -- models ------------------------------------------------------------------------------------------------------------------


def padded(name: str, rows: int, length: int, seed: int, left: bool = False) -> dict[str, torch.Tensor]:
    data = MODELS[name][1](rows, length, seed=seed)
    lengths = torch.randint(1, length + 1, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    mask = right(lengths, length)
    data["attention_mask"] = mask.flip(1) if left else mask
    data["labels"] = data["labels"].masked_fill(data["attention_mask"] == 0, -100)
    return data


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_models_as_programs(name: str) -> None:
    model = gpt2(0.0, 2) if name == "gpt2" else bert(0.0)
    before = run("canonicalize | causal(assume=false) | fuse | loss", capture(model, Call.of((), padded(name, 3, 10, 1))))
    after, state = run("pack | compact", before), dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(record.rewrites for record in after.log[-2:])
    for rows, length, left in ((3, 10, False), (5, 7, True)):
        tensors = Call.of((), padded(name, rows, length, rows, left)).tensors
        losses = [program.run(tensors, state)[0] for program in (before, after)]
        assert same(losses[1], losses[0])
        trained = [p for p in model.parameters() if p.requires_grad]
        for a, b in zip(*(torch.autograd.grad(loss, trained, allow_unused=True) for loss in losses), strict=True):
            assert (a is None) == (b is None) and (a is None or same(b, a))


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("bert", marks=pytest.mark.slow)])
def test_models(name: str) -> None:
    """Regions, several sizes in one program, padding on either side, evaluation, no labels."""
    model = {"llama": lambda: llama(2), "gpt2": lambda: gpt2(0.0, 2), "bert": lambda: bert(0.0)}[name]()
    plain = copy.deepcopy(model)
    opt = fxopt.optimize(model, "canonicalize | causal | fuse | loss | pack | compact | remat | dead_code")
    for rows, length, left in ((3, 10, False), (5, 7, True)):
        data = padded(name, rows, length, rows, left)
        found, expected = opt(**data), plain(**data)
        found.loss.backward()
        expected.loss.backward()
        live = data["attention_mask"] != 0
        assert same(found.loss, expected.loss) and same(found.logits[live], expected.logits[live])
    for (key, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or same(a.grad, b.grad)), key
    assert len(opt.dispatcher.entries) == 1 and not opt.dispatcher.notes
    model.eval(), plain.eval()
    data = padded(name, 3, 9, 4)
    labels, live = data.pop("labels"), data["attention_mask"] != 0
    with torch.no_grad():
        found, expected = opt(**data).logits, plain(**data).logits
        assert same(found[live], expected[live]) and not found[~live].any()
        assert same(opt(**data, labels=labels).loss, plain(**data, labels=labels).loss)


def test_with_adapters_quantized_weights_and_dropout() -> None:
    """The same losses as without `pack` where nothing is drawn; with dropout in the adapters it still trains."""
    losses = {}
    for rest in ("", "pack | compact | "):
        model = llama(1)
        opt = fxopt.optimize(model, f"causal(assume=false) | lora(rank=2) | quantize(nf4) | siblings | fuse | loss | {rest}remat | dead_code")
        data = padded("llama", 4, 9, 1)
        opt(**data)  # the adapters are made by the first call
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_B" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        loss = opt(**data).loss
        loss.backward()
        losses[rest] = loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    (loss, grads), (packed_loss, packed_grads) = losses.values()
    assert same(packed_loss, loss) and grads.keys() == packed_grads.keys() and all(same(packed_grads[name], grads[name]) for name in grads)


@pytest.mark.slow
def test_dropout_in_adapters_draws_other_masks() -> None:
    torch.manual_seed(0)
    opt = fxopt.optimize(llama(1), "causal | lora(rank=2, dropout=0.2) | siblings | fuse | loss | pack | compact | remat | dead_code")
    data = padded("llama", 4, 9, 1)
    losses = {float(opt(**data).loss.detach()) for _ in range(3)}
    opt(**data).loss.backward()
    assert all(loss == loss for loss in losses)


# -- the checks see faults -----------------------------------------------------------------------------------------------------


@functools.cache
def in_fp32() -> tuple[nn.Module, Program]:
    """For the check that measures what rounding does."""
    model = Tokens(shifted).float()
    return model, program_of(model)


@pytest.mark.parametrize("fault", ["position", "segment", "labels"])
def test_a_wrong_pack_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = in_fp32()
    if fault == "position":
        monkeypatch.setattr(packs.Space, "_within", lambda self, node, layout, before: self.sequence)
    elif fault == "segment":
        original = packs._Packing._attention

        def one_document(self: packs._Packing, node: torch.fx.Node, alone: bool) -> torch.fx.Node:
            self.space.segment = self.edit.call(torch.ops.aten.zeros_like.default, (self.space.segment,), like=node)
            return original(self, node, alone)

        monkeypatch.setattr(packs._Packing, "_attention", one_document)
    else:
        original_target = packs.Space.target

        def unshifted(self: packs.Space, node: torch.fx.Node, layout: Layout, ignored: int, before: torch.fx.Node) -> torch.fx.Node:
            return original_target(self, node, dataclasses.replace(layout, stop=layout.stop + 1), ignored, before)

        monkeypatch.setattr(packs.Space, "target", unshifted)
    wrong = apply(Pack(4), before)
    with pytest.raises(CheckError):
        verify.check(Pack(4), before, wrong, batch(3, 7, right([7, 4, 2], 7)), dict(model.named_parameters()))


def test_the_right_pack_passes_the_same_check() -> None:
    model, before = in_fp32()
    assert "values compared: " in verify.check(Pack(4), before, apply(Pack(4), before), batch(3, 7, right([7, 4, 2], 7)), dict(model.named_parameters()))
