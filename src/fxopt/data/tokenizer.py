"""Tokenizers behind one interface: text to ids with the characters each stands for, special tokens, the chat template.

`load_tokenizer` reads `tokenizer.json` (package tokenizers) or a sentencepiece model (`tokenizer.model`, package sentencepiece). Where a
folder has both, they must agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fxopt.data import template as templates
from fxopt.data.hugging_face import TokenizersCore
from fxopt.data.sentence_piece import SentencePieceCore
from fxopt.data.spans import Ends
from fxopt.errors import DataError

JSON, MODEL = "tokenizer.json", "tokenizer.model"
# Texts on which two tokenizers of a folder are compared: scripts, white space, numbers, code, characters outside the vocabulary, composed ones.
SAMPLES = (
    "The quick brown fox jumps over the lazy dog.", "  two leading spaces", "a  b   c    d", "trailing ", "tab\tand\nnew\n\nlines\r\n", "1234567890 3.14 1,000,000", "don't we'll I'm",
    "naïve café Ångström", "e\u0301 \u00e9", "Привет, мир", "日本語のテキスト", "مرحبا بالعالم", "🙂👩‍👩‍👧 flags 🇩🇪", "def f(x):\n    return x ** 2  # done", "<b>bold</b> & co", "\u00a0nbsp\u200bzero\u2028line",
    "ﬁ ½ ①", "\u2581lower", "http://example.org/?q=a%20b", "…—“quoted”", "aaaaaaaaaaaaaaaaaaaaaaaa", "\U00010348 \u0a97", "\x07bell", " ", "\n", "",
)  # fmt: skip


class Core(Protocol):
    """What a package does: text to ids and back."""

    special: Mapping[str, int]
    """Special tokens by their text: those never written by ordinary text."""

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters [start, end) of each; special tokens in the text are recognised, none are added. The ranges tile the
        text: white space that belongs to no token counts to the next one."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""

    def added(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text by itself."""

    def __len__(self) -> int:
        """Ids are below this."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Attributes:
        core: what encodes. name: where it is from. named: special tokens by name (`bos_token`, …). sources: chat templates by name.
        before, after: ids that it puts around a text by itself. eos: the id that ends a text; None: it has none. stop: the texts of tokens
            at which generation stops: EOS and those of generation_config.json.
        notes: what there is to say about it.
    """

    core: Core
    name: str
    named: Mapping[str, str]
    sources: Mapping[str, str]
    before: tuple[int, ...]
    after: tuple[int, ...]
    eos: int | None
    stop: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.core)

    @property
    def ends(self) -> Ends:
        """What may end a turn of a conversation."""
        texts = {*self.core.special, *([self.named["eos_token"]] if "eos_token" in self.named else [])}
        return Ends(tuple(sorted(texts, key=lambda text: (-len(text), text))), self.stop)

    @property
    def pad(self) -> int:
        """An id for padding that is not EOS: the pad token, else another special token, else 0 or 1. Labels and attention masks go by
        position, so that any id would do; but whoever looks for the end by its id must not find padding."""
        names = [self.named[name] for name in ("pad_token", "unk_token", "bos_token") if name in self.named]
        ids = [self.core.special[name] for name in names if name in self.core.special]
        return next(found for found in (*ids, *self.core.special.values(), 0, 1) if found != self.eos)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and characters of each: see `Core`. Nothing is added.

        Raises:
            DataError: the text holds half a surrogate pair (JSON can write one: "\\ud800"), which no tokenizer reads.
        """
        if not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):
            raise DataError(f"Character {half.start()} of the text is half a surrogate pair, \\u{ord(half[0]):04x}.", do="Mend or remove the row.")
        return self.core.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self.core.decode(ids)

    def template(self, name: str | None = None, **settings: Any) -> templates.Template | None:
        """A chat template with this tokenizer's special tokens.

        Args:
            name: of `fxopt.data.template.BUILT_IN`, or a file; None: the tokenizer's own (None if it has none).
            settings: of `Template`: arguments, now.

        Raises:
            DataError: no such template; a classical one whose special tokens this tokenizer does not know.
        """
        if name is None:
            return templates.Template(self.sources, f"the chat template of {self.name}", self.named, **settings) if self.sources else None
        if name not in templates.BUILT_IN:
            file = Path(name)
            if not file.is_file():
                raise DataError(f"There is no chat template {name!r}.", where="template", do=f"Give a file, or one of {', '.join(templates.BUILT_IN)}.")
            return templates.Template({"default": file.read_text(encoding="utf-8")}, str(file), self.named, **settings)
        if missing := [token for token in templates.MARKERS[name] if token not in self.core.special]:
            raise DataError(f"The template {name} writes {', '.join(missing)}, which are not special tokens of the tokenizer.", where=self.name,
                            do="They would be learned as pieces of text. Take a template that the tokenizer has tokens for; alpaca needs EOS alone.")
        if "eos_token" in templates.BUILT_IN[name] and "eos_token" not in self.named:
            raise DataError(f"The template {name} ends an answer with EOS, and the tokenizer has none.", where=self.name, do="Give another template.")
        named = self.named if self.before else {key: value for key, value in self.named.items() if key != "bos_token"}
        return templates.Template({"default": templates.BUILT_IN[name]}, name, named, **settings)


def load_tokenizer(source: Any) -> Tokenizer:
    """A tokenizer.

    Args:
        source: a Hugging Face folder; a file in one (`tokenizer.json`, or a sentencepiece `….model`); or a fast tokenizer of
            Transformers.

    Raises:
        DataError: there is no tokenizer, its package is not installed, or the two of a folder differ.
    """
    if isinstance(source, Tokenizer):
        return source
    if not isinstance(source, (str, Path)):
        return _of_transformers(source)
    path = Path(source)
    if path.is_file():
        return _made(path.parent, _core(path, path.parent), ())
    json_file, model = path / JSON, path / MODEL
    if json_file.is_file() and model.is_file():
        first = _core(json_file, path)
        return _made(path, first, _compared(first, path))
    for file in (json_file, model):
        if file.is_file():
            return _made(path, _core(file, path), ())
    raise DataError(f"There is neither {JSON} nor {MODEL}.", where=str(path), do="Give a Hugging Face folder, or the file of the tokenizer.")


def _core(file: Path, folder: Path) -> Core:
    return TokenizersCore.read(file) if file.suffix == ".json" else SentencePieceCore(file, _config(folder))


def _compared(first: Core, folder: Path) -> tuple[str, ...]:
    """Compares the two tokenizers of a folder."""
    if not SentencePieceCore.reads(folder / MODEL):
        return (f"{MODEL} is no sentencepiece model and was not compared with {JSON}",)
    second = SentencePieceCore(folder / MODEL, _config(folder))
    if (found := difference(first, second)) is not None:
        raise DataError(f"{JSON} and {MODEL} differ: {found}", where=str(folder), do=f"Name the one that the model was trained with: `tokenizer: {folder / JSON}` or `tokenizer: {folder / MODEL}`.")
    return (f"{JSON} and {MODEL} agree on {len(SAMPLES)} texts and on special tokens",)


def difference(first: Core, second: Core) -> str | None:
    """The first text that two tokenizers encode differently, as a sentence; None if there is none among `SAMPLES` and the special tokens."""
    shared = [token for token in first.special if token in second.special]
    for token in shared:
        if first.special[token] != second.special[token]:
            return f"{token!r} is {first.special[token]} in one and {second.special[token]} in the other."
    for text in (*SAMPLES, *(f"before {token} after{token}" for token in shared)):
        a, b = first.encode(text)[0], second.encode(text)[0]
        if a != b:
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            return f"{text!r} is {_shown(a, place)} in one and {_shown(b, place)} in the other, from token {place + 1} on."
    return None


def _shown(ids: list[int], place: int) -> str:
    start = max(0, place - 2)
    return f"[{'…, ' if start else ''}{', '.join(map(str, ids[start : place + 3]))}{', …' if len(ids) > place + 3 else ''}]"


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json."""
    return _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")


