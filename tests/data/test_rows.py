"""Files and formats: what is written is read, and what is broken, mixed or ambiguous is named by its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxopt.data import extras, formats
from fxopt.data.files import open_rows
from fxopt.data.messages import Sample
from fxopt.errors import DataError

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
_MESSAGE = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["system", "user", "assistant"]), WORDS)
_TURN = st.builds(lambda speaker, value: {"from": speaker, "value": value}, st.sampled_from(["human", "gpt", "system"]), WORDS)
ROWS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "text": st.fixed_dictionaries({"text": WORDS}),
    "messages": st.fixed_dictionaries({"messages": st.lists(_MESSAGE, min_size=1, max_size=3)}),
    "prompt_completion": st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS}),
    "alpaca": st.fixed_dictionaries({"instruction": WORDS, "input": WORDS | st.just(""), "output": WORDS}),
    "sharegpt": st.fixed_dictionaries({"conversations": st.lists(_TURN, min_size=1, max_size=3)}),
}
FLAT = ("text", "prompt_completion", "alpaca")


def wanted(name: str, row: dict[str, Any]) -> Sample:
    """What a row means, written out."""
    if name == "text":
        return Sample(text=row["text"])
    if name == "messages":
        return Sample(tuple(row["messages"]))
    if name == "prompt_completion":
        return Sample(text=row["prompt"] + row["completion"], prompt=len(row["prompt"]))
    if name == "alpaca":
        question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        return Sample(({"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}))
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return Sample(tuple({"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]))


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    elif kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",", quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.sampled_from(sorted(ROWS)).flatmap(lambda name: st.tuples(st.just(name), st.lists(ROWS[name], min_size=1, max_size=5))), kind=st.sampled_from(["jsonl", "json", "parquet", "csv", "tsv"]))
def test_rows_come_back(tmp_path: Path, drawn: tuple[str, list[dict[str, Any]]], kind: str) -> None:
    name, rows = drawn
    if name not in FLAT and kind in ("csv", "tsv"):
        kind = "jsonl"
    reader = formats.read(open_rows(write(tmp_path, kind, rows)))
    assert reader.format.name == name and len(reader) == len(rows)
    assert [reader[i] for i in range(len(rows))] == [wanted(name, row) for row in rows]
    assert reader.text.startswith(f"{name}: ") and f"{len(rows):,} rows" in reader.text


def test_plain_text_has_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\n  \ntwo é\nthree".encode())
    rows = open_rows(tmp_path / "a.txt")
    assert [rows[i]["text"] for i in range(len(rows))] == ["one", "two é", "three"] and rows.place(1).endswith("a.txt, line 4")


def read(rows: list[dict[str, Any]], **settings: Any) -> formats.Reader:
    return formats.read(open_rows(rows), **settings)


ALPACA = {"instruction": "a", "output": "b"}
CHAT = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(("rows", "settings", "message", "place", "cure"), [
    ([{**ALPACA, "text": "c"}], {}, "fits text and alpaca", "row 1", "format: alpaca"),
    ([ALPACA, ALPACA, {"text": "c"}], {}, "The rows are mixed: this one is text, that of the list, row 1 is alpaca", "row 3", "format: alpaca"),
    ([{"question": "a", "answer": "b"}], {}, "fits no format. It has question (str), answer (str)", "row 1", "columns: {instruction: question"),
    ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {}, "preference pair", "row 1", "columns: {completion: chosen}"),
    ([ALPACA, {"instruction": "a", "output": None}], {"format": "alpaca"}, "lacks output", "row 2", "Mend"),
    ([ALPACA, ALPACA | {"output": 3}], {}, "holds something else", "row 2", "Mend"),
    ([ALPACA], {"format": "alpacca"}, "no format 'alpacca'", "format", "alpaca"),
    ([ALPACA], {"columns": {"question": "a"}}, "No format has a column 'question'", "columns", "ours are"),
    ([ALPACA], {"columns": {"text": "body"}}, "No row has a column 'body'", "the list", "There are instruction, output"),
    ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], {}, "'image', not text", "row 1, message 1", "leave the row out"),
    ([{"messages": [{"role": "assistant"}]}], {}, "neither content nor tool_calls", "row 1, message 1", None),
    ([{"conversations": [{"from": "alien", "value": "x"}]}], {}, "'alien' is no known speaker", "row 1, turn 1", "human"),
    ([{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}], {}, "arguments of f are no JSON", "message 1", None),
    ([{"conversations": [{"from": "system", "value": "x"}], "system": "y"}], {}, "another in its conversation", "row 1", "Keep one"),
    ([], {}, "no rows", "the list", None),
])  # fmt: skip
def test_rows_that_are_not_clear_are_errors(rows: list, settings: dict, message: str, place: str, cure: str | None) -> None:
    with pytest.raises(DataError) as caught:
        read(rows, **settings)
    assert message in caught.value.what and place in (caught.value.where or "") and (cure is None or cure in (caught.value.do or ""))


@pytest.mark.parametrize(("name", "content", "message", "place"), [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "no JSON", "a.jsonl, line 3"),
    ("a.jsonl", b'{"text": "a"}\n[1]\n', "holds a list", "a.jsonl, line 2"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "not UTF-8: byte 11", "a.jsonl, line 2"),
    ("a.txt", b"fine\n\xfe\n", "not UTF-8", "a.txt, line 2"),
    ("a.json", b'{"rows": [\n1]}', "neither a JSON array nor", "a.json, line 1"),
    ("a.json", b'[{"text": "a"},\n {"text" "b"}]', "no JSON", "a.json, line 2, column 10"),
    ("a.json", b'"x"', "holds a str", "a.json"),
    ("a.json", b'[{"text": "a"}, 3]', "is a int", "a.json, row 2"),
    ("a.csv", b"text,b\nx,y\nx\n", "has 1 fields, the header 2", "a.csv, line 3"),
    ("a.csv", b'text,b\n"x\nz",y\n"x,y\n', "no CSV", "a.csv, line 4"),
    ("a.csv", b"text,text\nx,y\n", "a name of its own", "a.csv, line 1"),
    ("a.parquet", b"PAR1 no", "no readable Parquet", "a.parquet"),
    ("a.xlsx", b"", ".xlsx is no known kind", "a.xlsx"),
])  # fmt: skip
def test_broken_files_are_named_by_line(tmp_path: Path, name: str, content: bytes, message: str, place: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        rows = open_rows(tmp_path / name)
        formats.read(rows)
    assert message in caught.value.what and (caught.value.where or "").endswith(place)
    with pytest.raises(DataError, match="cannot be read"):
        open_rows(tmp_path / "nothing.jsonl")


def test_json_lines_under_another_name_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\ufeff{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert formats.read(open_rows(tmp_path / "a.json"))[1].text == "b"


def test_columns_are_renamed_and_those_not_read_are_named() -> None:
    reader = read([{"question": "a", "answer": "b", "id": 3, "text": "t"}], format="alpaca", columns={"instruction": "question", "output": "answer"})
    assert reader[0] == wanted("alpaca", ALPACA | {"input": ""}) and reader.unread == ("id", "text")
    assert "instruction (from question)" in reader.text and "as asked for; not read: id, text" in reader.text


def test_spellings_of_messages_become_one() -> None:
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": '[{"name": "f"}]'}
    made = read([row])[0]
    assert made.messages == ({"role": "user", "content": "ab"}, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]})
    assert made.tools == ({"name": "f"},)
    shared = read([{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}, {"from": "observation", "value": "1"}], "system": "s"}])[0]
    assert shared.messages is not None and [message["role"] for message in shared.messages] == ["system", "user", "assistant", "tool"] and shared.messages[2] == made.messages[1]


def test_an_index_of_lines_holds_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 10_000 + str(i)}) + "\n" for i in range(50)))
    rows = open_rows(path)
    assert sum(len(memoryview(value).cast("B")) for value in vars(rows).values() if hasattr(value, "itemsize")) == 50 * 16
    assert rows[17]["text"].endswith("x17")
    with pytest.raises(IndexError):
        rows[50]


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(DataError, match="needs the package fxopt_nothing") as caught:
        extras.load("fxopt_nothing.part", "A test")
    assert caught.value.do == "pip install 'fxopt[data]'"
