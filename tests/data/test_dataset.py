"""A data set of text: what is learned, cut and dropped is counted; batches; the preview; from a file into training."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import conversation, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import fxopt
from demo import assets
from fxopt.cli import main
from fxopt.data import Dataset, preview
from fxopt.data.encoding import IGNORED, padded
from fxopt.data.tokenizer import load_tokenizer
from fxopt.errors import DataError
from fxopt.train.texts import text_loader

ROWS = [{"messages": conversation(random.Random(i), i % 2 == 0, 1 + i % 3)} for i in range(12)]


@pytest.fixture(scope="module")
def smollm() -> Any:
    return load_tokenizer(assets.model_folder())


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@settings(max_examples=25, deadline=None)
@given(length=st.integers(2, 90), long=st.sampled_from(["cut", "drop"]))
def test_what_is_cut_and_dropped_is_counted(length: int, long: str) -> None:
    whole = Dataset(ROWS, tokenizer("chatml"))
    full = [whole.encoded(i) for i in range(len(whole))]
    keep = [one for one in full if (len(one.ids) <= length or long == "cut") and any(one.learned[1:length])]
    if not keep:
        with pytest.raises(DataError, match="No sample is left to train on: "):
            Dataset(ROWS, tokenizer("chatml"), length=length, long=long)
        return
    made = Dataset(ROWS, tokenizer("chatml"), length=length, long=long)
    counts = made.counts
    assert [made.encoded(i).ids for i in range(len(made))] == [one.ids[:length] for one in keep]
    assert list(made.lengths) == [len(made[i]["input_ids"]) for i in range(len(made))]
    assert counts.rows == len(ROWS) == counts.samples + sum(counts.dropped.values())
    assert counts.cut == sum(len(one.ids) > length for one in keep) and counts.cut_tokens == sum(max(0, len(one.ids) - length) for one in keep)
    assert counts.supervised == sum(int((made[i]["labels"][1:] != IGNORED).sum()) for i in range(len(made))) and counts.tokens == sum(made.lengths)
    assert sum(many for _, _, many in made.histogram()) == len(made)
    for number in (counts.cut, *counts.dropped.values()):
        assert number == 0 or any(f"{number:,}" in note for note in made.notes)


def test_texts_have_one_bos_and_an_end(smollm: Any) -> None:
    llama = tokenizer("llama3")  # puts nothing before a text
    for given, ids in (("Hello", ["Hello", "</s>"]), ("Hello</s>", ["Hello", "</s>"])):
        made = Dataset([{"text": given}], llama)
        assert [llama.decode([number]) for number in made[0]["input_ids"].tolist()] == ids and made[0]["labels"].tolist() == made[0]["input_ids"].tolist()
    adds_bos = replace(llama, before=(llama.core.special["<s>"],))
    for given in ("Hello", "<s>Hello"):
        made = Dataset([{"text": given}], adds_bos)
        assert [llama.decode([number]) for number in made[0]["input_ids"].tolist()] == ["<s>", "Hello", "</s>"]
        assert made.counts.supervised == 2
    pair = Dataset([{"prompt": "Hello", "completion": " world"}], smollm)
    assert [smollm.decode([number]) for number in pair[0]["labels"].tolist() if number != IGNORED] == [" world", "<|im_end|>"] and pair.train_on == "completion"


def test_a_token_over_the_border_is_not_learned_and_is_counted(smollm: Any) -> None:
    made = Dataset([{"prompt": "Hello wor", "completion": "ld again"}], smollm)
    assert made.counts.straddling == 1 and "hold the end of a prompt" in made.text
    assert [text for text, learned in preview.pieces(made.encoded(0), smollm) if learned] == [" again", "<|im_end|>"]


def test_turns_and_splits(smollm: Any) -> None:
    turns = Dataset(ROWS, smollm, train_on="turns")
    answers = [message["content"] for row in ROWS for message in row["messages"] if message["role"] == "assistant"]
    assert len(turns) == len(answers)
    for i, answer in enumerate(answers):
        assert smollm.decode([number for number in turns[i]["labels"].tolist() if number != IGNORED]) == answer + "<|im_end|>"
    whole, parts = (Dataset([{"text": "word " * 57}], smollm, length=length, long="split" if length else "cut") for length in (None, 20))
    assert [number for i in range(len(parts)) for number in parts[i]["input_ids"].tolist()] == whole[0]["input_ids"].tolist() and list(parts.lengths) == [20, 20, 19]
    rest, held = turns.split(4, seed=1)
    both = [turns.place(i) for i in rest.indices], [turns.place(i) for i in held.indices]
    assert len({*both[1]}) == 4 and not {*both[0]} & {*both[1]} and len(rest) + len(held) == len(turns)
    assert torch.equal(held[0]["input_ids"], turns[held.indices[0]]["input_ids"]) and list(held.lengths) == [turns.lengths[i] for i in held.indices]
    assert list(turns[2:5].indices) == [2, 3, 4] and list(held[1:].indices) == list(held.indices)[1:] and torch.equal(turns[-1]["labels"], turns[len(turns) - 1]["labels"])
    with pytest.raises(IndexError):
        turns[len(turns)]
    with pytest.raises(DataError, match="cannot be held out"):
        turns.split(12)


def test_padding_goes_by_position(smollm: Any) -> None:
    made = Dataset(ROWS, smollm)
    samples = [made[i] for i in range(4)]
    batch = padded(samples, pad=smollm.eos, multiple=8)  # even where padding looks like an end, ends are learned and padding is not
    assert batch["input_ids"].shape[1] % 8 == 0
    for row, sample in enumerate(samples):
        many = len(sample["input_ids"])
        assert torch.equal(batch["labels"][row, :many], sample["labels"]) and (batch["labels"][row, many:] == IGNORED).all()
        assert batch["attention_mask"][row].tolist() == [1] * many + [0] * (batch["input_ids"].shape[1] - many)
        assert int((batch["labels"][row] == smollm.eos).sum()) == sum(message["role"] == "assistant" for message in ROWS[row]["messages"])


def test_errors_name_the_row(smollm: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [*ROWS, {"messages": [{"role": "assistant"}]}])
    with pytest.raises(DataError) as caught:
        Dataset(file, smollm)
    assert (caught.value.where or "").startswith(f"{file}, line 13, message 1")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="no special token ends the turn") as caught:
        Dataset(write(tmp_path / "b.jsonl", ROWS), smollm, template=str(tmp_path / "own.jinja"))
    assert "line 1; " in (caught.value.where or "") and "own.jinja" in (caught.value.where or "")
    for settings_, message in (({"train_on": "assistant"}, "text without an assistant"), ({"train_on": "completion"}, "text without a prompt"), ({"train_on": "turns"}, "no turns"),
                               ({"train_on": "all of it"}, "'all of it'"), ({"long": "fold"}, "'fold'"), ({"length": 1}, "two tokens"), ({"date": "today"}, "'today'")):
        with pytest.raises(DataError, match=message):
            Dataset([{"text": "a b c"}], smollm, **settings_)
    with pytest.raises(DataError, match="choose|Dict|rows that can be read"):
        Dataset({"train": ROWS}, smollm)
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%Y') }}{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}")
    dated = Dataset(ROWS, smollm, template=str(tmp_path / "dated.jinja"), date="1999-01-31")
    assert "set `date`" in dated.text and dated.encoded(0).text.startswith("1999")


def test_a_row_of_one_token_teaches_nothing() -> None:
    made = Dataset([{"text": "</s>"}, {"text": "Hello"}], tokenizer("llama3"))
    assert len(made) == 1 and made.counts.dropped == {"nothing to learn": 1} and made.counts.supervised == 1


def test_answers_that_hold_the_end_are_told(smollm: Any) -> None:
    made = Dataset([{"instruction": "Say <|im_end|>", "output": "No."}], smollm)
    assert made.counts.special == 1 and "it is read as that token" in made.text


class Columns:
    """What Hugging Face's data sets look like."""

    column_names = ["messages"]

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in ROWS[index].items()}