def _json(file: Path) -> dict[str, Any]:
    """The object that a file holds; empty if there is no file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"The file is no JSON: {error}", where=str(file)) from error
    if not isinstance(found, dict):
        raise DataError(f"The file holds a {type(found).__name__}, not an object.", where=str(file))
    return found


def _made(folder: Path, core: Core, notes: tuple[str, ...]) -> Tokenizer:
    config = _config(folder)
    named = {name: text for name, value in config.items() if name.endswith("_token") and isinstance(text := value.get("content") if isinstance(value, dict) else value, str)}
    stop = _json(folder / "generation_config.json").get("eos_token_id")
    stops = [stop] if isinstance(stop, int) else stop or []
    return _with(core, str(folder), getattr(core, "named", {}) | named, templates.sources_of(folder, config), stops, notes)


def _with(core: Core, name: str, named: Mapping[str, str], sources: Mapping[str, str], stops: Sequence[int] = (), notes: tuple[str, ...] = ()) -> Tokenizer:
    before, after = core.added()
    eos = None
    if "eos_token" in named:
        ids, _ = core.encode(named["eos_token"])
        if len(ids) != 1:
            raise DataError(f"EOS is {named['eos_token']!r}, which is no token.", where=name, do="Mend eos_token in tokenizer_config.json.")
        eos = ids[0]
    stop = {text for text, number in core.special.items() if number in stops} | ({named["eos_token"]} if eos is not None else set())
    return Tokenizer(core, name, dict(named), dict(sources), tuple(before), tuple(after), eos, frozenset(stop), notes)


def _of_transformers(given: Any) -> Tokenizer:
    backend = getattr(given, "backend_tokenizer", None)
    if backend is None:
        raise DataError(f"A {type(given).__name__} is no fast tokenizer of Transformers.", where="tokenizer", do="Give a folder with a tokenizer.json, or a fast tokenizer.")
    template = getattr(given, "chat_template", None)
    sources = dict(template) if isinstance(template, Mapping) else {"default": template} if template else {}
    named = {name: text for name, text in given.special_tokens_map.items() if isinstance(text, str)}
    return _with(TokenizersCore.of(backend), f"the {type(given).__name__}", named, sources)
