"""A sample as tokens, each learned or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.data import spans
from fxopt.data.messages import Sample
from fxopt.data.spans import Span
from fxopt.data.template import Template
from fxopt.data.tokenizer import Tokenizer

IGNORED = -100
"""The label of a token that is not learned: what torch's cross entropy leaves out by default."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of a sample.

    Attributes:
        ids: of the tokens. learned: which are labels. text: what they stand for. ranges: the characters [start, end) of each in the text;
            empty for BOS and EOS that were put around it.
        straddling: tokens that begin before a learned span and end in it: they are not learned, since a model that is given the prompt
            cannot write them.
        cut: tokens that were cut off.
    """

    ids: list[int]
    learned: list[bool]
    text: str
    ranges: list[Span]
    straddling: int = 0
    cut: int = 0

    @property
    def supervised(self) -> int:
        """How many tokens are learned. The first token of a row is never: nothing comes before it that could predict it."""
        return sum(self.learned[1:])

    def tensors(self) -> dict[str, Tensor]:
        """`input_ids` and `labels`, each [tokens] int64."""
        return {"input_ids": torch.tensor(self.ids), "labels": torch.tensor([number if learned else IGNORED for number, learned in zip(self.ids, self.learned, strict=True)])}

    def slice(self, start: int, stop: int, cut: int = 0) -> Encoded:
        """Some of the tokens."""
        return Encoded(self.ids[start:stop], self.learned[start:stop], self.text, self.ranges[start:stop], self.straddling, cut)


def encode(sample: Sample, tokenizer: Tokenizer, template: Template | None, train_on: str) -> Encoded:
    """A sample as tokens.

    A conversation is exactly what its template writes: BOS is there once, if the template writes it. A text gets what the tokenizer puts
    before a text by itself (unless the text begins with it), and EOS after it, which is learned.

    Raises:
        DataError: see `fxopt.data.spans.marked`.
    """
    text, learned = spans.marked(sample, template, tokenizer.ends, train_on)
    ids, ranges = tokenizer.encode(text)
    flags, straddling = _flags(ranges, learned)
    if sample.messages is not None:
        return Encoded(ids, flags, text, ranges, straddling)
    before = [] if ids[: len(tokenizer.before)] == list(tokenizer.before) else list(tokenizer.before)
    after = [tokenizer.eos] if tokenizer.eos is not None and ids[-1:] != [tokenizer.eos] else []
    end = len(text)
    return Encoded([*before, *ids, *after], [*[False] * len(before), *flags, *[True] * len(after)], text, [*[(0, 0)] * len(before), *ranges, *[(end, end)] * len(after)], straddling)


def _flags(ranges: Sequence[Span], learned: Sequence[Span]) -> tuple[list[bool], int]:
    """Which tokens lie in a learned span, and how many begin before one and end in it. Both sequences are in order."""
    flags, straddling, place = [], 0, 0
    for start, end in ranges:
        while place < len(learned) and learned[place][1] <= start:
            place += 1
        inside = place < len(learned) and learned[place][0] <= start and end <= learned[place][1]
        straddling += not inside and place < len(learned) and start < learned[place][0] < end
        flags.append(inside)
    return flags, straddling


def padded(samples: Sequence[Mapping[str, Any]], pad: int, multiple: int = 1) -> dict[str, Tensor]:
    """Collates samples into a batch, padded on the right.

    Args:
        samples: `input_ids` and `labels`, each [tokens]. pad: an id; what is padding is said by position, not by this id.
        multiple: the length of a batch is a multiple of it.

    Returns:
        input_ids, attention_mask (1, padding 0), labels (padding -100), each [batch, seq] int64.
    """
    length = -(-max(len(sample["input_ids"]) for sample in samples) // multiple) * multiple
    made = {"input_ids": torch.full((len(samples), length), pad), "attention_mask": torch.zeros(len(samples), length, dtype=torch.int64), "labels": torch.full((len(samples), length), IGNORED)}
    for row, sample in enumerate(samples):
        many = len(sample["input_ids"])
        made["input_ids"][row, :many] = torch.as_tensor(sample["input_ids"])
        made["labels"][row, :many] = torch.as_tensor(sample["labels"])
        made["attention_mask"][row, :many] = 1
    return made
