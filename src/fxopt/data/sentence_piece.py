"""sentencepiece models, through the package sentencepiece."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxopt.data import extras
from fxopt.errors import DataError


# The fields of a serialized ModelProto may come in pieces, of which the last wins: normalizer_spec (field 3) {add_dummy_prefix (3): false}.
# https://protobuf.dev/programming-guides/encoding/#last-one-wins, sentencepiece_model.proto
_NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceCore:
    """A sentencepiece model: see `fxopt.data.tokenizer.Core`.

    The model itself never reads control symbols (`</s>`) in a text. Here they and the added tokens of tokenizer_config.json are cut out of
    the text first. Only text before the first of them gets the space that models put before a text; with `legacy: true` in that file
    all pieces get it, as in Transformers.

    Args:
        config: of tokenizer_config.json.

    Raises:
        DataError: the file is no sentencepiece model, or the package is not installed.
    """

    def __init__(self, file: Path, config: Mapping[str, Any]) -> None:
        self._model, self._inner = _read(file), _read(file, b"" if config.get("legacy") else _NO_PREFIX)
        model = self._model
        special = {model.id_to_piece(i): i for i in range(model.get_piece_size()) if model.is_control(i) or model.is_unknown(i)}
        tokens = {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
        special |= {token["content"]: number for number, token in tokens.items() if token.get("special")}
        self._added = {number: token["content"] for number, token in tokens.items() if number >= model.get_piece_size()}
        self.special: Mapping[str, int] = special
        self._recognised = recognised = special | {text: number for number, text in self._added.items()}
        self._pattern = re.compile("(" + "|".join(re.escape(text) for text in sorted(recognised, key=len, reverse=True)) + ")")
        self.named = {name: model.id_to_piece(number) for name, number in
                      (("bos_token", model.bos_id()), ("eos_token", model.eos_id()), ("unk_token", model.unk_id()), ("pad_token", model.pad_id())) if number >= 0}
        self._puts = bool(config.get("add_bos_token", True)), bool(config.get("add_eos_token", False))

    @staticmethod
    def reads(file: Path) -> bool:
        """Whether the file is a sentencepiece model (others are named alike)."""
        try:
            _read(file)
        except DataError as error:
            if isinstance(error.__cause__, ImportError):
                raise
            return False
        return True

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Core`."""
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        place = 0
        for number, piece in enumerate(self._pattern.split(text)):
            if number % 2:
                ids.append(self._recognised[piece])
                ranges.append((place, place + len(piece)))
            elif piece:
                found = (self._inner if number else self._model).encode_as_offset_mapping(piece)
                ids += found["ids"]
                ranges += [(place + start, place + end) for start, end in found["offsets"]]
            place += len(piece)
        return ids, ranges

    def decode(self, ids: Sequence[int]) -> str:
        """See `Core`. Special tokens are written as their text."""
        written, run = "", []
        names = {number: text for text, number in self._recognised.items()}
        for number in (*ids, None):
            if number is None or number in names:
                written += self._model.decode(run) if run else ""
                written += names.get(number, "") if number is not None else ""
                run = []
            else:
                run.append(number)
        return written

    def added(self) -> tuple[list[int], list[int]]:
        """See `Core`. A sentencepiece model does not say; without tokenizer_config.json it is BOS and no EOS, as for LlamaTokenizer."""
        puts_bos, puts_eos = self._puts
        bos, eos = self._model.bos_id(), self._model.eos_id()
        return [bos] if puts_bos and bos >= 0 else [], [eos] if puts_eos and eos >= 0 else []

    def __len__(self) -> int:
        return max(self._model.get_piece_size(), *(number + 1 for number in self._added), 0)


def _read(file: Path, more: bytes = b"") -> Any:
    """The model of a file, with more fields."""
    package = extras.load("sentencepiece", "A sentencepiece model")
    try:
        return package.SentencePieceProcessor(model_proto=file.read_bytes() + more)
    except (RuntimeError, OSError) as error:
        raise DataError(f"The file is no sentencepiece model: {error}", where=str(file)) from error
