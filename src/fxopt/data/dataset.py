"""A data set of text: rows of a file as tokens with labels, read once before training, so that everything it holds is known and told."""

from __future__ import annotations

import datetime
import random
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fxopt.data import formats
from fxopt.data.encoding import Encoded, encode, padded
from fxopt.data.files import open_rows
from fxopt.data.messages import Sample
from fxopt.data.spans import TRAIN_ON
from fxopt.data.tokenizer import load_tokenizer
from fxopt.errors import DataError

LONG = ("cut", "drop", "split")
_BINS = 10
_PIECES = 2**20  # more than the pieces that a row becomes


@dataclass
class Counts:
    """What reading all rows found.

    Attributes:
        rows: that were read. samples: that are trained on. tokens, supervised: of the samples. cut: samples that lost their end to
            `length`, and `cut_tokens` with it. dropped: rows by the reason for which they are left out. straddling: tokens that hold both
            prompt and answer. special: rows in which a message or text holds special tokens itself.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    cut: int = 0
    cut_tokens: int = 0
    straddling: int = 0
    special: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Dataset:
    """Rows as samples {"input_ids", "labels"}, each [tokens] int64; -100 where nothing is learned. It fits `fxopt.Loader`, a torch DataLoader
    (with `collate_fn=dataset.collate`) and anything that reads items by number.

    Every row is read, checked and encoded when the data set is made; what is kept of it are its length and place. It is encoded again
    when it is asked for, so the memory is that of `source`: for JSON lines and text 40 bytes a row.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a list of mappings, or a Hugging Face data set.
        tokenizer: see `load_tokenizer`.
        format: of the rows, one of `fxopt.data.formats.FORMATS`; None: the one that they fit. columns: our column names to theirs.
        length: tokens of a sample at most; None: any. long: what happens to longer ones: `cut`: their end is left out (a sample without a
            supervised token left is dropped); `drop`: they are left out; `split`: they become several samples (only with `train_on="all"`).
        train_on: `assistant`: every answer of a conversation; `completion`: the last one, or what follows a prompt; `turns`: every answer in
            a sample of its own that ends with it, for templates that write earlier answers in another way; `all`: every token. None:
            assistant for conversations, completion for prompts, all for text.
        template: the chat template: a file, or one of `fxopt.data.template.BUILT_IN`; None: the tokenizer's. template_arguments: variables
            that it reads, such as {"enable_thinking": False}. date: what `strftime_now` gives (ISO, such as "2026-01-31"); None: today.

    Attributes:
        counts: see `Counts`. lengths: tokens of each sample. reader: the rows and their format. conversations: whether they go
            through a chat template.

    Raises:
        DataError: rows that are broken, with their place; a template that does not tell which tokens are the assistant's; no sample is left.
    """

    def __init__(self, source: Any, tokenizer: Any, *, format: str | None = None, columns: Mapping[str, str] | None = None, length: int | None = None, long: str = "cut",
                 train_on: str | None = None, template: str | None = None, template_arguments: Mapping[str, Any] | None = None, date: str | None = None) -> None:
        self.tokenizer = load_tokenizer(tokenizer)
        self.reader = formats.read(open_rows(source), format, columns)
        first = self.reader[0]
        self.conversations = first.messages is not None
        self.train_on = _train_on(first, train_on)
        if long not in LONG or long == "split" and (self.train_on != "all" or length is None):
            raise DataError(f"`long` is {long!r}.", where="long", do=f"It is one of {', '.join(LONG)}; split is for `train_on: all` with a `length`.")
        if length is not None and length < 2:
            raise DataError(f"`length` is {length}: a sample needs two tokens to learn one.", where="length")
        self.length, self.long = length, long
        settings: dict[str, Any] = {"arguments": dict(template_arguments or {})}
        if date is not None:
            settings["now"] = _date(date)
        self.template = self.tokenizer.template(template, **settings)
        self.counts = Counts()
        self._places, self.lengths = array("q"), array("q")  # row * _PIECES + piece; tokens
        self._scan()

    def _scan(self) -> None:
        for row in range(len(self.reader)):
            sample = self.reader[row]
            self.counts.rows += 1
            self.counts.special += _holds_special(sample, self.tokenizer.stop)
            for piece, made in enumerate(self._pieces(row, sample)):
                reason = self._unusable(made)
                if reason is not None:
                    self.counts.dropped[reason] += 1
                    continue
                self._places.append(row * _PIECES + piece)
                self.lengths.append(len(made.ids))
                self.counts.samples += 1
                self.counts.tokens += len(made.ids)
                self.counts.supervised += made.supervised
                self.counts.straddling += made.straddling
                self.counts.cut += made.cut > 0
                self.counts.cut_tokens += made.cut
        if not self.lengths:
            reasons = "; ".join(f"{number:,} {reason}" for reason, number in self.counts.dropped.items())
            raise DataError(f"No sample is left to train on: {reasons}.", where=self.reader.rows.name, do="Raise `length`, or change `train_on`.")

    def _unusable(self, made: Encoded) -> str | None:
        if self.long == "drop" and made.cut:
            return f"longer than {self.length:,} tokens"
        if not made.supervised:
            return f"no supervised token within {self.length:,} tokens" if made.cut else "nothing to learn"
        return None

    def _pieces(self, row: int, sample: Sample) -> list[Encoded]:
        """What a row becomes, what is unusable included."""
        samples = _turns(sample) if self.train_on == "turns" else [sample]
        kind = "completion" if self.train_on == "turns" else self.train_on
        try:
            made = [encode(one, self.tokenizer, self.template, kind) for one in samples]
        except DataError as error:
            raise DataError(error.what, where="; ".join(place for place in (self.reader.rows.place(row), error.where) if place), do=error.do) from error
        if self.length is None:
            return made
        if self.long == "split":
            return [one.slice(start, start + self.length) for one in made for start in range(0, len(one.ids), self.length)]
        return [one.slice(0, self.length, cut) if (cut := max(0, len(one.ids) - self.length)) else one for one in made]

    def __len__(self) -> int:
        return len(self.lengths)

    def encoded(self, index: int) -> Encoded:
        """A sample with the text of each token.

        Raises:
            IndexError: there is no such sample.
        """
        row, piece = divmod(self._places[index], _PIECES)
        return self._pieces(row, self.reader[row])[piece]

    def __getitem__(self, index: Any) -> Any:
        """As of a list: a sample, or of a slice a `Part`."""
        return Part(self, range(len(self))[index]) if isinstance(index, slice) else self.encoded(index).tensors()

    def place(self, index: int) -> str:
        """Where the row of a sample stands."""
        return self.reader.rows.place(self._places[index] // _PIECES)

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Samples as a batch padded on the right: see `fxopt.data.encoding.padded`."""
        return padded(samples, self.tokenizer.pad)

    def split(self, held_out: int, seed: int = 0) -> tuple[Part, Part]:
        """(the rest, `held_out` rows drawn by a seed). All samples of a row are on one side.

        Raises:
            DataError: there are not that many rows, or none is left.
        """
        rows = sorted({place // _PIECES for place in self._places})
        if not 0 < held_out < len(rows):
            raise DataError(f"{held_out:,} of {len(rows):,} rows cannot be held out.", where="held_out")
        held = set(random.Random(seed).sample(rows, held_out))
        sides: tuple[list[int], list[int]] = [], []
        for i, place in enumerate(self._places):
            sides[place // _PIECES in held].append(i)
        return Part(self, sides[0]), Part(self, sides[1])

    @property
    def described(self) -> dict[str, Any]:
        """What was found, as plain values: what `text` says."""
        counts = self.counts
        return {"source": self.reader.rows.name, "format": self.reader.format.name, "columns": list(self.reader.format.columns), "why": self.reader.why, "unread": list(self.reader.unread),
                "tokenizer": self.tokenizer.name, "template": self.template.name if self.template is not None and self.conversations else None, "train_on": self.train_on,
                "length": self.length, "long": self.long, "rows": counts.rows, "samples": counts.samples, "tokens": counts.tokens, "supervised": counts.supervised, "cut": counts.cut,
                "cut_tokens": counts.cut_tokens, "dropped": dict(counts.dropped), "straddling": counts.straddling, "special": counts.special, "histogram": self.histogram(), "notes": self.notes}

    @property
    def notes(self) -> list[str]:
        """What should be known before training."""
        counts, found = self.counts, list(self.tokenizer.notes)
        if counts.cut:
            found.append(f"{counts.cut:,} samples were cut to {self.length:,} tokens and lost {counts.cut_tokens:,} tokens, their end token among them")
        found += [f"{number:,} dropped: {reason}" for reason, number in counts.dropped.items()]
        if counts.straddling:
            found.append(f"{counts.straddling:,} tokens hold the end of a prompt and the beginning of an answer; they are not supervised")
        if counts.special:
            found.append(f"{counts.special:,} rows hold the text of a token that ends a turn; it is read as that token")
        if self.tokenizer.eos is None and not self.conversations:
            found.append("the tokenizer has no EOS: texts do not end")
        if self.template is not None and self.conversations and self.template.dated:
            found.append(f"the template writes the date into rows ({self.template.now:%Y-%m-%d}); set `date` for a run that can be repeated")
        return found

    @property
    def text(self) -> str:
        """What was found, in a few lines."""
        counts = self.counts
        what = self.template.name if self.template is not None and self.conversations else "none, the text as it is"
        lines = [self.reader.text, f"template: {what}; trained on: {self.train_on}",
                 f"{counts.samples:,} samples, {counts.tokens:,} tokens, {counts.supervised:,} supervised ({counts.supervised / counts.tokens:.1%})", *self.notes]
        return "\n".join(lines)

    def histogram(self) -> list[tuple[int, int, int]]:
        """(shortest, longest, samples) of up to ten ranges of lengths."""
        least, most = min(self.lengths), max(self.lengths)
        width = max(1, -(-(most - least + 1) // _BINS))
        found = Counter((length - least) // width for length in self.lengths)
        return [(least + i * width, min(most, least + (i + 1) * width - 1), found[i]) for i in range((most - least) // width + 1)]


class Part:
    """Some samples of a data set: see `Dataset.split` and `Dataset.__getitem__`."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, array("q", indices)
        self.lengths = array("q", (dataset.lengths[i] for i in indices))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        """As of a list: a sample, or of a slice a `Part`."""
        return Part(self.dataset, self.indices[index]) if isinstance(index, slice) else self.dataset[self.indices[index]]

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `Dataset.collate`."""
        return self.dataset.collate(samples)


def _turns(sample: Sample) -> list[Sample]:
    """A sample for each answer, which ends with it."""
    messages = sample.messages or ()
    return [replace(sample, messages=messages[: i + 1], prompt=i) for i, message in enumerate(messages) if message["role"] == "assistant" and i >= (sample.prompt or 0)]


def _train_on(sample: Sample, given: str | None) -> str:
    known = (*TRAIN_ON, "turns")
    if given is not None and given not in known:
        raise DataError(f"`train_on` is {given!r}.", where="train_on", do=f"It is one of {', '.join(known)}.")
    if given == "turns" and sample.messages is None:
        raise DataError("The rows are text, which has no turns.", where="train_on", do="Write `train_on: completion` or `all`.")
    return given or ("all" if sample.messages is None and sample.prompt is None else "completion" if sample.prompt is not None else "assistant")


def _holds_special(sample: Sample, stop: frozenset[str]) -> bool:
    texts = [str(message.get("content") or "") for message in sample.messages] if sample.messages is not None else [sample.text]
    return any(token in text for text in texts for token in stop)


def _date(given: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(str(given))
    except ValueError as error:
        raise DataError(f"`date` is {given!r}.", where="date", do="Write it as 2026-01-31.") from error
