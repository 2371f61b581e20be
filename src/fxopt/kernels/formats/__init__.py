"""Weight formats: how the weight of a linear layer is stored, and how it is read.

format.py (what a format is), dense.py, half.py (16 bits), nf4.py (and nf4_state.py: the JSON of bitsandbytes files), per_row.py (int8, fp8),
gguf.py (the blocks of GGUF files). In a graph a stored weight
is `Tensor[] base, str format, SymInt[] shape`: one tensor per part of the format, and the shape of the dense weight.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from torch import Tensor

from fxopt.errors import CheckError
from fxopt.kernels.formats.dense import DENSE
from fxopt.kernels.formats.format import Format, Part, entry
from fxopt.kernels.formats.gguf import GGUF
from fxopt.kernels.formats.half import BF16, FP16
from fxopt.kernels.formats.nf4 import NF4, NF4_NESTED
from fxopt.kernels.formats.per_row import FP8, INT8

FORMATS: dict[str, Format] = {format.name: format for format in (DENSE, BF16, FP16, NF4, NF4_NESTED, INT8, FP8, *GGUF)}


PLAIN = ("dense", "bf16", "fp16")
"""Formats that hold the weight itself: it is read by a cast, and nothing is decoded."""


def named(name: str) -> Format:
    """The format of this name.

    Raises:
        CheckError: there is none; says which names are near.
    """
    found = FORMATS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, FORMATS) or list(FORMATS)
        raise CheckError(f"there is no weight format {name!r}", do=f"use one of {', '.join(near)}")
    return found


def stored_as(key: str, entries: Mapping[str, Tensor]) -> Format | None:
    """The format in which a safetensors file holds the weight `key`, or None if it is not one of ours.

    Blocks of GGUF files are bytes that do not say of which kind they are: whoever stores them elsewhere keeps the name.
    """
    return next((format for format in FORMATS.values() if format.claims is not None and format.claims(format.entries(key, entries))), None)


__all__ = ["FORMATS", "Format", "Part", "entry", "named", "stored_as"]
