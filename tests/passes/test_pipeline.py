"""The pass language, and how a pass is applied: facts, promises, notes, verified values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings, strategies as st

from fxopt.errors import CheckError, PassError
from fxopt.ir.capture import Call, capture
from fxopt.ir.edit import Edit
from fxopt.ir.program import Program, Sample
from fxopt.passes.base import Pass, Promise
from fxopt.passes.language import read
from fxopt.passes.pipeline import Pipeline, apply, parse, pipeline, run

aten = torch.ops.aten


@dataclass(frozen=True)
class Everything(Pass):
    """Has an argument of every type."""

    name: ClassVar[str] = "everything"
    rank: int = 1
    scale: float = 1.0
    on: bool = False
    word: str = "x"
    names: tuple[str, ...] = ()
    limit: int | None = None
    mode: Literal["fast", "small"] = "fast"
    either: float | str = 0.0
    dtype: torch.dtype = torch.float32
    more: dict[str, int] | None = None
    any: Any = None


@dataclass(frozen=True)
class Plain(Pass):
    """Does nothing."""

    name: ClassVar[str] = "plain"

    def run(self, edit: Edit) -> None:
        edit.missed("no-rule", edit.nodes[0], "it is not a norm")


@dataclass(frozen=True)
class Needs(Pass):
    """Needs one argument."""

    name: ClassVar[str] = "needs"
    size: int


DUMMIES = (Everything, Plain, Needs)

numbers = st.floats(allow_nan=False)
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                      lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8)
passes = st.one_of(
    st.builds(Everything, rank=st.integers(), scale=numbers, on=st.booleans(), word=st.text(), names=st.lists(st.text()).map(tuple),
              limit=st.none() | st.integers(), mode=st.sampled_from(["fast", "small"]), either=st.floats(allow_nan=False, allow_infinity=False) | st.text(),
              dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), more=st.none() | st.dictionaries(st.text(), st.integers()), any=values),
    st.just(Plain()), st.builds(Needs, size=st.integers()))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(passes, max_size=4))
def test_text_form_reads_back(found: list[Pass]) -> None:
    wanted = Pipeline(tuple(found))
    assert parse(str(wanted), DUMMIES) == wanted


def test_every_kind_of_value() -> None:
    text = 'everything(3, 1e-4, on=true, word=nf4, names=[q_proj, "up proj", model.layers], limit=6GiB, mode=small, either="a|b", dtype=bfloat16, more={a: 512MB},)'
    assert parse(text, DUMMIES).passes == (Everything(3, 1e-4, True, "nf4", ("q_proj", "up proj", "model.layers"), 6 * 1024**3, "small", "a|b", torch.bfloat16,
                                                      {"a": 512 * 10**6}),)
    assert parse("everything(scale=32)", DUMMIES).passes[0].scale == 32.0
    assert parse("everything(limit=1.5KiB)", DUMMIES).passes[0].limit == 1536
    assert parse("  plain\n | plain ", DUMMIES) == Pipeline((Plain(), Plain()))
    assert parse("", DUMMIES) == Pipeline()


@pytest.mark.parametrize(("text", "says"), [
    ("everythin", "did you mean everything?"),
    ("plain | lora", "column 9"),
    ("everything(rnk=1)", "did you mean rank?"),
    ("everything(rank=fast)", "rank must be an integer, got fast"),
    ("everything(rank=true)", "rank must be an integer, got true"),
    ("everything(on=1)", "on must be true or false"),
    ("everything(mode=slow)", "mode must be one of fast, small, got slow"),
    ("everything(names=q_proj)", "names must be a list of a word or string values"),
    ("everything(limit=x)", "limit must be an integer or none"),
    ("everything(limit=6gib)", "unknown unit 'gib'"),
    ("everything(rank=1, 2)", "positional argument follows a named one"),
    ("everything(1, rank=2)", "given twice"),
    ("plain(1)", "plain takes 0 arguments"),
    ("needs", "needs the argument 'size'"),
    ("plain |", "expected the name of a pass, got the end of the text"),
    ("plain plain", "expected '|' or the end of the text, got 'plain'"),
    ("everything(rank=)", "expected a value, got ')'"),
    ('everything(word="abc)', "does not end"),
    ("plain & plain", "unexpected character '&'"),
    ("everything(more={[1]: 2})", "cannot be a key"),
])
def test_errors_say_where_and_what_to_do(text: str, says: str) -> None:
    with pytest.raises(PassError) as error:
        parse(text, DUMMIES)
    assert says in str(error.value)
    assert "column" in str(error.value)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text(alphabet='ab1.-"\'|()[]{},:= \n\\é', max_size=30))
def test_any_text_parses_or_is_refused_politely(text: str) -> None:
    try:
        read(text)
    except PassError as error:
        assert "^" in str(error)


def test_pipelines_compose() -> None:
    both = Plain() | Pipeline((Needs(1),))
    assert both == Pipeline((Plain(), Needs(1))) == pipeline([Plain(), Needs(1)])
    assert len(both) == 2 and str(both) == "plain | needs(size=1)"
    with pytest.raises(PassError, match="is not a pass"):
        pipeline(3)  # type: ignore[arg-type]


# -- applying --------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.dropout(torch.relu(self.norm(self.up(x))), 0.5, True)
        return self.down(y).sum(), y


def small() -> tuple[Program, list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Small().train()
    x = torch.randn(4, 6)
    return capture(model, Call.of((x,), {})), [x], {**dict(model.named_parameters()), **dict(model.named_buffers())}


def find(edit: Edit, target: Any) -> Any:
    return next(node for node in edit.nodes if node.target is target)


def made(label: str, body: Any, **attributes: Any) -> Pass:
    """A pass from a function."""

    @dataclass(frozen=True)
    class Made(Pass):
        """Made by a test."""

        name: ClassVar[str] = label

        def run(self, edit: Edit) -> None:
            body(edit)

    for key, value in attributes.items():
        setattr(Made, key, value)
    return Made()


def test_nothing_changed_is_noted_with_the_reasons() -> None:
    program, _, _ = small()
    after = apply(Plain(), program)
    assert after.log[-1].notes == ("changed nothing: no-rule: it is not a norm",)
    assert after.log[-1].text == "plain" and after.parent is program
    with pytest.raises(PassError, match="it is not a norm"):
        apply(made("strict", Plain().run, must_fire=True), program)


def test_facts_are_required_established_and_destroyed() -> None:
    program, _, _ = small()
    maker = made("maker", lambda edit: None, establishes=frozenset({"flat"}))
    user = made("user", lambda edit: None, requires=frozenset({"flat"}), destroys=frozenset({"flat"}))
    with pytest.raises(PassError, match="user requires 'flat'"):
        apply(user, program)
    after = apply(maker, program)
    assert after.facts == {"flat"} and program.facts == frozenset()
    assert apply(user, after).facts == frozenset()


def test_a_crash_names_the_pass() -> None:
    program, _, _ = small()

    def crash(edit: Edit) -> None:
        raise KeyError("oops")

    with pytest.raises(PassError, match="crasher failed: KeyError"):
        apply(made("crasher", crash), program)


def relu_to(edit: Edit, scale: float) -> None:
    relu = find(edit, aten.relu.default)
    new = edit.call(aten.mul.Tensor, (relu, scale), like=relu, before=relu.next)
    edit.replace(relu, new, rule="relu (x.py:1)", unless=lambda user: user is new)


def drop_output(edit: Edit) -> None:
    output = edit.nodes[-1]
    edit.set_args(output, (output.args[0][:1],))


def detach_down(edit: Edit) -> None:
    relu = find(edit, aten.relu.default)
    new = edit.call(aten.detach.default, (relu,), like=relu, before=relu.next)
    edit.replace(relu, new, unless=lambda user: user is new)


def batch_norm_in_eval(edit: Edit) -> None:
    norm = find(edit, aten.batch_norm.default)
    edit.set_args(norm, (*norm.args[:5], False, *norm.args[6:]))


def no_dropout(edit: Edit) -> None:
    drop = find(edit, aten.dropout.default)
    edit.replace(drop, drop.args[0])
    edit.erase(drop)


@pytest.mark.parametrize(("body", "says"), [
    (drop_output, "2 outputs became 1"),
    (detach_down, "no longer takes a gradient"),
    (batch_norm_in_eval, "was written 1 times and is written 0 times"),
    (no_dropout, "1 random operations became 0"),
])
def test_structure_is_checked(body: Any, says: str) -> None:
    program, _, _ = small()
    with pytest.raises(PassError, match=says) as error:
        apply(made("bad", body), program)
    assert "bad broke its promise" in str(error.value)


def test_declared_changes_are_allowed() -> None:
    program, _, _ = small()
    apply(made("bad", detach_down, promise=Promise(gradients="declared")), program)
    apply(made("bad", no_dropout, promise=Promise(random="declared")), program)


def twice_halved(edit: Edit) -> None:
    relu = find(edit, aten.relu.default)
    third = edit.call(aten.div.Tensor, (relu, 3.0), like=relu, before=relu.next)
    back = edit.call(aten.mul.Tensor, (third, 3.0), like=relu, before=third.next)
    edit.replace(relu, back, unless=lambda user: user is third)


def test_values_are_verified() -> None:
    program, inputs, state = small()
    kept = {name: value.clone() for name, value in state.items()}
    good = run(made("good", twice_halved), program, verify="values", sample=Sample(inputs, state))
    assert "of the allowed error" in good.log[-1].notes[-1]
    plain = run(made("none", lambda edit: None, promise=Promise("exact")), program, verify="values", sample=Sample(inputs, state))
    assert "bitwise equal" in plain.log[-1].notes[-1]
    with pytest.raises(CheckError, match="differs"):
        run(made("bad", lambda edit: relu_to(edit, 1.001)), program, verify="values", sample=Sample(inputs, state))
    with pytest.raises(CheckError, match="not bitwise equal"):
        run(made("bad", twice_halved, promise=Promise("exact")), program, verify="values", sample=Sample(inputs, state))
    rough = run(made("rough", lambda edit: relu_to(edit, 1.001), promise=Promise("bounded", bound=0.01)), program, verify="values", sample=Sample(inputs, state))
    assert "approximation" in rough.log[-1].notes[-1]
    assert all(torch.equal(kept[name], value) for name, value in state.items()), "verification must not change the model"
