"""What a model will be shown: rows with their supervised tokens marked, and counts."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.text import Text

from fxopt.data.dataset import Dataset
from fxopt.data.encoding import Encoded
from fxopt.data.tokenizer import Tokenizer

OPEN, CLOSE = "⟦", "⟧"
"""Around supervised tokens where there is no colour."""
_BAR = 40
_SUPERVISED = ("bold black on green", "bold black on bright_green")  # in turns, so that the borders of tokens show


def pieces(sample: Encoded, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of each token, and whether it is supervised. Of tokens that share a character (its bytes) the last has it; BOS and EOS that
    were put around a text have their own text."""
    found: list[tuple[str, bool]] = []
    place = sample.ranges[0][0] if sample.ranges else 0
    special = set(tokenizer.core.special.values())
    for i, (number, learned, (start, end)) in enumerate(zip(sample.ids, sample.learned, sample.ranges, strict=True)):
        if start == end and number in special:
            found.append((tokenizer.decode([number]), learned))
            continue
        shared = i + 1 < len(sample.ranges) and sample.ranges[i + 1][1] == end and sample.ranges[i + 1][0] < end
        found.append(("" if shared else sample.text[place:end], learned))
        place = place if shared else end
    return found


def runs(sample: Encoded, tokenizer: Tokenizer) -> list[tuple[str, bool, int]]:
    """Neighbouring tokens of one kind as (text, supervised, tokens)."""
    found: list[tuple[str, bool, int]] = []
    for text, learned in pieces(sample, tokenizer):
        if found and found[-1][1] == learned:
            found[-1] = found[-1][0] + text, learned, found[-1][2] + 1
        else:
            found.append((text, learned, 1))
    return found


def chosen(dataset: Dataset, number: int) -> list[int]:
    """Samples to show: the first ones, and (of several) the longest."""
    longest = max(range(len(dataset)), key=lambda i: dataset.lengths[i])
    first = list(range(min(number, len(dataset))))
    return first if number < 2 or longest in first else [*first[: number - 1], longest]


def data(dataset: Dataset, number: int) -> dict[str, Any]:
    """The preview as plain values: what `Dataset.described` says, and `shown`, each with place, tokens, supervised, ids, labels, runs."""
    shown = []
    for i in chosen(dataset, number):
        sample = dataset.encoded(i)
        shown.append({"place": dataset.place(i), "tokens": len(sample.ids), "supervised": sample.supervised, "cut": sample.cut, "ids": sample.ids, "labels": sample.tensors()["labels"].tolist(),
                      "runs": [{"text": text, "supervised": learned, "tokens": many} for text, learned, many in runs(sample, dataset.tokenizer)]})
    return {**dataset.described, "shown": shown}


def text(dataset: Dataset, number: int, colour: bool = False, width: int = 120) -> str:
    """The preview as text. In colour each supervised token has a green ground, otherwise they stand between `OPEN` and `CLOSE`; a line's end
    is shown as ↵.

    Args:
        number: of samples to show. colour: with the codes of a terminal. width: of lines, in characters.
    """
    console = Console(file=io.StringIO(), force_terminal=colour, no_color=not colour, width=width, highlight=False, soft_wrap=True, legacy_windows=False)
    console.print(dataset.text, markup=False)
    console.print()
    most = max(many for _, _, many in dataset.histogram())
    for low, high, many in dataset.histogram():
        console.print(f"{low:>7,} to {high:>7,} tokens {many:>9,} {'█' * round(_BAR * many / most)}", markup=False)
    for i in chosen(dataset, number):
        sample = dataset.encoded(i)
        cut = f", {sample.cut:,} cut off" if sample.cut else ""
        console.print()
        console.print(Text(f"{dataset.place(i)}: {len(sample.ids):,} tokens, {sample.supervised:,} supervised{cut}", style="bold"))
        console.print(_coloured(sample, dataset.tokenizer) if colour else Text("".join(_visible(f"{OPEN}{text}{CLOSE}" if learned else text) for text, learned, _ in runs(sample, dataset.tokenizer))))
    return console.file.getvalue()  # type: ignore[attr-defined]


def _visible(text: str) -> str:
    return text.replace("\n", "↵\n")


def _coloured(sample: Encoded, tokenizer: Tokenizer) -> Text:
    made = Text()
    for number, (text, learned) in enumerate(pieces(sample, tokenizer)):
        made.append(_visible(text), style=_SUPERVISED[number % 2] if learned else "dim")
    return made
