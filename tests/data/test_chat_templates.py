"""Templates write what Transformers writes; what the assistant said, and only that, is learned, or the template is refused."""

from __future__ import annotations

import datetime
import random
from dataclasses import replace

import pytest
from chats import EXACT, NAMED, TOOLS, WORD, conversation, special_of, templates, tokenizer, transformers_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from fxopt.data import encoding, spans
from fxopt.data.encoding import Encoded, encode
from fxopt.data.messages import Sample
from fxopt.data.spans import Ends
from fxopt.data.template import BUILT_IN, Template
from fxopt.errors import DataError

# Templates whose content must be a list of parts; ours are given text, which they get in such a list.
PARTS = {"trl/idefics3", "trl/idefics3_training", "trl/llava_next", "trl/llava_next_training", "trl/smolvlm", "trl/smolvlm_training"}


def rendered(name: str, messages: list, tools: list | None, prompt: bool) -> str | None:
    """What Transformers writes; None if the template fails."""
    if name in PARTS:
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        return render_jinja_template([messages], tools=tools, chat_template=templates()[name], add_generation_prompt=prompt, **NAMED)[0][0]
    except (TemplateError, TypeError, ValueError):
        return None


def ours(name: str, messages: list, tools: list | None, prompt: bool) -> str | None:
    try:
        return Template({"default": templates()[name]}, name, NAMED).render(messages, tools, generation_prompt=prompt)
    except DataError:
        return None


def test_as_transformers_renders() -> None:
    written = 0
    for number, name in enumerate(sorted(templates())):
        rng = random.Random(number)
        for system, turns, tools, prompt in ((False, 1, False, True), (True, 2, False, False), (False, 2, True, False)):
            if tools and name in PARTS:
                continue
            messages = conversation(rng, system, turns, tools)
            wanted = rendered(name, messages, TOOLS if tools else None, prompt)
            assert ours(name, messages, TOOLS if tools else None, prompt) == wanted, name
            written += wanted is not None
    assert written > 250


def holds(name: str, messages: list, text: str, learned: list[tuple[int, int]], ends: Ends) -> None:
    """What the assistant said is in the learned spans, in order, each turn ends with a special token, and nobody else's words are there."""
    inside = "".join(text[start:end] for start, end in learned)
    outside = "".join(text[start:end] for start, end in zip([0, *(end for _, end in learned)], [*(start for start, _ in learned), len(text)], strict=True))
    answers = [word for message in messages if message["role"] == "assistant" for word in WORD.findall(str(message))]
    assert WORD.findall(inside) == answers, name
    assert not set(answers) & set(WORD.findall(outside)), name
    for start, end in learned:
        assert any(text[start:end].endswith(token) for token in ends.special), (name, text[start:end])
        assert not any(token in text[start : end - 1] for token in ends.stop), (name, text[start:end])


def test_what_the_assistant_says_is_learned_with_every_template() -> None:
    accepted, last_alone, refused = [], [], []
    for number, name in enumerate(sorted(templates())):
        source = templates()[name]
        template = Template({"default": source}, name, NAMED)
        ends = Ends(tuple(sorted(special_of(source), key=len, reverse=True)), frozenset({"</s>", "<|END_OF_TURN_TOKEN|>"}))
        kinds = set()
        for seed in range(2):
            for system in (True, False):
                messages = conversation(random.Random(f"{number} {seed}"), system, 2)
                try:
                    if not all(message["content"].strip() in template.render(messages) for message in messages):
                        continue
                except DataError:
                    continue  # it knows no system role
                try:
                    holds(name, messages, *spans.marked(Sample(tuple(messages)), template, ends, "assistant"), ends)
                    kinds.add("all")
                except DataError as error:
                    assert "cannot be told" in error.what, error
                    try:
                        holds(name, messages[-1:], *spans.marked(Sample(tuple(messages)), template, ends, "completion"), ends)
                        kinds.add("last")
                    except DataError:
                        kinds.add("none")
        (refused if "none" in kinds else last_alone if "last" in kinds else accepted).append(name)
    assert set(BUILT_IN) <= set(accepted)
    # The rest writes earlier answers in another way (reasoning left out, other end tokens), has no end token, or begins a turn that it never writes.
    assert len(accepted) >= 95 and len(refused) <= 10, (len(accepted), last_alone, refused)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(EXACT), seed=st.integers(0, 10**6), turns=st.integers(1, 3), system=st.booleans())
