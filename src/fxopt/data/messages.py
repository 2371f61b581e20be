"""Conversations as chat templates take them: checked, with the spellings of different sources made one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxopt.errors import DataError

Messages = tuple[Mapping[str, Any], ...]

_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
             "system": "system", "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool"}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """What a row says: a conversation, or text that is taken as it is.

    Attributes:
        messages: of a conversation, else None. tools: JSON schemas of functions that it may call.
        text: of a row without a conversation.
        prompt: how many messages, or characters of the text, are the prompt of a completion; None: the row does not say.
    """

    messages: Messages | None = None
    tools: tuple[Any, ...] | None = None
    text: str = ""
    prompt: int | None = None


def checked(messages: Any, where: str) -> Messages:
    """Messages as templates take them: entries that are None are left out (tables fill in what some rows lack), parts of text are joined,
    and arguments of calls that are JSON in a string are decoded (templates encode them).

    Raises:
        DataError: a message without a role, or with content that is not text.
    """
    found = []
    for number, message in enumerate(messages, 1):
        place = f"{where}, message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError("A message has no role.", where=place, do='Write {"role": "user", "content": "…"}.')
        made = {name: value for name, value in message.items() if value is not None}
        content = made.get("content")
        if isinstance(content, list):
            made["content"] = "".join(_part(part, place) for part in content)
        elif content is not None and not isinstance(content, str):
            raise DataError(f"The content is a {type(content).__name__}, not text.", where=place)
        if "tool_calls" in made:
            made["tool_calls"] = [_call(call, place) for call in _list(made["tool_calls"], "tool_calls", place)]
        elif content is None:
            raise DataError("A message has neither content nor tool_calls.", where=place)
        found.append(made)
    return tuple(found)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(f"A part of the content is {kind!r}, not text.", where=where, do="Only text can be trained on: leave the row out.")


def _list(value: Any, name: str, where: str) -> list[Any]:
    if isinstance(value, str):  # a table has no room for values of many shapes: they are JSON there
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"`{name}` is no JSON: {error.msg}.", where=where) from error
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, Mapping) for item in value):
        raise DataError(f"`{name}` is not a list of mappings.", where=where)
    return list(value)


def _call(call: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError("A call of a tool has no name.", where=where, do='Write {"type": "function", "function": {"name": "…", "arguments": {…}}}.')
    function = {name: value for name, value in function.items() if value is not None}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise DataError(f"The arguments of {function['name']} are no JSON: {error.msg}.", where=where) from error
    function["arguments"] = arguments
    return {**{name: value for name, value in call.items() if value is not None}, "function": function} if "function" in call else {"type": "function", "function": function}


def tools(value: Any, where: str) -> tuple[Any, ...] | None:
    """The tools of a row: a list of schemas, or that in JSON.

    Raises:
        DataError: it is something else.
    """
    return tuple(_list(value, "tools", where)) or None if value else None


def with_system(system: Any, messages: Messages, where: str) -> Messages:
    """Messages after a system message, if the row has one in a column of its own.

    Raises:
        DataError: it is not text, or the messages have another one.
    """
    if not system:
        return messages
    if not isinstance(system, str):
        raise DataError(f"`system` is a {type(system).__name__}, not text.", where=where)
    if messages and messages[0]["role"] == "system":
        raise DataError("The row has a system message in `system` and another in its conversation.", where=where, do="Keep one of them.")
    return ({"role": "system", "content": system}, *messages)


def from_sharegpt(conversation: Any, where: str) -> Messages:
    """Messages from {"from", "value"}. `function_call` is a call of a tool, in JSON.

    Raises:
        DataError: a speaker that is not known.
    """
    found: list[Any] = []
    for number, turn in enumerate(conversation, 1):
        speaker, value, place = turn["from"], turn["value"], f"{where}, turn {number}"
        if speaker == "function_call":
            found.append({"role": "assistant", "tool_calls": _calls(value, place)})
        elif speaker not in _SHAREGPT:
            raise DataError(f"{speaker!r} is no known speaker.", where=place, do=f"Known are {', '.join(_SHAREGPT)}, function_call.")
        else:
            found.append({"role": _SHAREGPT[speaker], "content": value})
    return checked(found, where)


def _calls(value: Any, where: str) -> list[Any]:
    text = value.strip() if isinstance(value, str) else ""
    return _list(text if text.startswith("[") else f"[{text}]", "function_call", where)
