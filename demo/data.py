"""Dictionary glosses as chat examples: only the answer is supervised, the prompt is the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
import random

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from demo import assets
from fxopt.data import Dataset, load_tokenizer

QUESTION = 'What does the word "{word}" mean?'


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


def prompt(tokenizer: PreTrainedTokenizerBase, entry: Entry) -> list[int]:
    """Token ids of a question, and of the beginning of its answer's turn."""
    template = load_tokenizer(tokenizer).template()
    assert template is not None
    text = template.render([{"role": "user", "content": QUESTION.format(word=entry.word)}], generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def batches(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Entry], size: int, seed: int | None = None
) -> list[dict[str, Tensor]]:
    """Right-padded batches of `size` examples of near-equal length, in random order if `seed` is given.

    Keys: input_ids, attention_mask, labels, each [size, seq] int64; labels are -100 outside the answers. Grouping
    by length keeps padding low, which helps every system that pays for padding.
    """
    rows = [{"instruction": QUESTION.format(word=entry.word), "output": entry.gloss} for entry in items]
    dataset = Dataset(rows, tokenizer, format="alpaca")
    order = sorted(range(len(dataset)), key=lambda i: dataset.lengths[i])
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    if seed is not None:
        random.Random(seed).shuffle(groups)
    return [dataset.collate([dataset[i] for i in group]) for group in groups]
