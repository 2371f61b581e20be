"""All entries of the zoo, by name."""

from __future__ import annotations

from tests.zoo.decoders import DECODERS, EXPERTS, RECURRENT
from tests.zoo.encoders import EMBEDDERS, ENCODERS, SEQUENCES
from tests.zoo.entry import Entry
from tests.zoo.plain import PLAIN
from tests.zoo.vision import MULTIMODAL, SPEAKING, VISION

ENTRIES: tuple[Entry, ...] = (*DECODERS, *EXPERTS, *RECURRENT, *ENCODERS, *SEQUENCES, *EMBEDDERS, *VISION, *MULTIMODAL, *SPEAKING, *PLAIN)
ZOO: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}
