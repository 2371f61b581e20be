"""Two packages behind one interface: ids, characters of each id, special tokens, and the comparison of a folder that has both."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers
from transformers import AutoTokenizer

from demo import assets
from fxopt.data.tokenizer import SAMPLES, Tokenizer, difference, load_tokenizer
from fxopt.errors import DataError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(SAMPLES)


@cache
def unigram() -> bytes:
    """A small sentencepiece model: unigram, bytes for what it does not know, no normalization."""
    rng = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "naïve", "café", "Привет", "мир", "日本語", "テキスト", "def", "return", "1234567890", "x", "y"]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(" ".join(rng.choices(words, k=8)) for _ in range(300)), model_writer=made, vocab_size=400, hard_vocab_limit=False,
                                             model_type="unigram", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    return made.getvalue()


def as_json(change: float = 0.0) -> Backend:
    """The same model for the package tokenizers; with `change` one piece has another score."""
    model = sentencepiece.SentencePieceProcessor(model_proto=unigram())
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    place = next(i for i, (piece, _) in enumerate(vocabulary) if piece == "▁quick")
    vocabulary[place] = vocabulary[place][0], vocabulary[place][1] - change
    made = Backend(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    (made / "tokenizer.model").write_bytes(unigram())
    return made


def smollm() -> Tokenizer:
    return load_tokenizer(assets.model_folder())


@cache
def real() -> tuple[Tokenizer, Tokenizer, Any]:
    """A byte-level tokenizer, a sentencepiece one, and Transformers' for the first."""
    file = assets.cache_folder() / "dl" / "mistral.model"
    file.write_bytes(assets.sentencepiece_model())
    return smollm(), load_tokenizer(file), AutoTokenizer.from_pretrained(assets.model_folder(), local_files_only=True)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
@example("<|im_start|>user\n é<|im_end|>")
def test_ranges_tile_the_text_and_ids_are_those_of_the_packages(text: str) -> None:
    ours, pieces, theirs = real()
    assert ours.encode(text)[0] == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)[0]) == theirs.decode(theirs.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
    for tokenizer in (ours, pieces):
        ids, ranges = tokenizer.encode(text)
        place = 0
        for start, end in ranges:
            assert start <= place <= end
            place = end
        assert place == len(text) or tokenizer.decode(ids) != text  # a byte-level vocabulary may lack bytes, which are then lost
        assert len(ids) == len(ranges) and all(0 <= number < len(tokenizer) for number in ids)
    if "\u2581" not in text and "</s>" not in text and "<s>" not in text and "<unk>" not in text:
        assert pieces.encode(text)[0] == sentencepiece.SentencePieceProcessor(model_proto=assets.sentencepiece_model()).encode(text)


def test_special_tokens_are_read_in_texts_and_nothing_is_added() -> None:
    _, pieces, _ = real()
    assert (pieces.before, pieces.after, pieces.eos, pieces.named["bos_token"]) == ((1,), (), 2, "<s>")
    ids, ranges = pieces.encode("<s>[INST] hi[/INST] yes</s>")
    assert ids[0] == 1 and ids[-1] == 2 and ranges[-1] == (23, 27) and pieces.decode(ids) == "<s>[INST] hi[/INST] yes</s>"
    assert pieces.encode("<s>hi")[0][1:] != pieces.encode("hi")[0]  # no space is put before text that follows a special token


def test_padding_is_never_the_end(tmp_path: Path) -> None:
    ours, pieces, _ = real()
    assert ours.named["pad_token"] == ours.named["eos_token"] and ours.pad != ours.eos
    assert pieces.pad != pieces.eos


def test_a_folder_with_both_is_compared(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(unigram())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<s>", "add_bos_token": False, "legacy": True}))
    as_json().save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path)
    assert "agree on" in found.notes[0] and found.eos == 2 and found.before == ()
    for file in ("tokenizer.json", "tokenizer.model"):
        assert load_tokenizer(tmp_path / file).encode("the quick")[0] == found.encode("the quick")[0]
    as_json(change=30.0).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"differ: 'The quick brown fox.*' is \[.*\] in one and \[.*\] in the other, from token") as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.model" in (caught.value.do or "")
    assert load_tokenizer(tmp_path / "tokenizer.model").encode("the quick")[0] == found.encode("the quick")[0]
    (tmp_path / "tokenizer.model").write_bytes(b"some ranks of another program")
    assert "no sentencepiece model" in load_tokenizer(tmp_path).notes[0]


def test_other_numbers_of_special_tokens_are_a_difference(folder: Path) -> None:
    first, second = load_tokenizer(folder).core, load_tokenizer(folder).core
    assert difference(first, second) is None
    second.special = {**second.special, "</s>": 7}  # type: ignore[misc]
    assert "'</s>' is 2 in one and 7 in the other" in (difference(first, second) or "")


@pytest.mark.parametrize(("files", "message"), [
    ({}, "neither tokenizer.json nor tokenizer.model"),
    ({"tokenizer.json": "{"}, "holds no tokenizer"),
    ({"tokenizer.model": "x"}, "no sentencepiece model"),
    ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "is no JSON"),
    ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "holds a list"),
    ({"tokenizer.json": None, "tokenizer_config.json": '{"eos_token": "two words"}'}, "EOS is 'two words', which is no token"),
])  # fmt: skip
def test_damaged_folders_are_refused(tmp_path: Path, files: dict[str, str | None], message: str) -> None:
    for name, content in files.items():
        as_json().save(str(tmp_path / name)) if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_a_truncating_file_does_not_cut_and_stop_tokens_are_read(tmp_path: Path) -> None:
    cutting = as_json()
    cutting.enable_truncation(2)
    cutting.enable_padding(length=8)
    cutting.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    found = load_tokenizer(tmp_path)
    assert len(found.encode("the quick brown fox")[0]) > 2 and found.stop == {"<s>", "</s>"} and found.eos is None
    with pytest.raises(DataError, match="no fast tokenizer"):
        load_tokenizer(object())


def test_templates_of_a_folder(tmp_path: Path, folder: Path) -> None:
    as_json().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).template() is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}], "eos_token": "</s>"}))
    assert load_tokenizer(tmp_path).sources == {"default": "D", "tool_use": "T"}
    (tmp_path / "chat_template.jinja").write_text("J {{ eos_token }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    found = load_tokenizer(tmp_path)
    assert found.sources == {"default": "J {{ eos_token }}", "rag": "R"} and found.template().render([]) == "J </s>"  # type: ignore[union-attr]
    (tmp_path / "own.jinja").write_text("O")
    assert found.template(str(tmp_path / "own.jinja")).render([]) == "O"  # type: ignore[union-attr]
    with pytest.raises(DataError, match="writes <|im_start|>, <|im_end|>, which are not special"):
        found.template("chatml")
    with pytest.raises(DataError, match="no chat template 'chatmll'"):
        found.template("chatmll")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert found.template("alpaca").render(said).endswith("### Response:\nb</s>\n\n")  # type: ignore[union-attr]


def test_half_a_surrogate_pair_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"Character 2 of the text is half a surrogate pair, \\ud800"):
        load_tokenizer(folder).encode("ab\ud800")
    assert load_tokenizer(folder).encode("\U0001f642")[0]