def test_loaders_see_every_sample_once_also_with_workers_and_from_other_sources(smollm: Any, tmp_path: Path) -> None:
    made = Dataset(write(tmp_path / "a.jsonl", ROWS), smollm)
    same = Dataset(Columns(), pickle.loads(pickle.dumps(smollm)))
    wanted = sorted(tuple(made[i]["input_ids"].tolist()) for i in range(len(made)))
    for loader in (text_loader(made, 5, workers=1), text_loader(pickle.loads(pickle.dumps(made)), 5), text_loader(same, 5, train=False)):
        seen = [tuple(ids[mask.bool()].tolist()) for batch in loader for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        assert sorted(seen) == wanted
    packs = list(text_loader(made, tokens=256))
    assert all(batch["input_ids"].shape[0] == 1 and batch["input_ids"].shape[1] <= 256 for batch in packs) and sum(int((batch["position_ids"] == 0).sum()) for batch in packs) == len(made)
    assert sum(int((batch["labels"] != IGNORED).sum()) for batch in packs) == made.counts.supervised
    for sizes in ({}, {"batch_size": 2, "tokens": 8}):
        with pytest.raises(DataError, match="Give either a batch size"):
            text_loader(made, **sizes)


def test_the_preview_marks_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = write(tmp_path / "a.jsonl", ROWS), str(assets.model_folder())
    longest = max(Dataset(file, folder).lengths)
    assert main(["data", str(file), "--tokenizer", folder, "--rows", "2", "--length", str(longest - 1)]) == 0
    shown = capsys.readouterr().out
    answers = [message["content"] for message in ROWS[0]["messages"] if message["role"] == "assistant"]
    for answer in answers:
        assert f"{preview.OPEN}{answer}<|im_end|>{preview.CLOSE}".replace("\n", "↵\n") in shown
    assert "messages: messages; 12 rows" in shown and "the chat template of" in shown and f"samples were cut to {longest - 1} tokens" in shown and "\x1b[" not in shown
    assert main(["data", str(file), "--tokenizer", folder, "--rows", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 12 and found["train_on"] == "assistant" and len(found["shown"]) == 2 and sum(many for *_, many in found["histogram"]) == 12
    made = Dataset(file, folder)
    for one, i in zip(found["shown"], preview.chosen(made, 2), strict=True):
        assert "".join(run["text"] for run in one["runs"]) == made.encoded(i).text and one["labels"] == made[i]["labels"].tolist()
    coloured = preview.text(made, 1, colour=True)
    assert "\x1b[" in coloured and preview.OPEN not in coloured
    assert main(["data", str(file), "--tokenizer", folder, "--columns", "x"]) == 2 and main(["data", str(file), "--tokenizer", folder, "--format", "alpaca"]) == 3
    assert "lacks instruction, output" in capsys.readouterr().err


def small(tmp_path: Path) -> Path:
    """A folder with a tiny model of random weights and the real tokenizer."""
    folder = tmp_path / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((assets.model_folder() / name).read_bytes())
    return folder


CONFIG = """
model: {model}
passes: none
data: {{path: {data}, length: 96, held_out: 3{more}}}
trainer: {{steps: 3, batch_size: {batch}, lr: 1e-3, seed: 0, progress: false, output_dir: {out}}}
"""


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_from_a_file_of_text(tmp_path: Path, packed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(model=small(tmp_path), data=write(tmp_path / "a.jsonl", ROWS), more=", packing: 200" if packed else "", batch="null" if packed else 4, out=tmp_path / "out"))
    assert main(["train", str(config)]) == 0
    out, err = capsys.readouterr()
    assert "messages: messages; 12 rows" in err and "steps 3" in out and "val_loss" in out
    assert main(["train", str(config), "--print-config"]) == 0
    assert "held_out: 3" in capsys.readouterr().out
    for override, message in (("data.train=a:b", "either `train` or `path`"), ("data.lenght=3", "Do you mean length"), ("data.val=x.jsonl", "either `val` or `held_out`"), ("data.path=null", "'train' is missing")):
        assert main(["train", str(config), override]) == 2 and message in capsys.readouterr().err
    assert main(["train", str(config), "data.tokenizer=nowhere"]) == 3 and "neither tokenizer.json nor" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_model_learns_from_a_file(tmp_path: Path) -> None:
    rows = [{"question": f"What is {a} plus {b}?", "answer": f"{a} plus {b} is {a + b}, as everybody here knows."} for a in range(2, 9) for b in range(2, 9)]
    data = {"path": str(write(tmp_path / "sums.jsonl", rows)), "format": "alpaca", "columns": {"instruction": "question", "output": "answer"}, "held_out": 4, "length": 128}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"model": str(assets.model_folder()), "passes": "lora(rank=8) | fuse | loss", "data": data,
                                  "trainer": {"steps": 4, "batch_size": 4, "lr": 2e-3, "seed": 0, "progress": False, "output_dir": str(tmp_path / "out"), "validate_every": 2}}))
    assert main(["train", str(config)]) == 0
    losses = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = [row["val_loss"] for row in losses if "val_loss" in row]
    assert len(found) >= 2 and found[-1] < found[0]
    assert fxopt.data.Dataset(**{k: v for k, v in data.items() if k in ("format", "columns", "length")}, source=data["path"], tokenizer=assets.model_folder()).counts.cut == 0
