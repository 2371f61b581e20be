"""causal: masks read as formulas, compared with the masks themselves; what becomes a flag, and what must not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from mask_truth import check_formula
from captured import Captured, data, family, function, weight

from fxopt.errors import CheckError
from fxopt.ir.formula import EVERYWHERE, Affine, All, AtLeastZero, Data, Not, inputs_of, simplify
from fxopt.ir.program import Assumption, AtMost
from fxopt.passes import verify
from fxopt.passes.causal import Causal

# with a mask input, without one: rules that fire, and how often
EXPECTED = {
    "llama": ({"causal mask": 1, "grouped heads": 1}, {"causal mask": 1, "grouped heads": 1}),
    "gemma": ({"causal mask": 1, "grouped heads": 1}, {"causal mask": 1, "grouped heads": 1}),
    "phi3": ({"causal mask": 1, "grouped heads": 1}, {"causal mask": 1, "grouped heads": 1}),
    "cohere": ({"causal mask": 1, "grouped heads": 1}, {"causal mask": 1, "grouped heads": 1}),
    "qwen3": ({"causal mask": 1, "grouped heads": 1}, {"causal mask": 1, "grouped heads": 1}),
    "granite": ({"causal mask": 1, "grouped heads": 1}, {"causal mask": 1, "grouped heads": 1}),
    "neox": ({"causal mask": 1}, {"causal mask": 1}),
    "gpt2": ({"causal mask": 1}, {"causal mask": 1}),
    "bert": ({"full mask": 1}, {"full mask": 1}),
    "t5": ({"full mask": 1}, {"full mask": 1}),  # of three attentions two add a learned bias
    "mistral": ({}, {}),  # a window of 4
    "gemma2": ({}, {}),  # attention by hand
}


@pytest.mark.parametrize("name", EXPECTED)
def test_models(name: str) -> None:
    for mask, expected in zip((True, False), EXPECTED[name]):
        captured = family(name, mask=mask).after("canonicalize")
        guards = len(captured.program.fake_mode.shape_env.guards)
        after = captured.check(Causal())
        assert after.rules == expected
        assert after.program.assumptions == ((Assumption("tensors_1"),) if mask and expected else ())
        assert len(captured.program.fake_mode.shape_env.guards) == guards


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_nothing_is_assumed_if_it_may_not_be(name: str) -> None:
    after = family(name).after("canonicalize").check(Causal(assume=False))
    assert not after.rules and not after.program.assumptions
    assert after.misses == ["the mask depends on the values of tensors_1"]
    assert family(name, mask=False).after("canonicalize").check(Causal(assume=False)).rules


def test_the_assumption_is_what_must_hold() -> None:
    (assumption,) = family("llama").after("canonicalize", Causal()).program.assumptions
    assert assumption.holds(torch.ones(2, 3, dtype=torch.int64)) and not assumption.holds(torch.tensor([[1, 0, 1]]))


def test_low_precision() -> None:
    family("llama", dtype=torch.bfloat16).after("canonicalize").check(Causal())


# -- masks by hand: (mask of x [batch, length, width] and pad [batch, length], what it is) -----------------------------


def positions(x):
    return torch.arange(x.shape[1])


def le(x, pad):
    return positions(x)[None, :] <= positions(x)[:, None]


def tril(x, pad):
    return torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))


def not_triu(x, pad):
    return ~torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), diagonal=1)


def float_triu(x, pad):
    return torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), diagonal=1)


def filled(x, pad):
    return torch.zeros(x.shape[1], x.shape[1]).masked_fill(positions(x)[None, :] > positions(x)[:, None], float("-inf"))


def chosen(x, pad):
    return torch.where(le(x, pad), 0.0, torch.finfo(torch.float32).min)


def from_bits(x, pad):
    return (1.0 - le(x, pad).float()) * torch.finfo(torch.float32).min


def shifted(x, pad):
    return (positions(x) + 3)[None, :] < (positions(x) + 4)[:, None]


def padded(x, pad):
    return le(x, pad) & pad[:, None, None, :].bool()


def padded_sum(x, pad):
    return chosen(x, pad) + torch.where(pad[:, None, None, :] != 0, 0.0, torch.finfo(torch.float32).min)


def padded_fill(x, pad):
    return chosen(x, pad).masked_fill((pad == 0)[:, None, None, :], torch.finfo(torch.float32).min)


def padded_or(x, pad):
    return ~((positions(x)[None, :] > positions(x)[:, None]) | (pad == 0)[:, None, None, :])


def covering_window(x, pad):
    return le(x, pad) & (positions(x)[:, None] - positions(x)[None, :] > -1)


def full(x, pad):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)


def only_padding(x, pad):
    return pad[:, None, None, :].bool().expand(-1, 1, x.shape[1], -1)


def queries_from_zero(x, pad):
    return (positions(x)[:, None] >= 0) & (positions(x)[None, :] >= 0)


def packed_in_order(x, pad):
    rows = positions(x)[None].expand(x.shape[0], -1)
    document = (torch.diff(rows, prepend=rows[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return le(x, pad) & (document[:, None, :, None] == document[:, None, None, :])


def strict(x, pad):
    return positions(x)[None, :] < positions(x)[:, None] + torch.zeros((), dtype=torch.int64)


def lookahead(x, pad):
    return positions(x)[None, :] <= positions(x)[:, None] + 1


def window(x, pad):
    return le(x, pad) & (positions(x)[None, :] > positions(x)[:, None] - 3)


def anti_causal(x, pad):
    return positions(x)[None, :] >= positions(x)[:, None]


def chunks(x, pad):
    return le(x, pad) & (positions(x)[None, :] // 2 == positions(x)[:, None] // 2)


def prefix(x, pad):
    return le(x, pad) | (positions(x)[None, :] < 2)


def local(x, pad):
    return (positions(x)[None, :] - positions(x)[:, None]).abs() <= 2


def far(x, pad):
    return (positions(x)[None, :] - positions(x)[:, None]).abs() >= 2


def soft(x, pad):
    return torch.where(le(x, pad), 0.0, -10000.0)


def biased(x, pad):
    return torch.where(le(x, pad), -1.0, float("-inf")) * 1.0


def counts(x, pad):
    return (1.0 - pad[:, None, None, :].float()) * torch.finfo(torch.float32).min


def from_end(x, pad):
    return positions(x)[positions(x) - 1][None, :] <= positions(x)[:, None]


def step_two(x, pad):
    return positions(x)[None, :] * 2 <= positions(x)[:, None]


CAUSAL = [le, tril, not_triu, float_triu, filled, chosen, from_bits, shifted, padded, padded_sum, padded_fill, padded_or, covering_window, packed_in_order]
FULL = [full, only_padding, queries_from_zero]
NEITHER = [strict, lookahead, window, anti_causal, chunks, prefix, local, far, soft, biased, counts, from_end, step_two]


def attention(mask) -> Captured:
    """One attention with a mask, in canonical form."""
    def fn(x, pad, w):
        q = k = v = (x @ w).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(x, pad)).transpose(1, 2).reshape(x.shape)

    return function(fn, data(2, 6, 8), torch.ones(2, 6, dtype=torch.int64), w=weight(8, 8)).after("canonicalize")


@pytest.mark.parametrize("mask", CAUSAL, ids=lambda fn: fn.__name__)
def test_causal_masks(mask) -> None:
    after = attention(mask).check(Causal())
    assert after.rules == {"causal mask": 1}
    (node,) = after.calls("scaled_dot_product_attention")
    assert node.args[3:6] == (None, 0.0, True)


@pytest.mark.parametrize("mask", FULL, ids=lambda fn: fn.__name__)
def test_masks_of_everything(mask) -> None:
    after = attention(mask).check(Causal())
    assert after.rules == {"full mask": 1}
    (node,) = after.calls("scaled_dot_product_attention")
    assert node.args[3:6] == (None, 0.0, False)


@pytest.mark.parametrize("mask", NEITHER, ids=lambda fn: fn.__name__)
def test_other_masks_stay(mask) -> None:
    after = attention(mask).check(Causal())
    assert not after.rules and len(after.misses) == 1 and not after.program.assumptions


def test_misses_say_what_the_mask_is() -> None:
    assert attention(window).after(Causal()).misses == ["the mask is neither causal nor full: q - k >= 0 and k - q >= -2"]
    assert "-10000.0" in attention(soft).after(Causal()).misses[0]


@pytest.mark.parametrize("mask", [*CAUSAL, *FULL, *NEITHER], ids=lambda fn: fn.__name__)
def test_formulas_are_the_masks(mask) -> None:
    """On random padding."""
    captured = attention(mask)
    x, pad = captured.inputs[0], torch.randint(0, 2, (2, 6), generator=torch.Generator().manual_seed(7))
    check_formula(captured, {"tensors_0": x, "tensors_1": pad}, mask(x, pad))


def test_lengths_that_may_differ_are_not_causal() -> None:
    def fn(x, memory, w):
        q, kv = (t @ w for t in (x, memory))
        q, kv = (t.view(t.shape[0], t.shape[1], 2, 4).transpose(1, 2) for t in (q, kv))
        mask = torch.arange(memory.shape[1])[None, :] <= torch.arange(x.shape[1])[:, None]
        return F.scaled_dot_product_attention(q, kv, kv, attn_mask=mask).transpose(1, 2).reshape(x.shape)

    after = function(fn, data(2, 6, 8), data(2, 9, 8, seed=4), w=weight(8, 8)).after("canonicalize").check(Causal())
    assert not after.rules and "may not be aligned" in after.misses[0]


def test_a_static_window_that_covers_all_is_none() -> None:
    def fn(x, w):
        k = torch.arange(6)
        mask = (k[None, :] <= k[:, None]) & (k[None, :] > k[:, None] - 6)
        q = (x.sum() * w).view(1, 2, 6, 4)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    assert function(fn, data(3, 4), w=weight(1, 2, 6, 4)).after("canonicalize").check(Causal()).rules == {"causal mask": 1}


def wide_window(x, pad):
    return padded(x, pad) & (positions(x)[None, :] > positions(x)[:, None] - 7)


def wide_local(x, pad):
    return (positions(x)[None, :] - positions(x)[:, None]).abs() < 8


def test_windows_wider_than_the_call_are_assumed_away() -> None:
    after = attention(wide_window).check(Causal())
    assert after.rules == {"causal mask": 1} and after.program.assumptions == (Assumption("tensors_1"), AtMost("tensors_0", 1, 7))
    assert AtMost("tensors_0", 1, 7).holds(torch.zeros(2, 7, 8)) and not AtMost("tensors_0", 1, 7).holds(torch.zeros(2, 8, 8))
    assert attention(wide_window).check(Causal(assume=False)).rules == {}
    after = attention(wide_local).check(Causal())
    assert after.rules == {"full mask": 1} and after.program.assumptions == (AtMost("tensors_0", 1, 8),)


def test_a_window_hides_nothing_up_to_its_size_and_no_further() -> None:
    for length, equal in ((6, True), (7, True), (8, False)):
        mask = wide_window(torch.zeros(2, length, 8), torch.ones(2, length))
        assert torch.equal(mask[0, 0], torch.ones(length, length, dtype=torch.bool).tril()) is equal
        mask = wide_local(torch.zeros(2, length + 1, 8), None)
        assert bool(mask.all()) is equal


def test_dropout_and_scale_stay() -> None:
    def fn(x, w):
        q = (x @ w).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=le(x, None), scale=0.3, dropout_p=0.25)

    after = function(fn, data(2, 6, 8), w=weight(8, 8)).after("canonicalize").check(Causal())
    (node,) = after.calls("scaled_dot_product_attention")
    assert node.args[4:] == (0.25, True) and node.kwargs["scale"] == 0.3


def test_heads_repeated_in_another_order_stay() -> None:
    """`repeat` puts the copies of a head apart, `repeat_interleave` side by side: only the latter is grouped."""
    def fn(x, w, v):
        q = (x @ w).view(x.shape[0], x.shape[1], 4, 2).transpose(1, 2)
        k = (x @ v).view(x.shape[0], x.shape[1], 2, 2).transpose(1, 2)
        k = k[:, None].expand(-1, 2, -1, -1, -1).reshape(q.shape)
        return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    assert not function(fn, data(2, 6, 8), w=weight(8, 8), v=weight(8, 4)).after("canonicalize").check(Causal()).rules


# -- formulas --------------------------------------------------------------------------------------------------------


def at_least(const: int, **factors: int) -> AtLeastZero:
    return AtLeastZero(Affine.of(const, {{"q": -2, "k": -1}[name]: factor for name, factor in factors.items()}))


def test_simplify() -> None:
    causal = at_least(0, q=1, k=-1)
    assert simplify(All((causal, at_least(3, q=1, k=-1))), {}, frozenset()) == causal
    assert simplify(Not(at_least(0, k=1)), {}, frozenset()) == Not(EVERYWHERE)
    assert simplify(Not(at_least(-1, k=1, q=-1)), {}, frozenset()) == causal
    assert simplify(at_least(5, q=-1), {-2: 6}, frozenset()) == EVERYWHERE
    assert simplify(at_least(4, q=-1), {-2: 6}, frozenset()) != EVERYWHERE
    assert simplify(All((causal, Data("mask", ()))), {}, frozenset({"mask"})) == causal
    assert inputs_of(Not(All((causal, Data("mask", ()))))) == {"mask"}


@dataclasses.dataclass(frozen=True)
class Careless(Causal):
    """The planted fault: windows are taken for causal masks."""

    def run(self, edit) -> None:
        for node in edit.nodes:
            if str(node.target) == "aten.scaled_dot_product_attention.default":
                edit.set_args(node, (*node.args[:3], None, 0.0, True))


def test_a_wrong_rule_would_show() -> None:
    with pytest.raises(CheckError, match="differs"):
        family("mistral").after("canonicalize").check(Careless())
    with pytest.raises(CheckError, match="differs"):
        attention(lookahead).check(Careless())


def test_a_kept_mask_under_autocast_has_its_casts_said_before_heads_are_repeated() -> None:
    captured = family("mistral", autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        after = captured.after("canonicalize", Causal())
        verify.check(Causal(), captured.program, after.program, captured.inputs, captured.state)
    (node,) = after.calls("scaled_dot_product_attention")
    assert node.args[3] is not None and all(source.meta["val"].dtype in (torch.bfloat16, torch.bool) for source in node.all_input_nodes)
    chain = node.args[1]
    while "to.dtype" not in str(chain.target):
        assert chain.meta["val"].dtype == torch.bfloat16
        chain = chain.args[0]
    assert chain.args[0].meta["val"].dtype == torch.float32 and chain.meta["val"].shape[1] == 2  # the heads that are there, not their copies
