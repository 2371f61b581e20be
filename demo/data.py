"""Dictionary glosses as chat examples: only the answer is supervised, the prompt is the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from demo import assets

QUESTION = 'What does the word "{word}" mean?'
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Entry:
    """A word and its definition."""

    word: str
    gloss: str


def entries(seed: int = 0) -> list[Entry]:
    """The glosses of everyday words (20 or more in a million sentences) with one or two senses, shuffled.

    The first sense is taken, if it has 4 to 20 words.
    """
    counts = assets.frequencies()
    found = [
        Entry(word, senses[0])
        for word, senses in assets.glosses().items()
        if counts.get(word, 0) >= 20 and len(senses) <= 2 and 4 <= len(senses[0].split()) <= 20
    ]
    random.Random(seed).shuffle(found)
    return found


def split(held_out: int, seed: int = 0) -> tuple[list[Entry], list[Entry]]:
    """(training, held-out) entries; no held-out word, and no held-out gloss, is trained on."""
    every = entries(seed)
    held = every[:held_out]
    words, texts = {entry.word for entry in held}, {entry.gloss for entry in held}
    return [e for e in every[held_out:] if e.word not in words and e.gloss not in texts], held


def encode(tokenizer: PreTrainedTokenizerBase, entry: Entry) -> tuple[list[int], list[int]]:
    """(prompt, answer) token ids; the answer ends with the token that ends a turn."""
    messages = [{"role": "user", "content": QUESTION.format(word=entry.word)}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": entry.gloss}], tokenize=False)
    if not whole.startswith(prompt):
        raise AssertionError("the chat template changes the prompt when an answer follows")
    answer = whole[len(prompt) :].rstrip("\n")
    return tuple(tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))


def batches(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Entry], size: int, seed: int | None = None
) -> list[dict[str, Tensor]]:
    """Right-padded batches of `size` examples of near-equal length, in random order if `seed` is given.

    Keys: input_ids, attention_mask, labels, each [size, seq] int64; labels are -100 outside the answers. Grouping
    by length keeps padding low, which helps every system that pays for padding.
    """
    coded = [encode(tokenizer, entry) for entry in items]
    coded.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    groups = [coded[start : start + size] for start in range(0, len(coded), size)]
    if seed is not None:
        random.Random(seed).shuffle(groups)
    return [_collate(group, tokenizer.pad_token_id) for group in groups]


def _collate(group: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, Tensor]:
    length = max(len(prompt) + len(answer) for prompt, answer in group)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in group:
        rest = length - len(prompt) - len(answer)
        rows["input_ids"].append(prompt + answer + [pad] * rest)
        rows["attention_mask"].append([1] * (length - rest) + [0] * rest)
        rows["labels"].append([IGNORED_LABEL] * len(prompt) + answer + [IGNORED_LABEL] * rest)
    return {key: torch.tensor(value) for key, value in rows.items()}
