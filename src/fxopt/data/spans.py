"""Which characters of a conversation the assistant wrote, derived from its chat template and proven on the conversation at hand.

A turn of the assistant is what the model would have to write after the generation prompt, up to and with the token that ends the turn:

    before = the conversation up to the turn, with the generation prompt
    until  = the conversation up to and with the turn
    turn   = what `until` has after `before`, up to its last end token

If the whole conversation begins with `before` and that turn, its place is known. Templates may write an earlier turn elsewhere once the
conversation goes on (a system prompt that stands before the last question). Then its place is looked for by changing its content: the
characters that change are its content, and around them must stand the same turn, character for character. Anything else is refused.
`{% generation %}` blocks are taken as they are, with the end token where they leave it out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.data.messages import Sample
from fxopt.data.template import Template
from fxopt.errors import DataError

Span = tuple[int, int]
TRAIN_ON = ("assistant", "completion", "all")


@dataclass(frozen=True)
class Ends:
    """Texts of special tokens.

    Attributes:
        special: all of them, the longest first: some of these end a turn. stop: those at which a model stops; a turn goes no further.
    """

    special: tuple[str, ...]
    stop: frozenset[str] = frozenset()

    def of(self, text: str) -> list[int]:
        """Where the tokens that a text ends with end, in order, up to the first that stops; white space may stand between and after them."""
        found: list[tuple[int, str]] = []
        place = len(text.rstrip())
        while token := next((token for token in self.special if text.endswith(token, 0, place)), None):
            found.append((place, token))
            place = len(text[: place - len(token)].rstrip())
        found.reverse()
        stops = next((i for i, (_, token) in enumerate(found) if token in self.stop), len(found))
        return [place for place, _ in found[: stops + 1]]


def marked(sample: Sample, template: Template | None, ends: Ends, train_on: str) -> tuple[str, list[Span]]:
    """The text of a sample and the characters [start, end) of it that are learned.

    Args:
        template: for conversations. ends: what may end a turn.
        train_on: `assistant`: all its turns; `completion`: of a conversation what follows the last message that is not an answer (or the
            row's prompt), of a text what follows its prompt; `all`: everything.

    Raises:
        DataError: a sample without what is asked for; a template that does not say which characters are the assistant's.
    """
    if sample.messages is None:
        if train_on == "assistant" or train_on == "completion" and sample.prompt is None:
            raise DataError(f"The row is text without {'an assistant' if train_on == 'assistant' else 'a prompt'}: there is nothing to tell {train_on} apart by.", where="train_on", do="Write `train_on: all`.")
        return sample.text, [(sample.prompt or 0 if train_on == "completion" else 0, len(sample.text))]
    if template is None:
        raise DataError("The rows are conversations, and the tokenizer has no chat template.", where="template", do="Name one, such as `template: chatml`, or a file: `template: FILE.jinja`.")
    if train_on == "all":
        text = template.render(sample.messages, sample.tools)
        return text, [(0, len(text))]
    first = 0 if train_on == "assistant" else _prompt(sample)
    turns = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant" and i >= first]
    if template.marks(sample.tools):
        return _from_blocks(sample, template, ends, turns, first)
    text = template.render(sample.messages, sample.tools)
    return text, [_turn(sample, template, ends, i, text) for i in turns]


def _prompt(sample: Sample) -> int:
    """How many messages are the prompt."""
    assert sample.messages is not None
    if sample.prompt is not None:
        return sample.prompt
    return max((i + 1 for i, message in enumerate(sample.messages) if message["role"] not in ("assistant", "tool")), default=0)


def _until(sample: Sample, template: Template, i: int, text: str) -> str:
    assert sample.messages is not None
    return text if i + 1 == len(sample.messages) else template.render(sample.messages[: i + 1], sample.tools)


def _turn(sample: Sample, template: Template, ends: Ends, i: int, text: str) -> Span:
    """Where turn `i` stands in the text of the whole conversation."""
    assert sample.messages is not None
    before, until = template.render(sample.messages[:i], sample.tools, generation_prompt=True), _until(sample, template, i, text)
    if not until.startswith(before):
        place = len(os.path.commonprefix((before, until)))
        raise _refused(template, i, f"the generation prompt ends with {before[place:][:40]!r} where the turn goes on with {until[place:][:40]!r}")
    shared = len(os.path.commonprefix((until, text)))
    stops = [stop for stop in ends.of(until) if stop > len(before)]
    if not stops:
        raise _refused(template, i, "no special token ends the turn, so that a model would not learn to stop")
    start, stop = len(before), max((stop for stop in stops if stop <= shared), default=stops[0])
    found = (start, stop) if stop <= shared else _elsewhere(sample, template, i, text, until, (start, stop))
    return _whole(sample, template, i, text, found)


def _whole(sample: Sample, template: Template, i: int, text: str, span: Span) -> Span:
    """The span, once what the message says was found in it: templates leave out content that they do not expect. Reasoning in front of the
    answer is not asked for: templates write it in other ways, and leave it out of earlier turns."""
    assert sample.messages is not None
    said = str(sample.messages[i].get("content") or "").rsplit("</think>", 1)[-1].strip()
    if said not in text[slice(*span)]:
        raise _refused(template, i, f"the template wrote {text[slice(*span)][:60]!r}, which lacks the content {said[:60]!r}")
    return span


def _elsewhere(sample: Sample, template: Template, i: int, text: str, until: str, span: Span) -> Span:
    """The turn `until[span]` in a text that does not begin with it: around the characters that change with its content."""
    turn = until[slice(*span)]
    here, there = _changing(sample, template, i, len(sample.messages or ()), text), _changing(sample, template, i, i + 1, until)
    if here is not None and there is not None:
        start = here[0] - (there[0] - span[0])
        if text[slice(*here)] == until[slice(*there)] and start >= 0 and text.startswith(turn, start):
            return start, start + len(turn)
    raise _refused(template, i, f"{turn[:60]!r} is written in another way once the conversation goes on (its reasoning may be left out)")


def _changing(sample: Sample, template: Template, i: int, number: int, text: str) -> Span | None:
    """The characters that change when the content of message `i` does, among the first `number` messages."""
    assert sample.messages is not None
    content = sample.messages[i].get("content")
    if not content or not content.strip():
        return None
    first, last = (next(letter for letter in "XYZ" if letter not in (content[place], content.strip()[place])) for place in (0, -1))
    changed = [*sample.messages[:number]]
    changed[i] = {**changed[i], "content": first + last}
    other = template.render(changed, sample.tools)
    start = len(os.path.commonprefix((text, other)))
    after = len(os.path.commonprefix((text[start:][::-1], other[start:][::-1])))
    return start, len(text) - after


def _from_blocks(sample: Sample, template: Template, ends: Ends, turns: Sequence[int], first: int) -> tuple[str, list[Span]]:
    """What `{% generation %}` blocks wrote, each with the token that ends the turn."""
    assert sample.messages is not None
    text, spans = template.render_marked(sample.messages, sample.tools)
    every = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
    spans = [span for span in spans if span[0] < span[1]]
    if len(spans) == len(every):
        found = [(i, span) for i, span in zip(every, spans, strict=True) if i in turns]
    elif every and not first:
        found = [(every[-1], span) for span in spans]
    else:
        raise _refused(template, turns[0] if turns else first, f"{len(spans)} {{% generation %}} blocks were written for {len(every)} turns: which are of the completion is not known")
    spans = [_ended(sample, template, ends, i, text, span) for i, span in found]
    if len(spans) == len(turns):
        spans = [_whole(sample, template, i, text, span) for i, span in zip(turns, spans, strict=True)]
    return text, spans


def _ended(sample: Sample, template: Template, ends: Ends, i: int, text: str, span: Span) -> Span:
    start, stop = span
    if ends.of(text[start:stop]):
        return start, start + ends.of(text[start:stop])[-1]
    # The block leaves the end token out: it is the one that follows here and at the end of the conversation up to this turn.
    until = _until(sample, template, i, text)
    stops = ends.of(until)
    gap = re.match(r"\s*", text[stop:])
    at = stop + (len(gap[0]) if gap else 0)
    token = next((end for end in ends.special if text.startswith(end, at)), None)
    if token is None or not stops or token not in until[stops[0] - len(token):]:
        raise _refused(template, i, "its {% generation %} block is not followed by a special token that ends the turn")
    return start, at + len(token)


def _refused(template: Template, i: int, why: str) -> DataError:
    return DataError(f"What the assistant wrote in message {i + 1} cannot be told from the text: {why}.", where=template.name,
                     do="Write `train_on: completion` (the last answer alone) if earlier answers are the trouble, or `all`; set `template_arguments` (enable_thinking: false) if the generation prompt is; or give a template with {% generation %} … {% endgeneration %} "
                        "around the answer and its end token: `template: FILE.jinja`.")

