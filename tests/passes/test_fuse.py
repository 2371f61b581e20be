"""fuse on models of many families: how many sites fire, and that outputs and all gradients stay; near-misses by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from captured import Captured, count, data, family, function, weight

from fxopt.errors import CheckError
from fxopt.passes import verify
from fxopt.passes.fuse import Fuse, rules

# Ops that each model must get, of as many places as it has: norms, gated units, rotations of queries and keys (one op).
EXPECTED = {
    "llama": {"rms_norm": 1, "add_rms_norm": 2, "swiglu": 1, "rope": 1},
    "gemma": {"rms_norm": 1, "add_rms_norm": 2, "geglu": 1, "rope": 1},
    "gemma2": {"rms_norm": 3, "add_rms_norm": 2, "geglu": 1, "rope": 1},
    "phi3": {"rms_norm": 1, "add_rms_norm": 2, "swiglu": 1, "rope": 1},
    "gptj": {"layer_norm": 1, "add_layer_norm": 1, "rope": 1},
    "cohere": {"layer_norm": 1, "add_layer_norm": 1, "swiglu": 1, "rope": 1},
    "qwen3": {"rms_norm": 3, "add_rms_norm": 2, "swiglu": 1, "rope": 1},
    "mistral": {"rms_norm": 1, "add_rms_norm": 2, "swiglu": 1, "rope": 1},
    "granite": {"rms_norm": 1, "add_rms_norm": 2, "swiglu": 1, "rope": 1},
    "gpt2": {"layer_norm": 1, "add_layer_norm": 2},
    "neox": {"layer_norm": 2, "add_layer_norm": 1, "rope": 1},
    "bert": {"layer_norm": 2, "add_layer_norm": 2},
    "modernbert": {"layer_norm": 2, "add_layer_norm": 2, "geglu": 1, "rope": 1},
    "t5": {"rms_norm": 2, "add_rms_norm": 5},
}


def ops(captured: Captured) -> dict[str, int]:
    """Fused ops in a program, by name."""
    return count(str(node.target).split(".")[1] for node in captured.program.nodes if str(node.target).startswith("fxopt."))


@pytest.mark.parametrize("name", EXPECTED)
def test_models(name: str) -> None:
    captured = family(name).after("canonicalize")
    guards = len(captured.program.fake_mode.shape_env.guards)
    fused = captured.check(Fuse())
    assert ops(fused) == EXPECTED[name]
    assert all(said.startswith("the add broadcasts") for said in fused.misses)  # of embeddings and positions
    assert len(captured.program.fake_mode.shape_env.guards) == guards


@pytest.mark.parametrize("name", ["llama", "gemma", "cohere", "modernbert", "t5"])
def test_models_in_low_precision(name: str) -> None:
    assert ops(family(name, dtype=torch.bfloat16).after("canonicalize").check(Fuse())) == EXPECTED[name]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma", "cohere", "gpt2"])
def test_programs_captured_under_autocast(name: str, inside: bool) -> None:
    """All passes, applied in or outside of the caller's autocast region; values in it, against fp64."""
    captured = family(name, autocast=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        after = captured.after("canonicalize", "causal", "fuse", "loss", "dead_code")
    assert after.calls("linear_cross_entropy") and (after.calls("rms_norm") or after.calls("layer_norm"))
    assert after.calls("scaled_dot_product_attention")[0].args[3] is None
    with torch.autocast("cpu", torch.bfloat16):  # leaves the fp64 runs alone
        verify.check(Fuse(), captured.program, after.program, captured.inputs, captured.state)


def test_one_kind_of_op() -> None:
    assert ops(family("llama").after("canonicalize").check(Fuse(ops=("swiglu",)))) == {"swiglu": 1}


def test_rewrites_name_their_rule_and_place() -> None:
    rewrite = family("llama").after("canonicalize", Fuse()).program.log[-1].rewrites[0]
    assert rewrite.rule.startswith("rope.half (reference.py:") or rewrite.rule.startswith("rms_norm.")
    assert all("(reference.py:" in each.rule or "(residual.py:" in each.rule for each in family("llama").after("canonicalize", Fuse()).program.log[-1].rewrites)
    assert any(each.path == "model.norm" and each.source for each in family("llama").after("canonicalize", Fuse()).program.log[-1].rewrites)


# -- one site at a time ----------------------------------------------------------------------------------------------

X, W = data(2, 6, 8), weight(8)


def rms(x, w, offset=0.0, power=2, dim=-1, eps=1e-6):
    return x * torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + eps) * (w + offset if offset else w)


def fused(fn, *tensors, **parameters) -> Captured:
    """A function after fuse, values compared."""
    return function(fn, *tensors, **parameters).after("canonicalize").check(Fuse())


