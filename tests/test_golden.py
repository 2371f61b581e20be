"""Dumps, diffs, whole steps and explanations are the texts that lie in tests/golden; `python -m tests.golden_models` writes them anew."""

from __future__ import annotations

import difflib

import pytest
from golden_models import FOLDER, GOLDEN


@pytest.mark.parametrize("name", GOLDEN)
def test_text_is_as_kept(name: str) -> None:
    kept = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    made = GOLDEN[name]()
    assert made == kept, "\n".join(difflib.unified_diff(kept.splitlines(), made.splitlines(), "kept", "made", lineterm="")) + "\nnew on purpose? python -m tests.golden_models"


def test_every_kept_file_is_made() -> None:
    assert {file.stem for file in FOLDER.glob("*.txt")} == set(GOLDEN)
