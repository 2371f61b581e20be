"""Chat templates: Jinja programs that write a conversation as text, in the environment that Transformers gives them.

What they may use is that of `transformers.PreTrainedTokenizerBase.apply_chat_template` (5.23): a sandbox, trimmed blocks, loop controls,
`tojson`, `raise_exception`, `strftime_now`, and `{% generation %}` around what the assistant writes.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fxopt.errors import DataError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARKS = "fxopt_marks"
_PROBE = "fxopt probe"
# What reasoning is called in a message; Transformers gives templates the first two, whatever name the message has.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Classical templates, for tokenizers that bring none. BOS is written where the tokenizer writes one by itself.
BUILT_IN = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('There is no system role.') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "alpaca": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% else %}"
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
}
MARKERS: dict[str, tuple[str, ...]] = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
                                       "gemma": ("<start_of_turn>", "<end_of_turn>"), "alpaca": ()}
"""The special tokens that the classical templates write, beside BOS and EOS."""


@dataclass(frozen=True)
class Template:
    """A chat template with what it reads beside the messages.

    Attributes:
        sources: the program, by name; "tool_use" is taken for rows with tools, else "default".
        name: where it is from. tokens: special tokens by name (`bos_token`, …). arguments: more variables, such as enable_thinking.
        now: the date and time that `strftime_now` gives.
    """

    sources: Mapping[str, str] = field(repr=False)
    name: str = "a template"
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    now: datetime.datetime = field(default_factory=datetime.datetime.now, repr=False)

    def source(self, tools: Sequence[Any] | None = None) -> str:
        """The program for rows with or without tools.

        Raises:
            DataError: there are several and none is the default.
        """
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise DataError(f"The templates are named {', '.join(self.sources)}; none is the default.", where=self.name, do="Write the one that is meant into a file: `template: FILE.jinja`.")
        return self.sources[name]

    def marks(self, tools: Sequence[Any] | None = None) -> bool:
        """Whether it says with `{% generation %}` what the assistant writes."""
        return _GENERATION.search(self.source(tools)) is not None

    @property
    def dated(self) -> bool:
        """Whether what it writes depends on the day."""
        return any("strftime_now" in source for source in self.sources.values())

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, *, generation_prompt: bool = False) -> str:
        """The conversation as text; with `generation_prompt` the assistant's next turn is begun.

        Raises:
            DataError: the template fails or refuses.
        """
        return self._rendered(messages, tools, generation_prompt, {})

    def render_marked(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> tuple[str, list[tuple[int, int]]]:
        """The text, and what `{% generation %}` blocks wrote of it: [start, end) in characters.

        The blocks are written between two characters that the text does not hold, which are then taken out; what is left must be the text.

        Raises:
            DataError: as `render`; the marked text is another one, so that places in it mean nothing.
        """
        text = self.render(messages, tools)
        unused = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)  # of Unicode's private use area
        first, end = next(unused), next(unused)
        marked = self._rendered(messages, tools, False, {_MARKS: (first, end)})
        spans: list[tuple[int, int]] = []
        start, length = None, 0
        for piece in re.split(f"([{first}{end}])", marked):
            if piece == first:
                start = length
            elif piece == end and start is not None:
                spans.append((start, length))
                start = None
            else:
                length += len(piece)
        if marked.replace(first, "").replace(end, "") != text or start is not None:
            raise DataError("The template changes what its {% generation %} blocks wrote, so that it cannot be found again.", where=self.name,
                            do="Leave the blocks out of a copy of the template: `template: FILE.jinja`.")
        return text, spans

    def _rendered(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, generation_prompt: bool, more: Mapping[str, Any]) -> str:
        wrap = self._wants_parts
        values = {**self.tokens, **self.arguments, **more}
        return self._run([_reasoned(message, wrap) for message in messages], tools, generation_prompt, values)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the content of messages is to be a list of parts: some templates leave out, or fail on, a text."""
        for parts in (False, True):
            try:
                if _PROBE in self._run([_reasoned({"role": "user", "content": _PROBE}, parts)], None, False, {**self.tokens, **self.arguments}):
                    return parts
            except DataError:
                pass
        return False

    def _run(self, messages: list[dict[str, Any]], tools: Sequence[Any] | None, generation_prompt: bool, values: Mapping[str, Any]) -> str:
        program = _compiled(self.source(tools), self.name)
        try:
            return program.render(messages=messages, tools=list(tools) if tools else None, documents=None,
                                  add_generation_prompt=generation_prompt, strftime_now=self.now.strftime, **values)
        except Exception as error:  # a program of somebody else may raise anything
            line = getattr(error, "lineno", None)
            raise DataError(f"The chat template fails: {type(error).__name__}: {error}", where=f"{self.name}, line {line}" if line else self.name,
                            do="The template may not know a role, or want roles in turns. Change the rows, or give another `template`.") from error


def _reasoned(message: Mapping[str, Any], parts: bool) -> dict[str, Any]:
    if parts and isinstance(message.get("content"), str):
        message = {**message, "content": [{"type": "text", "text": message["content"]}]}
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return dict(message) if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: writes its body, between marks where `render_marked` asks for them."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Jinja's parser has met the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = nodes.Call(nodes.ExtensionAttribute(self.identifier, "written"), [nodes.ContextReference()], [], None, None)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def written(self, context: Context, caller: Macro) -> str:
        """What the block writes."""
        begin, end = context.get(_MARKS) or ("", "")
        return f"{begin}{caller()}{end}"


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=256)
def _compiled(source: str, name: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(f"The chat template is no Jinja template: {error}", where=f"{name}, line {getattr(error, 'lineno', '?')}") from error


def sources_of(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a Hugging Face folder, by name: `chat_template.jinja` and `additional_chat_templates/*.jinja`, else
    `chat_template` of tokenizer_config.json (text, or a list of names and texts) or of chat_template.json. Empty: there is none.

    Args:
        config: what tokenizer_config.json holds.
    """
    found = {}
    if (main := folder / "chat_template.jinja").is_file():
        found = {"default": main.read_text(encoding="utf-8")}
    else:
        given = config.get("chat_template")
        if given is None and (file := folder / "chat_template.json").is_file():
            given = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
        if isinstance(given, str):
            found = {"default": given}
        elif isinstance(given, list):
            found = {entry["name"]: entry["template"] for entry in given}
    return found | {file.stem: file.read_text(encoding="utf-8") for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
