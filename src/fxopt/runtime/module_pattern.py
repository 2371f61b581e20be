"""The keys of PEFT's `rank_pattern` and `alpha_pattern`, matched in linear time.

PEFT runs a key from the file as the regular expression `(.*\\.)?(key)$`. Here the part of that language which names
modules is matched without backtracking: characters, `.`, `\\d`, `\\w`, escaped punctuation, classes such as `[0-9]`,
each optionally with `*` or `+`, `^` in front, `$` at the end, and alternatives with `|` at the top level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import re
from typing import Generic, TypeVar

from fxopt.errors import DataError

Value = TypeVar("Value")

LENGTH_LIMIT = 512
"""Longest key, and longest module path, in characters."""
GENERAL_LIMIT = 256
"""Largest number of keys that are not one whole path each (those are looked up, not matched)."""

_TOKEN = re.compile(r"(\\[\W_dw]|\[[\w\-]+\]|[\w\-.])([*+]?)")


@dataclass(frozen=True)
class ModulePatterns(Generic[Value]):
    """Values by module pattern; the first key that matches a path decides, as in PEFT."""

    exact: Mapping[str, tuple[int, Value]]
    general: tuple[tuple[int, tuple["_Alternative", ...], Value], ...]

    @staticmethod
    def of(values: Mapping[str, Value], *, field: str, where: str) -> ModulePatterns[Value]:
        """Reads the keys of `values`.

        Raises:
            DataError: a key is outside the language above, too long, or there are too many.
        """
        exact: dict[str, tuple[int, Value]] = {}
        general = []
        for index, (key, value) in enumerate(values.items()):
            if (path := _whole_path(key)) is not None:
                exact.setdefault(path, (index, value))
            else:
                general.append((index, _alternatives(key, field, where), value))
        if len(general) > GENERAL_LIMIT:
            raise DataError(f"`{field}` has more than {GENERAL_LIMIT} keys that are not whole paths.", where=where)
        return ModulePatterns(exact, tuple(general))

    def get(self, path: str, default: Value) -> Value:
        """The value of the first key that matches `path`."""
        found = [self.exact[path]] if path in self.exact else []
        for index, alternatives, value in self.general:
            if any(alternative.matches(path) for alternative in alternatives):
                found.append((index, value))
                break
        return min(found, key=lambda pair: pair[0])[1] if found else default


@dataclass(frozen=True)
class _Alternative:
    start: bool
    tokens: tuple[tuple[re.Pattern[str], str], ...]

    def matches(self, path: str) -> bool:
        """Whether this matches all of `path`, or all that follows one of its dots. Bit i = position i is reachable."""
        reachable = 1
        if not self.start:
            for position, character in enumerate(path):
                reachable |= (character == ".") << (position + 1)
        for pattern, repeat in self.tokens:
            allowed = sum(1 << position for position, character in enumerate(path) if pattern.match(character))
            if repeat != "*":
                reachable = (reachable & allowed) << 1
            while repeat and (further := reachable | (reachable & allowed) << 1) != reachable:
                reachable = further
            if not reachable:
                return False
        return bool(reachable >> len(path))


def _whole_path(key: str) -> str | None:
    """The path that `key` stands for if it is `^` and a path whose dots are escaped: what fxopt writes."""
    body = key.removeprefix("^")
    path = re.sub(r"\\([\W_])", r"\1", body)
    return path if key.startswith("^") and re.escape(path) == body and len(key) <= 2 * LENGTH_LIMIT else None


def _alternatives(key: str, field: str, where: str) -> tuple[_Alternative, ...]:
    parsed = []
    for text in key.split("|") if len(key) <= LENGTH_LIMIT else ():
        body = text.removeprefix("^").removesuffix("$")
        tokens = _TOKEN.findall(body)
        if not tokens or "".join(atom + repeat for atom, repeat in tokens) != body:
            parsed.clear()
            break
        try:
            parsed.append(_Alternative(text.startswith("^"), tuple((re.compile(atom), rep) for atom, rep in tokens)))
        except re.error:
            parsed.clear()
            break
    if not parsed:
        raise DataError(
            f"`{field}` has a key that is not a simple module pattern: {key!r:.80}.",
            where=where,
            do="Use module names or full paths; character classes, * and + on one character, and | are read too.",
        )
    return tuple(parsed)
