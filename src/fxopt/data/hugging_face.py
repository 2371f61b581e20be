"""`tokenizer.json` files, through the package tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxopt.data import extras
from fxopt.errors import DataError


class TokenizersCore:
    """A tokenizer of the package tokenizers: see `fxopt.data.tokenizer.Core`."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.truncation is not None or tokenizer.padding is not None:  # files keep what their last user set
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special: Mapping[str, int] = {token.content: number for number, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special}

    @staticmethod
    def read(file: Path) -> TokenizersCore:
        """From a file.

        Raises:
            DataError: it is damaged, or tokenizers is not installed.
        """
        package = extras.load("tokenizers", "A tokenizer.json")
        try:
            return TokenizersCore(package.Tokenizer.from_file(str(file)))
        except Exception as error:  # the package raises Exception itself
            raise DataError(f"The file holds no tokenizer: {error}", where=str(file)) from error

    @staticmethod
    def of(tokenizer: Any) -> TokenizersCore:
        """From a tokenizer of the package. One that cuts or pads is copied, since ours does not."""
        if tokenizer.truncation is None and tokenizer.padding is None:
            return TokenizersCore(tokenizer)
        package = extras.load("tokenizers", "A fast tokenizer")
        return TokenizersCore(package.Tokenizer.from_str(tokenizer.to_str()))

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Core`. What a post-processor trimmed off a token (leading spaces) counts to it again."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        ranges, last = [], 0
        for start, end in found.offsets:
            end = max(end, last)
            ranges.append((min(start, last), end))  # tokens of one character share its range
            last = end
        return found.ids, ranges

    def decode(self, ids: Sequence[int]) -> str:
        """See `Core`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def added(self) -> tuple[list[int], list[int]]:
        """See `Core`."""
        plain, full = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        start = next((i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain), 0)
        return full[:start], full[start + len(plain) :]

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()
