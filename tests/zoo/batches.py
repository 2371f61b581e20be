"""The inputs of training steps, by kind of model."""

from __future__ import annotations

import torch

from tests.zoo.entry import Batch, Batches

VOCABULARY, IMAGE, CHANNELS = 256, 32, 3
BLANK = 0
PLACEHOLDER = 5  # the token that stands for a piece of an image or a sound


def ids(generator: torch.Generator, batch: int, length: int) -> torch.Tensor:
    """Token ids [batch, length], of no special token."""
    return torch.randint(8, VOCABULARY, (batch, length), generator=generator)


def ignored(generator: torch.Generator, labels: torch.Tensor) -> torch.Tensor:
    """Labels of which a third are ignored, but not all of any sample."""
    lost = torch.rand(labels.shape, generator=generator) < 0.3
    lost[:, -1] = False
    return torch.where(lost, -100, labels)


def tokens(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Token ids, a full attention mask, labels of which a third are ignored."""
    text = ids(generator, batch, length)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": ignored(generator, ids(generator, batch, length))}


def padded(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Tokens of which the last samples end in padding."""
    made = tokens(generator, batch, length)
    made["attention_mask"][-1, -3:] = 0
    made["labels"][-1, -3:] = -100
    return made


def texts(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Token ids, a full attention mask, one class for each sample."""
    text = ids(generator, batch, length)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": torch.arange(batch) % 2}


def words(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Token ids, a full attention mask, one of two classes for each token."""
    text = ids(generator, batch, length)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": torch.randint(0, 2, text.shape, generator=generator)}


def spans(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Token ids and the start and end of an answer."""
    text = ids(generator, batch, length)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "start_positions": torch.full((batch,), 2), "end_positions": torch.full((batch,), 5)}


def translations(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Source tokens, and labels of another length."""
    text = ids(generator, batch, length)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": ignored(generator, ids(generator, batch, length - 3))}


def pairs(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Two texts that mean the same, for each sample; the second is shorter."""
    made: Batch = {}
    for name, size in (("first", length), ("second", length - 3)):
        text = ids(generator, batch, size)
        made[name] = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    return made


def pixels(generator: torch.Generator, batch: int, size: int = IMAGE) -> torch.Tensor:
    """Images [batch, 3, size, size]."""
    return torch.randn(batch, CHANNELS, size, size, generator=generator)


def images(generator: torch.Generator, batch: int, size: int) -> Batch:
    """Images and their classes."""
    return {"pixel_values": pixels(generator, batch, size), "labels": torch.arange(batch) % 2}


def scenes(generator: torch.Generator, batch: int, size: int) -> Batch:
    """Images with a class for each pixel."""
    return {"pixel_values": pixels(generator, batch, size), "labels": torch.randint(0, 2, (batch, size, size), generator=generator)}


def depths(generator: torch.Generator, batch: int, size: int) -> Batch:
    """Images alone."""
    return {"pixel_values": pixels(generator, batch, size)}


def captions(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Images with a caption each, for a contrastive loss."""
    text = ids(generator, batch, length).clamp(max=VOCABULARY - 2)
    text[:, -1] = VOCABULARY - 1  # the end of the text, where its embedding is read
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "pixel_values": pixels(generator, batch), "return_loss": True}


def said(places: int, image: int = IMAGE) -> Batches:
    """Text with an image in it, that takes as many places."""

    def made(generator: torch.Generator, batch: int, length: int) -> Batch:
        text = ids(generator, batch, length + places)
        text[:, 1 : 1 + places] = PLACEHOLDER
        return {"input_ids": text, "attention_mask": torch.ones_like(text), "pixel_values": pixels(generator, batch, image),
                "labels": torch.where(text == PLACEHOLDER, -100, text)}

    return made


def prompted(places: int) -> Batches:
    """As `said`, where what the image and the prompt before the answer are is marked."""

    def made(generator: torch.Generator, batch: int, length: int) -> Batch:
        found = said(places)(generator, batch, length)
        answer = torch.arange(length + places) > places + 4
        return found | {"token_type_ids": answer.long().expand(batch, -1).contiguous()}

    return made


def described(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Images, and text about them as labels."""
    return {"pixel_values": pixels(generator, batch), "labels": ids(generator, batch, length)}


def spectrograms(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Log-mel spectrograms [batch, 16, 48] with their text."""
    return {"input_features": torch.randn(batch, 16, 48, generator=generator), "labels": ids(generator, batch, length)}


def frames(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Spectrograms [batch, 4 length, 16], time first, with their text."""
    return {"input_features": torch.randn(batch, 4 * length, 16, generator=generator), "labels": ids(generator, batch, length)}


def waves(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Pieces of sound [batch, 40 length] and their classes."""
    return {"input_values": torch.randn(batch, 40 * length, generator=generator), "labels": torch.arange(batch) % 2}


def transcripts(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Pieces of sound [batch, 40 length] and what is said in them."""
    return {"input_values": torch.randn(batch, 40 * length, generator=generator), "labels": ids(generator, batch, 4)}
