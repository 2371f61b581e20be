"""explain: every sentence is true, like places are folded, predictions are those of the plan, and the JSON is the text."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from golden_models import program, stacked
from hypothesis import given
from hypothesis import strategies as st

import fxopt
from fxopt.errors import FxoptError
from fxopt.explain import ADVICE, LOOKS_FOR, SHOWN, Explanation, Found, arguments, explain, folded
from fxopt.passes.catalog import PASSES
from fxopt.passes.pipeline import parse
from tests.zoo.entry import call_of
from tests.zoo.table import ZOO

ROOT = Path(__file__).resolve().parent.parent


def explained(passes: str, shared: bool = False, predict: str = "none", depth: int = 3) -> Explanation:
    return explain(*program(passes, shared, depth), predict=predict)


def test_what_was_done_and_what_was_not() -> None:
    said = explained("fuse", shared=True)
    fuse = next(step for step in said.steps if step.text == "fuse")
    (done,) = [found for found in fuse.did if "rms_norm" in found.rule]
    assert done.count == 3 and done.places == "layers.0 … 2" and done.source.startswith("golden_models.py:") and not done.reason
    (missed,) = [found for found in fuse.did_not if "swiglu" in found.rule]
    line = next(number for number, text in enumerate((ROOT / "tests/golden_models.py").read_text().splitlines(), 1) if "gate.mean()" in text)
    assert missed.count == 3 and missed.places == "layers.0 … 2" and f"(golden_models.py:{line})" in missed.reason and missed.advice
    assert not [found for step in explained("fuse").steps for found in step.did_not if "swiglu" in found.rule]
    assert missed.reason in str(said) and "x3 swiglu" in str(said)


def test_counts_are_those_of_the_log() -> None:
    found, model, call = program("lora(rank=2) | quantize(nf4) | fuse", shared=True)
    for step, record in zip(explain(found, model, call, predict="none").steps, found.log):
        assert sum(each.count for each in step.did) == len(record.rewrites) and sum(each.count for each in step.did_not) == len(record.misses)
        assert (step.before, step.after, step.text) == (record.before, record.after, record.text)


def test_json_says_the_same() -> None:
    said = explained("fuse", shared=True)
    data = json.loads(json.dumps(said.json()))
    assert data["format"] == "fxopt.explain/1" and [step["text"] for step in data["steps"]] == ["canonicalize", "fuse"]
    for step in data["steps"]:
        for found in (*step["did"], *step["did_not"]):
            assert found["rule"] in str(said) and found["reason"] in str(said) and found["places"] in str(said)
    documented = (ROOT / "docs/explain.md").read_text()

    def keys(value: object) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for inner in value.values() for key in keys(inner)}
        return {key for inner in value for key in keys(inner)} if isinstance(value, list) else set()

    assert [key for key in keys({**data, "sizes": {}}) if f"`{key}`" not in documented] == []


def test_predictions_are_the_plans() -> None:
    model, kwargs = stacked(depth=1)
    opt = fxopt.optimize(model, "fuse | remat", inputs=kwargs, check=False)
    said, plan = opt.explain(), opt.plan()
    last = said.steps[-1].predicted
    assert last is not None and (last.peak, last.parts) == (plan.peak.total, {name: size for name, size in plan.peak.parts.items() if size})
    assert last.seconds == plan.seconds and said.start is not None and said.start.peak != last.peak
    assert said.steps[0].predicted is None, "only the ends were asked for"
    with pytest.raises(FxoptError, match="predict is 'all'"):
        opt.explain(predict="all")


def test_a_rule_of_many_lines_is_said_once() -> None:
    places = tuple(Found("no-op", 2, f"layers.{i}", f"model.py:{i}") for i in range(SHOWN + 1))
    step = explained("canonicalize", depth=1).steps[0]
    said = str(Explanation("Net", "canonicalize", {}, None, (dataclasses.replace(step, did=places),)))
    assert said.count("no-op") == 1 and f"x{2 * SHOWN} more, from {SHOWN} other lines of code" in said
    assert str(Explanation("Net", "canonicalize", {}, None, (dataclasses.replace(step, did=places[1:]),))).count("no-op") == SHOWN


@pytest.mark.slow
def test_weights_that_do_not_exist_yet_are_predicted() -> None:
    said = explained("lora(rank=2) | quantize(nf4)", predict="each", depth=1)
    start, adapted, stored = said.start, said.steps[0].predicted, said.steps[1].predicted
    assert start is not None and adapted is not None and stored is not None
    assert start.parts["optimizer"] > adapted.parts["optimizer"] and stored.parts["weights"] < adapted.parts["weights"]


@pytest.mark.slow
def test_a_prediction_that_fails_is_named() -> None:
    said = explained("memory(1KiB)", predict="ends", depth=1)
    assert said.steps[-1].predicted is None and any("cannot hold this step" in note for note in said.notes) and said.start is not None


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
def test_arguments_are_documented(cls: type) -> None:
    text = {"lora": "lora(rank=2)", "memory": "memory(1GiB)"}.get(cls.name, cls.name)
    (pass_,) = parse(text)
    found = arguments(pass_)
    assert [argument.name for argument in found if not argument.says] == [], f"the Args of {cls.name} leave some out"
    assert str(parse(f"{cls.name}({', '.join(f'{each.name}={each.value}' for each in found)})")) == str(pass_)


def test_advice_is_for_reasons_that_exist() -> None:
    sources = "\n".join(path.read_text() for folder in ("ir", "passes", "kernels") for path in (ROOT / "src/fxopt" / folder).rglob("*.py"))
    assert [words for words, _ in ADVICE if words not in sources] == []


def test_a_pass_that_changed_nothing_says_what_it_looked_for() -> None:
    said = explained("causal | dead_code | loss", depth=1)
    notes = {step.text: step.notes for step in said.steps}
    assert notes["causal"] == (f"changed nothing: there is no {LOOKS_FOR['causal'].removeprefix('a ')}",) and "nobody reads" in notes["dead_code"][-1]
    loss = next(step for step in said.steps if step.text == "loss")
    assert loss.did_not and loss.notes == ("changed nothing",), "the reasons are said once"
    assert set(LOOKS_FOR) <= {cls.name for cls in PASSES}


@given(st.sets(st.integers(0, 12), min_size=1), st.booleans())
def test_folding_paths(numbers: set[int], reverse: bool) -> None:
    said = folded([f"model.layers.{number}.mlp" for number in sorted(numbers, reverse=reverse)])
    assert said.startswith("model.layers.") and said.endswith(".mlp")
    shown = [int(number) for number in re.findall(r"\d+", said)]
    assert min(shown) == min(numbers) and set(shown) <= numbers
    if numbers == set(range(min(numbers), max(numbers) + 1)):
        assert max(shown) == max(numbers)
    elif len(numbers) <= 6:
        assert set(shown) == numbers


def test_folding_paths_of_several_kinds() -> None:
    assert folded(["", "a.0", "a.1", "b"]) == "<root>, a.0 … 1, b" and folded(["a.0.b.3", "a.1.b.3"]) == "a.0 … 1.b.3"
    assert folded([f"m{i}.x" for i in "abcdef"]) == "ma.x, mb.x, mc.x, md.x and 2 more"


@pytest.mark.slow
def test_what_was_not_done_comes_with_what_to_do() -> None:
    """Every seventh model of the zoo, two pipelines: no reason without advice."""
    without: dict[str, str] = {}
    seen = 0
    for name in list(ZOO)[::7]:
        args, kwargs = call_of(ZOO[name].inputs())
        for passes in (fxopt.presets.finetune(rank=2), "canonicalize | pack | precision(bf16) | quantize(nf4)"):
            try:
                opt = fxopt.optimize(ZOO[name].build().train(), passes, inputs=args or kwargs, check=False)
            except FxoptError:
                continue  # nothing to quantize, or a mask that cannot be packed
            for step in () if opt.parts else opt.explain(predict="none").steps:
                seen += len(step.did_not)
                without |= {found.reason: name for found in step.did_not if not found.advice}
    assert seen > 50 and not without