def test_supervised_tokens_decode_to_answers_and_end_tokens(name: str, seed: int, turns: int, system: bool) -> None:
    messages = conversation(random.Random(seed), system and name not in ("gemma", "axolotl/mistral_v1"), turns)
    made = encode(Sample(tuple(messages)), tokenizer(name), tokenizer(name).template(), "assistant")
    wanted = answers(name, messages)
    assert decoded(name, made) == wanted
    assert made.ids == transformers_tokenizer().apply_chat_template(messages, chat_template=templates()[name], tokenize=True, return_dict=False)
    # The check sees masks that are one token off, and a lost end token.
    assert decoded(name, replace(made, learned=[False, *made.learned[:-1]])) != wanted != decoded(name, replace(made, learned=[*made.learned[1:], False]))


def answers(name: str, messages: list) -> str:
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "trl/phi3_training": "<|end|>"}.get(name, "</s>")
    lead = " " if name == "axolotl/mistral_v1" else ""
    return "".join(lead + message["content"] + end for message in messages if message["role"] == "assistant") + ("</s>" if name == "trl/phi3_training" else "")


def decoded(name: str, made: Encoded) -> str:
    return tokenizer(name).decode([number for number, learned in zip(made.ids, made.learned, strict=True) if learned])


def test_an_off_by_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above are able to fail: labels from spans that begin a character late differ."""
    real = spans.marked
    messages = conversation(random.Random(1), False, 2)
    monkeypatch.setattr(encoding.spans, "marked", lambda *args: (lambda text, found: (text, [(start + 1, end) for start, end in found]))(*real(*args)))
    made = encode(Sample(tuple(messages)), tokenizer("chatml"), tokenizer("chatml").template(), "assistant")
    assert decoded("chatml", made) != answers("chatml", messages)


def test_calls_of_tools_are_learned() -> None:
    messages = conversation(random.Random(0), True, 2, tools=True)
    ends = Ends(("<|im_start|>", "<|im_end|>", "</s>"))
    text, learned = spans.marked(Sample(tuple(messages), tuple(TOOLS)), Template({"default": templates()["trl/qwen2_5"]}, "t", NAMED), ends, "completion")
    assert len(learned) == 2 and text[slice(*learned[0])].startswith("<tool_call>") and text[slice(*learned[0])].endswith("<|im_end|>")
    holds("t", messages[3:], text, learned, ends)


REFUSED = {
    "no end": ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", "no special token ends the turn"),
    "another prompt": ("{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}bot: {% endif %}", "the generation prompt ends with 'bot: '"),
    "left out": ("{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last or m.role == 'user' else '') + '</s>' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", "another way"),
    "a piece": ("{% for m in messages %}{{ m.role + ': ' + m.content[:3] + '</s>' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", "lacks the content"),
    "block without end": ("{% for m in messages %}{{ m.role + ': ' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '\n' }}{% endfor %}", "not followed by a special token"),
    "changed block": ("{% set x %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{% endset %}{{ x | length }}</s>", "changes what its"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_templates_that_do_not_tell_are_refused(kind: str) -> None:
    source, why = REFUSED[kind]
    messages = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye now"})
    with pytest.raises(DataError, match=why) as caught:
        spans.marked(Sample(messages), Template({"default": source}, "my template"), Ends(("</s>",)), "assistant")
    assert caught.value.do and "my template" in str(caught.value)


def test_a_turn_that_moves_is_found_again() -> None:
    """The system prompt stands before the last question: earlier turns move, and are the same turns."""
    source = ("{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + (messages[0].content + ' ' if loop.index0 == (messages | selectattr('role', 'equalto', 'user') | list | length) * 2 - 1 else '')"
              " + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}")
    messages = conversation(random.Random(3), True, 3)
    ends = Ends(("</s>",))
    text, learned = spans.marked(Sample(tuple(messages)), Template({"default": source}), ends, "assistant")
    assert [text[slice(*span)] for span in learned] == [message["content"] + "</s>" for message in messages if message["role"] == "assistant"]


def test_templates_see_the_clock_that_they_are_given_and_the_sandbox_holds() -> None:
    now = datetime.datetime(2024, 2, 3)
    assert Template({"default": "{{ strftime_now('%d %b %Y') }}"}, now=now).render([]) == "03 Feb 2024"
    for attack in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}", "{% include 'x' %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"):
        with pytest.raises(DataError, match="The chat template fails"):
            Template({"default": attack}).render([{"role": "user", "content": "x"}])
    with pytest.raises(DataError, match="no Jinja template"):
        Template({"default": "{% for %}"}).render([])


def test_several_templates() -> None:
    both = Template({"default": "plain", "tool_use": "tools"})
    assert both.render([]) == "plain" and both.render([], TOOLS) == "tools"
    with pytest.raises(DataError, match="none is the default"):
        Template({"rag": "x"}).render([])
