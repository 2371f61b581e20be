"""The pass language: `lora(rank=16, targets=[q_proj, "up_proj"]) | quantize(nf4) | memory(6GiB)` as syntax, without meaning.

    pipeline = [ call { "|" call } ]
    call     = NAME [ "(" [ argument { "," argument } [","] ] ")" ]
    argument = [ NAME "=" ] value
    value    = NUMBER | SIZE | STRING | WORD | "true" | "false" | "none" | list | dict
    list     = "[" [ value { "," value } [","] ] "]"
    dict     = "{" [ value ":" value { "," value ":" value } [","] ] "}"

A bare word is a string, and may be dotted (`model.layers`). A size (`6GiB`, `512MB`) is a number of bytes. Which passes
and arguments exist is decided in `pipeline`, which gives these values to the passes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fxopt.errors import PassError

UNITS = {"B": 1, **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}, **{f"{letter}iB": 1024**n for n, letter in enumerate("KMGT", 1)}}
_CONSTANTS = {"true": True, "false": False, "none": None}
_NUMBER = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+)([eE][+-]?\d+)?|-inf")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\'', re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True)
class Argument:
    """One argument as written: its name (None if positional), its value, and the column it starts at."""

    name: str | None
    value: Any
    at: int


@dataclass(frozen=True)
class Invocation:
    """One pass as written: its name, its arguments, and the column it starts at."""

    name: str
    arguments: tuple[Argument, ...]
    at: int


@dataclass(frozen=True)
class _Token:
    kind: str  # "word" | "value" | "end", or the character itself for punctuation
    value: Any
    at: int


def place(text: str, at: int) -> str:
    """`line 1, column 4` with the line and a caret below it: the `where` of an error."""
    start = text.rfind("\n", 0, at) + 1
    end = text.find("\n", at)
    line = text[start:] if end < 0 else text[start:end]
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - start + 1} of the passes\n    {line}\n    {' ' * (at - start)}^"


def _word(text: str, at: int) -> int:
    """The end of the (dotted) word that starts at `at`; `at` itself if none does."""
    end = at
    while end < len(text):
        last = text[at:end].rsplit(".", 1)[-1]
        if (last + text[end]).isidentifier():
            end += 1
        elif text[end] == "." and last and text[end + 1 : end + 2].isidentifier():
            end += 1
        else:
            break
    return end


def _tokens(text: str) -> list[_Token]:
    tokens, at = [], 0
    while at < len(text):
        if text[at].isspace():
            at += 1
        elif text[at] in "|()[]{},:=":
            tokens.append(_Token(text[at], text[at], at))
            at += 1
        elif found := _NUMBER.match(text, at):
            value: Any = float(found[0]) if any(c in found[0] for c in ".eEf") else int(found[0])
            end = _word(text, found.end())
            unit = text[found.end() : end]
            if unit and unit not in UNITS:
                raise PassError(f"unknown unit {unit!r}", where=place(text, found.end()), do=f"units are {', '.join(UNITS)}")
            tokens.append(_Token("value", int(value * UNITS[unit]) if unit else value, at))
            at = end
        elif found := _STRING.match(text, at):
            tokens.append(_Token("value", _ESCAPE.sub(r"\1", found[1] if found[1] is not None else found[2]), at))
            at = found.end()
        elif (end := _word(text, at)) > at:
            tokens.append(_Token("word", text[at:end], at))
            at = end
        else:
            ends = "the string that starts here does not end" if text[at] in "\"'" else f"unexpected character {text[at]!r}"
            raise PassError(ends, where=place(text, at), do='write passes like `lora(rank=16, targets=["q_proj"]) | quantize(nf4)`')
    tokens.append(_Token("end", None, len(text)))
    return tokens


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.index = text, _tokens(text), 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.index]

    def take(self) -> _Token:
        token = self.token
        self.index += token.kind != "end"
        return token

    def accept(self, kind: str) -> bool:
        if self.token.kind != kind:
            return False
        self.take()
        return True

    def refuse(self, wanted: str) -> PassError:
        got = "the end of the text" if self.token.kind == "end" else repr(self.token.value)
        return PassError(f"expected {wanted}, got {got}", where=place(self.text, self.token.at))

    def separated(self, close: str, item: Any) -> list[Any]:
        """Items with commas between them, up to and including `close`."""
        found = []
        while not self.accept(close):
            found.append(item())
            if self.token.kind != close and not self.accept(","):
                raise self.refuse(f"',' or {close!r}")
        return found

    def pipeline(self) -> list[Invocation]:
        if self.token.kind == "end":
            return []
        calls = [self.call()]
        while self.accept("|"):
            calls.append(self.call())
        if self.token.kind != "end":
            raise self.refuse("'|' or the end of the text")
        return calls

    def call(self) -> Invocation:
        if self.token.kind != "word":
            raise self.refuse("the name of a pass")
        name = self.take()
        arguments = self.separated(")", self.argument) if self.accept("(") else []
        return Invocation(name.value, tuple(arguments), name.at)

    def argument(self) -> Argument:
        start = self.token
        if start.kind == "word" and self.tokens[self.index + 1].kind == "=":
            self.index += 2
            return Argument(start.value, self.value(), start.at)
        return Argument(None, self.value(), start.at)

    def value(self) -> Any:
        if self.token.kind == "value":
            return self.take().value
        if self.token.kind == "word":
            word = self.take().value
            return _CONSTANTS.get(word, word)
        if self.accept("["):
            return tuple(self.separated("]", self.value))
        if self.accept("{"):
            return dict(self.separated("}", self.item))
        raise self.refuse("a value")

    def item(self) -> tuple[Any, Any]:
        at, key = self.token.at, self.value()
        if isinstance(key, (tuple, dict)):
            raise PassError("a list or dict cannot be a key", where=place(self.text, at))
        if not self.accept(":"):
            raise self.refuse("':'")
        return key, self.value()


def bytes_of(text: str) -> int:
    """The bytes of a size as the language writes it: `6GiB`.

    Raises:
        PassError: it is no size.
    """
    first, *rest = _tokens(text)
    if first.kind != "value" or not isinstance(first.value, int) or first.value < 1 or rest[0].kind != "end":
        raise PassError(f"{text!r} is no size", do=f"write a number and a unit: 6GiB (units are {', '.join(UNITS)})")
    return first.value


def read(text: str) -> list[Invocation]:
    """The passes in `text` as written; lists come as tuples.

    Raises:
        PassError: with the line, the column and what was expected there.
    """
    return _Parser(text).pipeline()
