"""What the rows of a data set mean: five formats, found by looking at rows, and read into one kind of sample.

The formats are those that TRL, Alpaca and ShareGPT made common: {text}, {messages}, {prompt, completion}, {instruction, input, output}
and {conversations: [{from, value}]}.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fxopt.data import messages
from fxopt.data.files import Row, Rows
from fxopt.data.messages import Messages, Sample
from fxopt.errors import DataError

LOOKED_AT = 200
"""Rows that are looked at to find a format, spread over the file. Every row is held to it when it is read."""


@dataclass(frozen=True)
class Format:
    """A kind of row.

    Attributes:
        needed, optional: its columns. fits: whether the needed columns hold what they should. read: a row to a sample.
    """

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    fits: Callable[[Row], bool]
    read: Callable[[Row, str], Sample]

    @property
    def columns(self) -> tuple[str, ...]:
        """All that are read."""
        return (*self.needed, *self.optional)

    def __reduce__(self) -> Any:
        return _named, (self.name,)  # processes that load data take it by its name


def _strings(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row.get(name), str) for name in names)


def _list_with(name: str, *keys: str) -> Callable[[Row], bool]:
    """Whether a column is a list of mappings that have the keys."""
    return lambda row: isinstance(row.get(name), list) and bool(row[name]) and all(isinstance(item, Mapping) and all(key in item for key in keys) for item in row[name])


def _pair(row: Row) -> bool:
    return _strings("prompt", "completion")(row) or _list_with("prompt", "role")(row) and _list_with("completion", "role")(row)


def _text(row: Row, where: str) -> Sample:
    return Sample(text=row["text"])


def _messages(row: Row, where: str) -> Sample:
    return Sample(messages.checked(row["messages"], where), messages.tools(row.get("tools"), where))


def _prompt_completion(row: Row, where: str) -> Sample:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        return Sample(text=prompt + completion, prompt=len(prompt))
    before = messages.checked(prompt, where)
    return Sample((*before, *messages.checked(completion, where)), messages.tools(row.get("tools"), where), prompt=len(before))


def _alpaca(row: Row, where: str) -> Sample:
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise DataError(f"`input` is a {type(extra).__name__}, not text.", where=where)
    said: Messages = ({"role": "user", "content": f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]}, {"role": "assistant", "content": row["output"]})
    return Sample(messages.with_system(row.get("system"), said, where))


def _sharegpt(row: Row, where: str) -> Sample:
    return Sample(messages.with_system(row.get("system"), messages.from_sharegpt(row["conversations"], where), where), messages.tools(row.get("tools"), where))


FORMATS = {made.name: made for made in (
    Format("text", ("text",), (), _strings("text"), _text),
    Format("messages", ("messages",), ("tools",), _list_with("messages", "role"), _messages),
    Format("prompt_completion", ("prompt", "completion"), ("tools",), _pair, _prompt_completion),
    Format("alpaca", ("instruction", "output"), ("input", "system"), _strings("instruction", "output"), _alpaca),
    Format("sharegpt", ("conversations",), ("system", "tools"), _list_with("conversations", "from", "value"), _sharegpt),
)}  # fmt: skip


def _named(name: str) -> Format:
    return FORMATS[name]


@dataclass(frozen=True)
class Reader:
    """Rows as samples.

    Attributes:
        format: of the rows. columns: theirs by our names, where they differ. why: how the format was found. unread: columns that are not
            looked at, in the rows that were.
    """

    rows: Rows
    format: Format
    columns: Mapping[str, str]
    why: str
    unread: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """A row as a sample.

        Raises:
            DataError: the row is broken or of another format, with its place.
        """
        row = renamed(self.rows[index], self.columns)
        if not self.format.fits(row):
            raise _unfit(row, self.format, self.rows.place(index))
        return self.format.read(row, self.rows.place(index))

    @property
    def text(self) -> str:
        """The format and its reason, in a line."""
        names = ", ".join(f"{name} (from {self.columns[name]})" if name in self.columns else name for name in self.format.columns if name in self._seen)
        return f"{self.format.name}: {names}; {len(self):,} rows; {self.why}" + (f"; not read: {', '.join(self.unread)}" if self.unread else "")

    @property
    def _seen(self) -> set[str]:
        return {*self.format.needed, *(name for i in _chosen(len(self)) for name in renamed(self.rows[i], self.columns))}


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """A row under our column names."""
    if not columns:
        return row
    taken = set(columns.values())
    return {**{name: value for name, value in row.items() if name not in taken}, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def read(rows: Rows, format: str | None = None, columns: Mapping[str, str] | None = None) -> Reader:
    """Finds, or takes, the format of rows.

    Args:
        format: a name of `FORMATS`; None: the one format that all rows that are looked at fit. columns: our column names to theirs.

    Raises:
        DataError: an unknown format; rows that fit none, several, or not all the same.
    """
    columns = dict(columns or {})
    known = {name for made in FORMATS.values() for name in made.columns}
    if unknown := [name for name in columns if name not in known]:
        raise DataError(f"No format has a column {unknown[0]!r}.", where="columns", do=f"Write `columns: {{ours: theirs}}`; ours are {', '.join(sorted(known))}.")
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, 1)
        raise DataError(f"There is no format {format!r}.", where="format", do=f"Do you mean {near[0]}?" if near else f"There are {', '.join(FORMATS)}.")
    chosen = _chosen(len(rows))
    looked = {i: renamed(rows[i], columns) for i in chosen}
    if missing := [theirs for theirs in columns.values() if not any(theirs in rows[i] for i in chosen)]:
        raise DataError(f"No row has a column {missing[0]!r}.", where=rows.name, do=f"There are {', '.join(rows[0])}.")
    if format is None:
        made = _found(rows, looked)
        number = f"all {len(chosen):,} rows" if len(chosen) == len(rows) else f"the {len(chosen):,} rows that were looked at"
        why = f"because {number} fit it and no other format"
    else:
        made, why = FORMATS[format], "as asked for"
    unread = {name: None for row in looked.values() for name in row if name not in made.columns}
    reader = Reader(rows, made, columns, why, tuple(unread))
    for i in chosen:
        _ = reader[i]
    return reader


def _chosen(number: int) -> list[int]:
    """Rows to look at: the first, the last, and others between them at equal distances."""
    many = min(number, LOOKED_AT)
    return sorted({round(i * (number - 1) / max(1, many - 1)) for i in range(many)})


def _found(rows: Rows, looked: Mapping[int, Row]) -> Format:
    first: tuple[int, Format] | None = None
    for i, row in looked.items():
        fitting = [made for made in FORMATS.values() if made.fits(row)]
        if len(fitting) > 1:
            names = [made.name for made in fitting]
            raise DataError(f"The row fits {' and '.join(names)}.", where=rows.place(i), do=f"Say which is meant: `format: {names[-1]}`" + f" or `format: {names[0]}`.")
        if not fitting:
            raise _unfit(row, first[1] if first else None, rows.place(i))
        if first is None:
            first = i, fitting[0]
        elif fitting[0] is not first[1]:
            raise DataError(f"The rows are mixed: this one is {fitting[0].name}, that of {rows.place(first[0])} is {first[1].name}.", where=rows.place(i),
                            do=f"Put them into files of their own. (`format: {first[1].name}` alone would refuse this row.)")
    assert first is not None  # `open_rows` gives no empty rows
    return first[1]


def _unfit(row: Row, wanted: Format | None, where: str) -> DataError:
    """Why a row fits no format, or not the one that is wanted."""
    has = ", ".join(f"{name} ({'nothing' if value is None else type(value).__name__})" for name, value in row.items()) or "no columns"
    if {"chosen", "rejected"} <= set(row):
        return DataError("The row is a preference pair (chosen, rejected), which is no format for supervised training.", where=where,
                         do="To train on the preferred answers write `format: prompt_completion` and `columns: {completion: chosen}`.")
    if wanted is not None:
        lacks = [name for name in wanted.needed if row.get(name) is None]
        what = f"lacks {', '.join(lacks)}" if lacks else f"holds something else in {', '.join(wanted.needed)} than {wanted.name} rows do"
        return DataError(f"The row is not {wanted.name}: it {what}. It has {has}.", where=where,
                         do=f"A row of {wanted.name} has {', '.join(wanted.needed)}. Mend or remove the row, or name its columns: `columns: {{{wanted.needed[0]}: …}}`.")
    known = "; ".join(f"{made.name}: {', '.join(made.needed)}" for made in FORMATS.values())
    return DataError(f"The row fits no format. It has {has}.", where=where, do=f"Name the columns, such as `columns: {{instruction: question, output: answer}}`. Formats: {known}.")