def only(captured: Captured, name: str) -> dict[str, object]:
    """The arguments of the one fused op, by name."""
    (node,) = captured.calls(name)
    return {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args)}


def test_epsilon_and_offset_are_the_programs() -> None:
    got = only(fused(lambda x, w: rms(x, w, offset=1.0, eps=0.25), X, w=W), "rms_norm")
    assert (got["eps"], got["offset"]) == (0.25, 1.0)


def test_another_offset_is_part_of_the_weight() -> None:
    got = only(fused(lambda x, w: rms(x, w, offset=2.0), X, w=W), "rms_norm")
    assert got["offset"] == 0.0 and str(got["weight"].target) == "aten.add.Tensor"


def test_a_gate_is_no_weight() -> None:
    captured = fused(lambda x, g: rms(x, torch.sigmoid(g)), X, data(2, 6, 8, seed=5))
    assert only(captured, "rms_norm")["weight"] is None


def test_a_norm_on_centered_values_is_a_layer_norm() -> None:
    def centered(x, w, b):
        d = x - x.mean(-1, keepdim=True)
        return w * ((x - x.mean(-1, keepdim=True)) / torch.sqrt((d * d).mean(-1, keepdim=True) + 1e-5)) + b

    fused(centered, X, w=W, b=weight(8, seed=3))


@pytest.mark.parametrize("up", ["x", "chunk"])
def test_gated_units(up: str) -> None:
    def both(x, w, v):
        gate, other = (x @ w, x @ v) if up == "x" else (x @ torch.cat((w, v), 1)).chunk(2, -1)
        return F.silu(gate) * other

    assert ops(fused(both, X, w=weight(8, 12), v=weight(8, 12, seed=2))) == {"swiglu": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clamped_gate_with_a_factor_in_its_sigmoid(dtype: torch.dtype) -> None:
    def clamped(x, w, v):
        gate, up = (x @ w).clamp(max=2.0), (x @ v).clamp(-2.0, 2.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    captured = fused(clamped, data(2, 6, 8, dtype=dtype), w=weight(8, 12, dtype=dtype), v=weight(8, 12, dtype=dtype, seed=2))
    got = only(captured, "swiglu")
    assert (got["gate"].args[1], got["up"].args[1]) == (1.702, 1.702)


def test_gelu_keeps_its_form() -> None:
    for approximate in ("none", "tanh"):
        captured = fused(lambda x, w: F.gelu(x @ w, approximate=approximate) * (x @ w), X, w=weight(8, 12))
        assert only(captured, "geglu")["approximate"] == approximate


def rotate_half(x, at=4):
    return torch.cat((-x[..., at:], x[..., :at]), dim=-1)


def rope_of(q, cos, sin, rotate=rotate_half):
    return q * cos + rotate(q) * sin


TABLES = {"cos": torch.rand(1, 1, 5, 8), "sin": torch.rand(1, 1, 5, 8)}
Q, K = weight(2, 4, 5, 8), weight(2, 2, 5, 8, seed=1)


def test_queries_and_keys_turn_in_one_op() -> None:
    captured = fused(lambda x, q, k, cos, sin: (rope_of(q, cos, sin) + x.sum(), rope_of(k, cos, sin)), X, q=Q, k=K, **TABLES)
    got = only(captured, "rope")
    assert (got["q"].target, got["k"].target) == ("q", "k") and not got["interleaved"] and not got["half_tables"]


def test_keys_that_depend_on_turned_queries_turn_alone() -> None:
    def chained(x, q, cos, sin):
        first = rope_of(q, cos, sin)
        return rope_of(first * 2, cos, sin) + x.sum()

    assert ops(fused(chained, X, q=Q, **TABLES)) == {"rope": 2}


def partial(q, cos, sin):
    return torch.cat((rope_of(q[..., :8], cos, sin), q[..., 8:]), dim=-1)


def test_a_rotation_of_some_columns_is_one_op() -> None:
    captured = fused(lambda x, q, cos, sin: partial(q, cos, sin) + x.sum(), X, q=weight(2, 4, 5, 12), **TABLES)
    assert only(captured, "rope")["q"].target == "q" and not captured.calls("cat")


def test_columns_in_another_place_stay() -> None:
    def swapped(x, q, cos, sin):
        return torch.cat((rope_of(q[..., 4:], cos, sin), q[..., :4]), dim=-1) + x.sum()

    def doubled(x, q, cos, sin):
        turned = rope_of(q[..., :8], cos, sin)
        return torch.cat((turned, q[..., 8:]), dim=-1).sum() + turned.sum() + x.sum()

    def viewed(x, q, cos, sin):
        return partial(q.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2)).view(2, -1) + x.sum()

    for fn in (swapped, doubled, viewed):
        captured = fused(fn, X, q=weight(2, 4, 5, 12), **TABLES)
        assert captured.calls("cat") and only(captured, "rope")["q"].op != "get_attr"


def test_trained_tables_stay() -> None:
    captured = fused(lambda x, q, cos, sin: rope_of(q, cos, sin) + x.sum(), X, q=Q, cos=weight(1, 1, 5, 8), sin=weight(1, 1, 5, 8, seed=4))
    assert not ops(captured) and "the tables are trained" in captured.misses


# -- rotations in other forms ----------------------------------------------------------------------------------------


def turns(*shape: int) -> torch.Tensor:
    """Unit complex numbers."""
    return torch.polar(torch.ones(shape), torch.rand(shape, generator=torch.Generator().manual_seed(3)))


def as_complex(q, turns, pairs=lambda x: x.reshape(*x.shape[:-1], -1, 2), flat=lambda x: x.flatten(-2)):
    return flat(torch.view_as_real(torch.view_as_complex(pairs(q.float())) * turns)).type_as(q)


SHAPES = {
    "reshape": lambda x: x.reshape(*x.shape[:-1], -1, 2),
    "view": lambda x: x.view(*x.shape[:-1], -1, 2),
    "unflatten": lambda x: x.unflatten(-1, (-1, 2)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex_rotations_of_queries_and_keys_are_one_op(shape: str, dtype: torch.dtype) -> None:
    def both(x, q, k, t):
        return as_complex(q, t, SHAPES[shape]) + x.sum(), as_complex(k, t, SHAPES[shape], lambda y: y.reshape(*y.shape[:-2], 8))

    q, k = (weight(2, heads, 5, 8, dtype=dtype, seed=heads) for heads in (4, 2))
    captured = fused(both, X, q=q, k=k, t=turns(1, 1, 5, 4))
    got = only(captured, "rope")
    assert (got["q"].target, got["k"].target, got["interleaved"], got["half_tables"]) == ("q", "k", True, True)
    assert len(captured.calls("view_as_real")) == 1 and not captured.calls("view_as_complex")


def test_a_conjugate_rotation_stays() -> None:
    assert not ops(fused(lambda x, q, t: as_complex(q, t.conj()) + x.sum() + as_complex(q, t + 1).sum(), X, q=Q, t=turns(5, 4).requires_grad_()))


def test_pairs_that_become_halves() -> None:
    def rotate(q, cos, sin):
        first, second = q[..., 0::2], q[..., 1::2]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    tables = {name: table[..., :4].contiguous() for name, table in TABLES.items()}
    def both(x, q, k, cos, sin):
        turned = rotate(q, cos, sin), rotate(k, cos, sin)
        return turned[0] + x.sum(), turned[1]

    got = only(fused(both, X, q=Q, k=K, **tables), "rope")
    assert str(got["q"].target) == "aten.cat.default" and got["half_tables"] and not got["interleaved"]


def test_a_rotation_the_other_way() -> None:
    def back(x):
        return torch.cat((x[..., 4:], -x[..., :4]), dim=-1)

    def both(x, q, k, cos, sin):
        turned = rope_of(q, cos, sin, back), rope_of(k, cos, sin, back)
        return turned[0] + x.sum(), turned[1]

    got = only(fused(both, X, q=Q, k=K, **TABLES), "rope")
    assert str(got["sin"].target) == "aten.neg.default" and got["k"].target == "k"


LOW = {"q": weight(2, 4, 5, 8, dtype=torch.bfloat16), "k": weight(2, 2, 5, 8, dtype=torch.bfloat16, seed=1)}


def test_low_precision_times_wider_tables_is_wide() -> None:
    captured = fused(lambda x, q, cos, sin: rope_of(q, cos, sin) + x.sum(), X, q=LOW["q"], **TABLES)
    got = only(captured, "rope")
    assert str(got["q"].target) == "aten.to.dtype" and got["q"].args[0].target == "q"


def test_a_result_that_is_cast_back_needs_no_wide_copy() -> None:
    def both(x, q, k, cos, sin):
        return rope_of(q, cos, sin).to(q.dtype) + x.sum(), rope_of(k, cos, sin).to(k.dtype)

    captured = fused(both, X, **LOW, **TABLES)
    got = only(captured, "rope")
    assert (got["q"].target, got["k"].target) == ("q", "k") and not captured.calls("to")


def test_a_wide_result_that_others_read_stays_wide() -> None:
    def kept(x, q, cos, sin):
        turned = rope_of(q, cos, sin)
        return turned.to(q.dtype) + x.sum(), turned

    assert only(fused(kept, X, q=LOW["q"], **TABLES), "rope")["q"].target != "q"


def test_columns_that_are_joined_after_widening() -> None:
    def joined(x, q, cos, sin):
        turned = rope_of(q[..., :8], cos, sin)
        return torch.cat((turned, q[..., 8:].to(turned.dtype)), dim=-1).to(q.dtype) + x.sum()

    def promoted(x, q, cos, sin):
        return torch.cat((rope_of(q[..., :8], cos, sin), q[..., 8:]), dim=-1).to(q.dtype) + x.sum()

    q = weight(2, 4, 5, 12, dtype=torch.bfloat16)
    assert only(fused(promoted, X, q=q, **TABLES), "rope")["q"].target == "q"
    assert ops(fused(joined, X, q=q, **TABLES)) == {"rope": 1}


# -- near-misses -----------------------------------------------------------------------------------------------------

NEAR = {
    "exponent": (lambda x, w: rms(x, w, power=3), "has 3 where the pattern has 2"),
    "dimension": (lambda x, w: rms(x, w, dim=1), "has -2 where the pattern has -1"),
    "inner value": (lambda x, w: rms(x, w) + torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), None),
    "shared statistics": (lambda x, w: (s := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * x * w + s, "is also read by"),
    "sigmoid of another": (lambda x, w: x * torch.sigmoid(x + 1) * w.expand(2, 6, 8), "reads gate twice"),
    "written inside": (lambda x, w: (y := x.detach() * 2, v := y[0], z := rms(y, w), y.add_(1))[2] + v + x, "is written in place"),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    fn, reason = NEAR[name]
    captured = fused(fn, X, w=W)
    if reason is None:
        assert ops(captured) == {"rms_norm": 1}
    else:
        assert not ops(captured) and any(reason in said for said in captured.misses), captured.misses


def test_rotation_near_misses() -> None:
    def signs(x):
        return torch.cat((-x[..., 4:], -x[..., :4]), dim=-1)

    for rotate in (signs, lambda x: rotate_half(x, 3)):
        captured = fused(lambda x, q, cos, sin: rope_of(q, cos, sin, rotate) + x.sum(), X, q=Q, **TABLES)
        assert not ops(captured) and captured.misses


def test_a_dtype_in_which_the_op_rounds_more_is_refused() -> None:
    """bf16 rows with an fp32 weight, where the program never rounds to bf16: the op's only such form would."""
    captured = fused(lambda x, w: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(w.dtype),
                     data(2, 6, 8, dtype=torch.bfloat16), w=W)
    assert all(node.args[0].meta["val"].dtype == torch.float32 for node in captured.calls("rms_norm"))


def test_a_layout_that_a_view_depends_on_is_kept() -> None:
    def transposed(x, w):
        return rms(x.transpose(0, 1), w).transpose(0, 1).view(x.shape[0], -1)

    captured = fused(transposed, X, w=W)
    assert not ops(captured) and any("other strides" in said for said in captured.misses)


def test_a_wrong_rule_would_show() -> None:
    """The planted faults: the offset of one forgotten; the exact gelu taken for the approximate one."""
    for pattern, change, model in (("rsqrt_offset_scale_cast", {"offset": 0.0}, "gemma"), ("erf", {"approximate": "tanh"}, "modernbert")):
        (rule,) = [each for each in rules() if each.pattern.name == pattern]
        wrong = dataclasses.replace(rule, pattern=dataclasses.replace(rule.pattern, arguments={**rule.pattern.arguments, **change}))
        with pytest.raises(CheckError, match="differs"):
            family(model).after("canonicalize").check(_One(wrong))


class _One(Fuse):
    """fuse with one rule."""

    def __init__(self, rule) -> None:
        super().__init__()
        object.__setattr__(self, "rule", rule)

    def run(self, edit) -> None:
        self.rule.apply(edit)


def test_a_layout_that_is_not_known_is_kept_for_draws() -> None:
    """Batch norm of a transposed input: its fake value has the input's strides, its kernel's is contiguous, and dropout draws in the order of memory."""
    def normed(x, w):
        y = torch.nn.functional.batch_norm(x.transpose(1, -1), None, None, training=True).transpose(1, -1)
        return torch.nn.functional.dropout(rms(y, w), 0.3)

    captured = fused(normed, data(3, 5, 8), w=W)
    assert not ops(captured) and any("other strides" in said for said in captured.misses)
    assert ops(fused(normed, data(6, 8), w=W)) == {"rms_norm": 1}  # transposed along one dimension: as it was
